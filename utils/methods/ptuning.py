"""P-Tuning: GPT Understands, Too (Liu et al. 2021, https://arxiv.org/abs/2103.10385).

    P = encoder(T)          input = [P; E(x)], as in Prompt Tuning

    T (l, d)        trained, starts as N(0, 1)
    P (l, d)        the prompt that the model reads
    encoder "mlp"   d -> h -> h -> d with ReLU between, row by row
            "lstm"  a bidirectional LSTM over the l rows, then 2h -> 2h -> d with ReLU between

The rows of a prompt are hard to train one by one, so a small network makes them from T and is trained along. After
training only P counts: an adapter file holds P, l d numbers, which is all that inference needs. The encoder is kept
beside it, in a file of its own, so that training can go on; PEFT drops it and refuses to go on.

Numbers trained:
    mlp    l d + (d h + h) + (h h + h) + (h d + d)
    lstm   l d + 2 (4 h (d + h) + 8 h), for every layer after the first 2 (4 h (2 h + h) + 8 h), and (4 h h + 2 h) +
           (2 h d + d) for the two linear layers

Worked example: GPT-2 small has d = 768. With l = 20 and h = d, the MLP trains 15,360 + 3 * 590,592 = 1,787,136 numbers
and writes 15,360 into the adapter file.

The paper's encoder is the LSTM (in the authors' code h = d / 2). The authors also put single learned tokens between
words and, for small models, train the model along. PEFT and this file put all of them in front and freeze the model.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils.methods import settings
from utils.methods.prompt import DEFAULT_TASK, Prompts, check_prompt, prompt_fields, prompt_parts, prompt_settings

# ---------------------------------------------------------------------------------------------- the equations


def ptuning_mlp(x, layers):
    """Linear layers with a ReLU between each two of them.

    x: (l, d_in)   layers: [(weight (d_out, d_in), bias (d_out,)), ...]   returns (l, the last d_out)
    """
    *hidden, (weight, bias) = layers
    for W, b in hidden:
        x = F.relu(F.linear(x, W, b))
    return F.linear(x, weight, bias)


def lstm_step(x, h, c, W, U, b):
    """One step of an LSTM (nn.LSTM's order: input, forget, new, output). It walks over the l rows, once each way.

    x: (d,), the row   h: (h,), the state   c: (h,), the memory   W: (4h, d)   U: (4h, h)   b: (4h,), both biases' sum
    returns the next h and c
    """
    i, f, g, o = (W @ x + U @ h + b).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def ptuning_num_params(length, d, h, encoder="mlp", layers=2):
    """How many numbers P-Tuning trains. length: l   encoder: "mlp", or "lstm" of `layers` layers"""
    if encoder == "mlp":
        return length * d + (d * h + h) + (h * h + h) + (h * d + d)
    lstm = sum(2 * (4 * h * (d_in + h) + 8 * h) for d_in in [d] + (layers - 1) * [2 * h])
    return length * d + lstm + (2 * h * 2 * h + 2 * h) + (2 * h * d + d)


# ------------------------------------------------------------------------------------------------- the modules


class PromptEncoder(nn.Module):
    """T and the network that makes the prompt of it. Its parameters are named and shaped as those of PEFT's encoder."""

    def __init__(self, rows, d, h, encoder, layers, dropout):
        super().__init__()
        self.embedding = nn.Embedding(rows, d)
        if encoder == "lstm":
            self.lstm_head = nn.LSTM(d, h, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            self.lstm_head = None
            self.mlp_head = nn.Sequential(nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))

    def forward(self):
        """returns the prompt, (rows, d)"""
        x = self.embedding.weight
        if self.lstm_head is not None:
            x, _ = self.lstm_head(x)  # (rows, 2h): both directions side by side
        return ptuning_mlp(x, [(m.weight, m.bias) for m in self.mlp_head if isinstance(m, nn.Linear)])


class EncodedPrompts(Prompts):
    """P-Tuning: an encoder makes the rows. Without it, after a file that has none, the rows are fixed."""

    def __init__(self, host, length, cut, encoder):
        super().__init__(host, length, cut)
        self.encoder = encoder
        self.prompt_embeddings = None

    def prompts(self):
        return self.encoder() if self.encoder is not None else self.prompt_embeddings

    def tensors(self):
        if self.encoder is None:
            return {"prompt_embeddings": self.prompt_embeddings}
        return dict(self.encoder.named_parameters())

    def exported(self):
        """The prompt as inference makes it: without the dropout of an LSTM in training, which PEFT writes along."""
        if self.encoder is None:
            return self.tensors()
        training = self.encoder.training
        with torch.no_grad():
            prompts = self.encoder.eval()()
        self.encoder.train(training)
        return {"prompt_embeddings": prompts}

    def training_state(self):
        return {} if self.encoder is None else self.tensors()

    def load(self, tensors, state, trainable):
        if state is not None:
            super().load(state, None, trainable)
            made = self.exported()["prompt_embeddings"]
            kept = tensors["prompt_embeddings"].to(made)
            if (made - kept).norm() > 0.01 * kept.norm():  # further apart than another device's rounding
                raise ValueError("the encoder in the file for further training does not make the prompt in the other")
        elif trainable:
            raise ValueError(
                "the file holds the prompt and not the encoder that made it, as PEFT writes P-Tuning, so training "
                "cannot go on: load it with trainable=False"
            )
        else:
            like = self.encoder.embedding.weight
            self.encoder = None
            self.prompt_embeddings = nn.Parameter(tensors["prompt_embeddings"].to(like))


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class PTuning:
    """What to attach. Trains a prompt through an encoder (Liu et al. 2021, arXiv:2103.10385).

    num_virtual_tokens   l, how many rows
    encoder              "mlp" (PEFT's default, three linear layers) or "lstm" (the paper's)
    hidden               h, the encoder's width; None: the width d of the embeddings
    layers               of the LSTM   dropout: between the layers of the LSTM, in training mode only
    modules_to_save      modules trained whole and saved; None: the classification head, if the model has one
    num_transformer_submodules   2: hold 2 l rows and use the first l, as PEFT does for encoder-decoders; set by
                         `load_adapter` for such a file, and of no other use
    """

    num_virtual_tokens: int = 20
    encoder: str = "mlp"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] | None = None
    num_transformer_submodules: int = 1

    peft_type = "P_TUNING"
    default_task = DEFAULT_TASK
    file_prefix = "base_model."
    bare_names = ("prompt_embeddings",)

    def __post_init__(self):
        check_prompt(self)
        settings.one_of("encoder", self.encoder, ("mlp", "lstm"))
        if self.hidden is not None:
            settings.whole("hidden", self.hidden)
        settings.whole("layers", self.layers)
        settings.probability("dropout", self.dropout)
        if self.encoder == "mlp" and self.layers != 2:
            raise ValueError(f"layers is {self.layers}; it is a setting of the LSTM, and the MLP has none such")
        if self.dropout and (self.encoder == "mlp" or self.layers == 1):
            raise ValueError("dropout acts between the layers of an LSTM: it needs encoder='lstm' and layers=2 or more")

    def parts(self, model):
        """{path: part}: the prompt, and in an encoder-decoder the decoder's mask."""
        return prompt_parts(model, self, self.make)

    def make(self, host, cut, rows, embedding, dtype):
        d = embedding.weight.shape[1]
        encoder = PromptEncoder(rows, d, self.hidden or d, self.encoder, self.layers, self.dropout)
        return EncodedPrompts(host, self.num_virtual_tokens, cut, encoder.to(embedding.weight.device, dtype))

    # ---- PEFT's file

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are P-Tuning's own."""
        fields = prompt_fields(self, adapter)
        return fields | {
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.hidden or fields["token_dim"],
            "encoder_num_layers": self.layers,
            "encoder_dropout": self.dropout,
        }

    @classmethod
    def from_peft(cls, fields):
        """The configuration that such a file describes. Settings that PEFT's MLP ignores are left out."""
        encoder = str(fields.get("encoder_reparameterization_type", "MLP")).lower()
        lstm = {"layers": fields.get("encoder_num_layers", 2), "dropout": fields.get("encoder_dropout", 0.0)}
        if lstm["layers"] == 1:
            lstm["dropout"] = 0.0
        return cls(
            encoder=encoder,
            hidden=fields.get("encoder_hidden_size"),
            **(lstm if encoder == "lstm" else {}),
            **prompt_settings(fields),
        )
