"""Prompt Tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al. 2021,
https://arxiv.org/abs/2104.08691).

    input = [P; E(x)]          the model then reads l + n positions instead of n

    P (l, d)        the prompt: l "virtual tokens", the only numbers that are trained
    E(x) (n, d)     the embeddings of the text x, frozen like the rest of the model
    l d             numbers trained, however deep the model is

P starts as rows of the embedding table, as the paper recommends: drawn from the vocabulary (init="vocab"; the paper
draws from its 5,000 most common tokens) or those of given tokens, a label or an instruction (init="text"). PEFT's
default, N(0, 1) (init="random"), lies far off all embeddings in most models, and the paper found a random start to be
the worst for all but its largest ones.

Worked example: GPT-2 small has d = 768. With l = 20 the prompt is (20, 768): 15,360 numbers, 0.01 % of 124 million.

The l positions are cut off the model's output again, so that logits, labels and losses fit the text as they do in the
base model. Where that is not what PEFT does:
    language models      PEFT returns logits for l + n positions and pads the labels with -100. Its last virtual token
                         must predict the first token of the text; here, as in the base model, nothing predicts that one
    a class per token    PEFT's logits and labels have different lengths, and its loss fails; spans in question
                         answering are counted from the wrong place
    a class per text     a decoder's head reads the last token that is not padding: PEFT reads the last position. An
                         encoder's head (BERT, RoBERTa) reads the first position, a virtual token, as in PEFT
    encoder-decoders     the encoder reads the prompt, the decoder sees it. PEFT trains 2 l rows and uses l of them
    positions            `position_ids`, which generate() gives so that padding does not count, are moved up by l. PEFT
                         drops them: there a text padded on the left stands further from the prompt than in training,
                         and what is generated for it depends on the other texts of its batch
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from utils.methods import settings
from utils.methods.families import own_modules
from utils.methods.parts import Guest, adapter_dtype, core_of
from utils.targeting import inside, task_head

# ---------------------------------------------------------------------------------------------- the equations


def prepend(prompts, embeddings):
    """The same l rows in front of every sequence of a batch.

    prompts: (l, d)   embeddings: (b, n, d)
    returns (b, l + n, d), in the embeddings' dtype and on their device
    """
    rows = prompts.to(embeddings).expand(len(embeddings), -1, -1)  # (b, l, d): a view, nothing is copied
    return torch.cat((rows, embeddings), dim=1)


def extend_mask(mask, length):
    """The attention mask of [P; E(x)]: every token sees the whole prompt.

    mask: (b, n), 1 for a token and 0 for padding   length: l
    returns (b, l + n), with l ones in front
    """
    return torch.cat((mask.new_ones(len(mask), length), mask), dim=1)


def extend_positions(positions, length, first=0):
    """Positions of [P; E(x)]: the prompt takes the first l, and the text moves up by as many.

    positions: (b, n), or (1, n) for all   length: l   first: the number that the model gives to a first token
    returns (b, l + n)
    """
    prompt = torch.arange(first, first + length, device=positions.device).expand(len(positions), -1)
    return torch.cat((prompt, positions + length), dim=1)


def extend_labels(labels, length):
    """Labels for outputs that still contain the prompt: -100, which the loss ignores, for its positions.

    labels: (b, n)   length: l   returns (b, l + n)
    """
    return torch.cat((labels.new_full((len(labels), length), -100), labels), dim=1)


def prompt_init_from_tokens(embedding, ids, length):
    """A prompt that starts as the embeddings of given tokens.

    embedding: the model's embedding module   ids: token numbers, repeated or cut off to `length` of them
    returns (length, d), a copy
    """
    ids = [ids[i % len(ids)] for i in range(length)]
    with torch.no_grad():
        return embedding(torch.tensor(ids, device=embedding.weight.device)).clone()


def prompt_init_from_vocabulary(embedding, length, generator=None):
    """A prompt that starts as rows drawn from the embedding table, every token as likely as any other.

    embedding: the model's embedding module   generator: a torch.Generator to draw from, or None for the global one
    returns (length, d), a copy
    """
    ids = torch.randint(embedding.weight.shape[0], (length,), generator=generator)
    return prompt_init_from_tokens(embedding, ids.tolist(), length)


def prompt_num_params(length, d):
    """How many numbers Prompt Tuning trains: l d, whatever the model's depth."""
    return length * d


# ------------------------------------------------------------------------------------------------- the modules


class Prompts(Guest):
    """Rows in front of the embeddings of a stack of layers, the host. Subclasses say which rows in `prompts`.

    length: how many   cut: whether to take their positions off the output again
    """

    nameless = True
    why_not = "makes the input longer"

    def __init__(self, host, length, cut=True):
        super().__init__()
        self.length, self.cut = length, cut
        self.names = tuple(inspect.signature(host.forward).parameters)
        # RoBERTa keeps the positions up to its padding token's number for padding.
        self.first = getattr(getattr(host, "embeddings", None), "padding_idx", -1) + 1
        self.added = False  # whether the forward pass under way has the prompt in it

    def prompts(self):
        """(l, d), or more rows, of which the first l are used"""
        raise NotImplementedError

    def before(self, host, args, kwargs):
        # as zip would do it, but torch 2.8 cannot compile one with `strict`
        kwargs = {self.names[i]: value for i, value in enumerate(args)} | kwargs
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if getattr(mask, "ndim", None) != 2:
                raise ValueError(
                    "a prompt needs an attention mask of shape (batch, length), or none: with a static cache "
                    "generate() makes one of another shape, so generate with a dynamic one"
                )
            kwargs["attention_mask"] = extend_mask(mask, self.length)
        kwargs.pop("cache_position", None)  # the model counts anew
        positions = kwargs.get("position_ids")
        cache = kwargs.get("past_key_values")
        ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        # In generation, the cache holds the prompt from the first step on. (Ids and embeddings: the host complains.)
        self.added = (cache is None or cache.get_seq_length() == 0) and (ids is None) != (embeddings is None)
        if cache is not None and not self.added:
            new = (embeddings if ids is None else ids).shape[1]
            text = None if mask is None else mask.shape[1]  # with the new tokens
            if mask is None and positions is not None and new > 1:  # of single tokens a GPU would have to wait for it
                text = int(positions.max()) + 1
            if text is not None and text + self.length != cache.get_seq_length() + new:
                raise ValueError(
                    f"the cache holds the prompt's {self.length} positions too, so its length is not that of the text "
                    "before: give generate() the whole text and no past_key_values"
                )
        if positions is not None:
            longer = extend_positions(positions, self.length, self.first)
            kwargs["position_ids"] = longer if self.added else longer[:, self.length :]
        if self.added:
            if embeddings is None:
                embeddings = host.get_input_embeddings()(ids)
            kwargs |= {"input_ids": None, "inputs_embeds": prepend(self.prompts()[: self.length], embeddings)}
            segments = kwargs.get("token_type_ids")
            if segments is not None:  # the prompt belongs to the first token's segment
                kwargs["token_type_ids"] = torch.cat((segments[:, :1].expand(-1, self.length), segments), dim=1)
        return (), kwargs

    def after(self, host, args, kwargs, output):
        if not self.added or not self.cut:
            return output
        if isinstance(output, tuple):
            return (output[0][:, self.length :], *output[1:])
        output["last_hidden_state"] = output["last_hidden_state"][:, self.length :]
        if output.get("hidden_states") is not None:  # attentions keep the prompt's columns: they are part of the sums
            output["hidden_states"] = tuple(states[:, self.length :] for states in output["hidden_states"])
        return output

    def facts(self):
        return f"prompt of {self.length} rows"


class LearnedPrompts(Prompts):
    """Prompt Tuning: the rows themselves are trained."""

    def __init__(self, host, length, cut, start):
        super().__init__(host, length, cut)
        self.prompt_embeddings = nn.Parameter(start)

    def prompts(self):
        return self.prompt_embeddings

    def tensors(self):
        return {"prompt_embeddings": self.prompt_embeddings}


class PromptMask(Guest):
    """In the decoder of an encoder-decoder: its attention to the encoder sees the prompt's l positions too."""

    why_not = Prompts.why_not

    def __init__(self, host, length):
        super().__init__()
        self.length = length
        self.names = tuple(inspect.signature(host.forward).parameters)

    def before(self, host, args, kwargs):
        kwargs = {self.names[i]: value for i, value in enumerate(args)} | kwargs
        states, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if mask is not None and states.shape[1] == mask.shape[1] + self.length:  # they were encoded with the prompt
            kwargs["encoder_attention_mask"] = extend_mask(mask, self.length)
        return (), kwargs

    def tensors(self):
        return {}

    def facts(self):
        return "mask for the prompt"


# ---------------------------------------------------------------------------------------------- the configuration


DEFAULT_TASK = (
    "FEATURE_EXTRACTION"  # for a model without a known head: where no task is named, PEFT leaves the prompt out
)


def text_stacks(model, method):
    """[(path, module)] of the stacks of layers that read tokens: one, or for an encoder-decoder these two in order.

    method: its name, for the message   raises ValueError for a model with none, or with another kind of several
    """
    from transformers import PreTrainedModel

    found = [(p, m) for p, m in [("", model), *own_modules(model)] if isinstance(m, PreTrainedModel)]
    stacks = [(p, m) for p, m in found if not any(p != o and (p == "" or inside(o, p)) for o, _ in found)]
    if len(stacks) == 1:
        return stacks
    ends = {p.rsplit(".", 1)[-1]: (p, m) for p, m in stacks}
    if len(stacks) == 2 and ends.keys() == {"encoder", "decoder"}:
        return [ends["encoder"], ends["decoder"]]
    raise ValueError(
        f"{method} puts its prompt before one stack of layers, or before the encoder of two; "
        f"this {type(model).__name__} has {', '.join(p for p, _ in stacks) or 'none that it knows'}"
    )


def prompt_parts(model, config, make):
    """{path: part} of a method that puts a prompt before the text.

    make: (host, cut, rows, embedding, dtype) -> Prompts; rows: how many there are in PEFT's file
    """
    length = config.num_virtual_tokens
    (path, host), *decoder = text_stacks(model, type(config).__name__)
    room = getattr(host.config, "max_position_embeddings", None)
    if room is not None and length >= room:
        raise ValueError(f"num_virtual_tokens is {length}, which leaves no position of the model's {room} to the text")
    # The head of an encoder that classifies texts reads the first position, which is the prompt's.
    reads_first = "SequenceClassification" in type(model).__name__ and task_head(model) == "classifier"
    embedding = core_of(host.get_input_embeddings())
    if not isinstance(embedding, nn.Embedding):
        name = type(config).__name__
        raise ValueError(f"{name} puts its prompt before text, and this {type(model).__name__} reads none")
    rows = length * config.num_transformer_submodules
    parts = {path: make(host, not decoder and not reads_first, rows, embedding, adapter_dtype(embedding))}
    return parts | {p: PromptMask(m, length) for p, m in decoder}


def prompt_fields(config, adapter):
    """The fields of adapter_config.json that all of PEFT's prompt methods share. (It finds out the others itself.)"""
    part = next(p for p in adapter.parts.values() if isinstance(p, Prompts))
    return {
        "num_virtual_tokens": config.num_virtual_tokens,
        "num_transformer_submodules": config.num_transformer_submodules,
        "token_dim": part.exported()["prompt_embeddings"].shape[1],
    }


def prompt_settings(fields):
    """Our settings that such a file means."""
    seq2seq = fields.get("task_type") == "SEQ_2_SEQ_LM"
    return {
        "num_virtual_tokens": fields.get("num_virtual_tokens"),
        "num_transformer_submodules": fields.get("num_transformer_submodules") or (2 if seq2seq else 1),
        "modules_to_save": tuple(dict.fromkeys(fields.get("modules_to_save") or ())),  # PEFT writes each name twice
    }


def check_prompt(config):
    """What the configurations of prompt methods have in common: ValueError, or the settings in one form."""
    settings.whole("num_virtual_tokens", config.num_virtual_tokens)
    settings.one_of("num_transformer_submodules", config.num_transformer_submodules, (1, 2))
    whole = settings.names("modules_to_save", config.modules_to_save, or_regex=False)
    object.__setattr__(config, "modules_to_save", whole)  # the dataclass is frozen


@dataclass(frozen=True)
class PromptTuning:
    """What to attach. Trains l d numbers in front of the text (Lester et al. 2021, arXiv:2104.08691).

    num_virtual_tokens   l, how many rows
    init                 "vocab" (embeddings drawn from the vocabulary), "text" (those of init_ids), "random" (N(0, 1))
    init_ids             token numbers for init="text", repeated or cut off to l of them: tokenizer(text).input_ids
    modules_to_save      modules trained whole and saved; None: the classification head, if the model has one
    num_transformer_submodules   2: hold 2 l rows and use the first l, as PEFT does for encoder-decoders; set by
                         `load_adapter` for such a file, and of no other use
    """

    num_virtual_tokens: int = 20
    init: str = "vocab"
    init_ids: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] | None = None
    num_transformer_submodules: int = 1

    peft_type = "PROMPT_TUNING"
    default_task = DEFAULT_TASK
    file_prefix = "base_model."
    bare_names = ("prompt_embeddings",)

    def __post_init__(self):
        check_prompt(self)
        settings.one_of("init", self.init, ("vocab", "text", "random"))
        ids = self.init_ids
        if not isinstance(ids, (tuple, list)) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError("init_ids must be token numbers, such as tokenizer(text).input_ids")
        if (self.init == "text") != bool(ids):
            raise ValueError("init='text' and init_ids, the numbers of that text's tokens, go together")
        object.__setattr__(self, "init_ids", tuple(ids))

    def parts(self, model):
        """{path: part}: the prompt, and in an encoder-decoder the decoder's mask."""
        return prompt_parts(model, self, self.make)

    def make(self, host, cut, rows, embedding, dtype):
        vocabulary, d = embedding.weight.shape
        if self.init == "random":
            start = torch.randn(rows, d, device=embedding.weight.device)
        elif self.init == "vocab":
            start = prompt_init_from_vocabulary(embedding, rows)
        else:
            if max(self.init_ids) >= vocabulary:
                raise ValueError(f"init_ids has token {max(self.init_ids)}; the vocabulary ends at {vocabulary - 1}")
            start = prompt_init_from_tokens(embedding, self.init_ids, rows)
        return LearnedPrompts(host, self.num_virtual_tokens, cut, start.to(dtype))

    # ---- PEFT's file

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are Prompt Tuning's own."""
        return prompt_fields(self, adapter) | {"prompt_tuning_init": "RANDOM"}  # TEXT would ask for a tokenizer

    @classmethod
    def from_peft(cls, fields):
        """The configuration that such a file describes. How the prompt was started does not matter any more."""
        return cls(init="random", **prompt_settings(fields))
