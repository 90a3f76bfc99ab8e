"""UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning (Mao et al. 2021).

https://arxiv.org/abs/2110.07577

Three methods at once, each with a gate that decides, from the text, how much of it is let through:

    prefix    softmax(q [G_P P_k; K]^T s) [G_P P_v; V]     G_P from the attention's input, one per layer
    LoRA      W x + G_L B A x, on W_q and W_v              G_L from the layer's input x, in place of alpha / r
    adapter   h + G_A change(LN(h + r))                    G_A from what the adapter reads (Pfeiffer's, see pfeiffer.py)

    G = mean over the tokens t of sigmoid(w x_t + b)       one number between 0 and 1 per sequence
    w (d,)    starts at N(0, 0.02)        b    starts at zero, so that every gate begins near 1/2

Per layer: a pair of the prefix, 2 d m + d + m of the adapter, 4 r d of the two LoRAs, 4 (d + 1) of the gates.

Worked example: BERT-base (L = 12, d = 768), r = 8, m = 48, a flat prefix of l = 10. The prefix has 184,320 numbers, the
adapters 894,528, the LoRAs 294,912 and the gates 36,912: 1,410,672, or 1.3 %.

The mean, the authors' and AdapterHub's, runs over all positions of the batch; two answers differ here:
    padding      is left out of the mean. There, how far a batch is padded changes the output of its texts
    generation   the gates of a text are those of its first pass, the prompt's, and stay with the cache. There, each
                 step has the gate of its one new token. A prompt that is read in pieces has the first piece's gates
A gate looks at the whole text: in the training of a language model, at tokens that are still to be predicted. In BERT,
which the paper begins with, there are none. GPT-2's q, k and v are one matrix: the LoRA is on all of it, with a gate
for each of the three. Encoder-decoders get LoRA and prefix in self-attention, see mam.py.

Gates depend on the text: nothing of this can be merged.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils.methods import settings
from utils.methods.bottleneck import INITS, adapter_num_params
from utils.methods.families import family_of
from utils.methods.layers import linear_shape
from utils.methods.lora import LoRALinear, dropout_mask
from utils.methods.mam import prefix_in_every_layer
from utils.methods.parts import core_of
from utils.methods.pfeiffer import PfeifferAdapter, PfeifferPostNorm, PfeifferPreNorm
from utils.methods.prefix import BiasedPrefixAttention, PrefixAttention, PrefixTuning, prefix_num_params

# ---------------------------------------------------------------------------------------------- the equations


def unipelt_gate(x, w, b, real=None):
    """How much of a method is let through: sigmoid(w x_t + b), averaged over the real tokens (Mao et al. 2021, sec. 3).

    x: (batch, n, d)   w: (g, d), g gates   b: (g,)   real: (batch or 1, n) of bool, False for padding; None: all real
    returns (batch, g), in x's dtype; the mean is taken in float32
    """
    each = torch.sigmoid(F.linear(x, w, b).float())  # (batch, n, g)
    if real is None:
        return each.mean(1).to(x.dtype)
    real = real.unsqueeze(-1)
    return ((each * real).sum(1) / real.sum(1).clamp(min=1)).to(x.dtype)


def gated_lora(x, A, B, gates):
    """What a gated LoRA adds: G B A x, and for a fused weight each of its g parts with a gate of its own.

    x: (batch, n, d_in)   A: (r, d_in)   B: (d_out, r)   gates: (batch, g); part i owns rows i d_out / g and on of B
    returns (batch, n, d_out)
    """
    by_part = B.view(gates.shape[1], -1, B.shape[1])  # (g, d_out / g, r)
    return torch.einsum("bnr,bg,gor->bngo", x @ A.T, gates, by_part).flatten(2)


def gated_prefix(prefix_key, prefix_value, gates):
    """A prefix as one text sees it: G P_k and G P_v.

    prefix_key, prefix_value: (batch, heads, l, hd)   gates: (batch, 1)
    """
    gates = gates.view(-1, 1, 1, 1)
    return gates * prefix_key, gates * prefix_value


def real_tokens(mask, n):
    """Which tokens are text, from the attention mask as a layer gets it: those that any position may look at.

    mask: None, (b, 1, n or 1, m) of bool or of numbers to add (0: may look), or (b, m) of ones and zeros, with m >= n
    returns (b, n) of bool, or None where all are
    raises ValueError for another kind of mask
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"UniPELT finds no padding in a {type(mask).__name__}: use the attention 'sdpa' or 'eager'")
    if mask.ndim == 2:
        return mask[:, :n].bool()
    seen = mask if mask.dtype == torch.bool else mask == 0
    return seen[:, 0].any(dim=1)[:, :n]


def unipelt_num_params(layers, d, num_virtual_tokens=10, hidden=None, size=48, r=8):
    """How many numbers UniPELT trains in a model whose queries, keys and values are as wide as its hidden states.

    layers: L   d: width   num_virtual_tokens: l   hidden: of the prefix's network, None: flat   size: m   r: rank
    """
    prefix = prefix_num_params(num_virtual_tokens, layers, d, hidden)
    return prefix + layers * (adapter_num_params(d, size) + 2 * r * (d + d) + 4 * (d + 1))


# ------------------------------------------------------------------------------------------------- the modules


@dataclass
class View:
    """What the gates of one layer need to know of a forward pass. Shared by them, and no module.

    batch: how many texts   real: (batch, n) as from `real_tokens`   later: whether this is a later step of generation
    kept: gates by their names, kept with the cache; None without a cache
    """

    batch: int | None = None
    real: torch.Tensor | None = None
    later: bool = False
    kept: dict | None = None

    def look(self, x, mask, cache, layer):
        """x: (b, n, d), what goes into attention   mask, cache: as attention gets them   layer: its number there"""
        self.batch, self.kept = len(x), None
        self.later = cache is not None and bool(cache.get_seq_length(layer))
        if cache is not None:
            if not hasattr(cache, "unipelt_gates"):
                cache.unipelt_gates = {}  # there they live as long as the text they belong to
            self.kept = cache.unipelt_gates
        self.real = None if self.later else real_tokens(mask, x.shape[1])


class Gate(nn.Module):
    """One or several gates on the same input. view: the layer's   name: a word that no other gate of the model has"""

    def __init__(self, view, name, d, gates=1, **like):
        super().__init__()
        self.view, self.name = view, name
        self.weight = nn.Parameter(torch.empty(gates, d, **like).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(gates, **like))

    def forward(self, x):
        """(batch, gates) for x (batch, n, d); in later steps of generation, those of the first."""
        view = self.view
        if view.later and self.name in view.kept:
            return view.kept[self.name]
        gates = unipelt_gate(x, self.weight.to(x.dtype), self.bias.to(x.dtype), view.real)
        if view.kept is not None:
            view.kept[self.name] = gates.detach()
        return gates

    def tensors(self):
        return {"gate.weight": self.weight, "gate.bias": self.bias}


class GatedLoRALinear(LoRALinear):
    """A LoRA with a gate in place of its scale."""

    mergeable = False
    why_not = "has a gate that depends on the text"

    def __init__(self, base, gate, r, **form):
        super().__init__(base, r, alpha=r, **form)
        self.gate = gate

    def low_rank_output(self, x, A, B):
        kept = x
        if self.dropout > 0 and self.training:
            kept = x * dropout_mask(x, self.dropout) / (1 - self.dropout)
        return self.inner(x) + gated_lora(kept, A.to(x.dtype), B.to(x.dtype), self.gate(x))

    def tensors(self):
        return super().tensors() | self.gate.tensors()

    def facts(self):
        return f"{(self.B.shape[0], self.A.shape[1])}  r={self.r}, gated"


class GatedPrefix(PrefixAttention):
    """A layer's pair of the prefix, gated by the input of its host.

    Attention is the first of a layer's modules that are adapted, so this one also fills the layer's View; not the
    layer itself, because gradient checkpointing, when it computes a layer again, calls the modules in it alone.
    """

    def __init__(self, *form):
        super().__init__(*form)
        self.gate = self.now = None  # a Gate, and what it says in this forward pass

    def enter(self, model, path):
        super().enter(model, path)
        self.names = tuple(inspect.signature(core_of(model.get_submodule(path)).forward).parameters)

    def before(self, host, args, kwargs):
        given = {self.names[i]: value for i, value in enumerate(args)} | kwargs
        mask = given.get("mask" if "mask" in self.names else "attention_mask")  # T5 calls it so
        self.gate.view.look(given["hidden_states"], mask, given.get("past_key_values"), host.layer_idx)
        self.now = self.gate(given["hidden_states"])
        return super().before(host, args, kwargs)

    def key_value(self, key):
        gates, self.now = self.now, None
        return gated_prefix(*super().key_value(key), gates.to(key.dtype))

    def tensors(self):
        return self.gate.tensors()

    def facts(self):
        return f"{super().facts()}, gated"


class GatedBiasedPrefix(GatedPrefix, BiasedPrefixAttention):
    """The same in T5."""


class GatedChange:
    """An adapter whose change is gated by what it reads. A mixin, in front of an adapter's class."""

    def __init__(self, gate, *where, **form):
        super().__init__(*where, **form)
        self.gate = gate

    def change(self, h):
        by_text = h.view(self.gate.view.batch, -1, h.shape[-1])  # OPT's feed-forward part has all tokens in one row
        return (self.gate(by_text).unsqueeze(-1) * super().change(by_text)).view_as(h)

    def tensors(self):
        return super().tensors() | self.gate.tensors()

    def facts(self):
        return f"{super().facts()}, gated"


class GatedPostNorm(GatedChange, PfeifferPostNorm):
    pass


class GatedPreNorm(GatedChange, PfeifferPreNorm):
    pass


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class UniPELT:
    """What to attach. Trains a prefix, LoRAs and an adapter in every layer, each with its gate (Mao et al. 2021).

    num_virtual_tokens  l, the length of the prefix
    hidden              width of the network that makes the prefix while it is trained; None: none, a flat prefix
    init_std            of the normal start of the network's input, or of a flat prefix
    reduction           the adapter's bottleneck has m = d / reduction numbers     size: m itself, instead
    r                   rank of the LoRAs on the queries' and values' projections (GPT-2: on c_attn)
    adapter_init        of the adapter: "zero_up", "houlsby" or "bert", see utils/methods/bottleneck.py
    lora_init           of the LoRAs: "uniform", "gaussian" or "random_b", see utils/methods/lora.py
    dropout             probability, on prefix, bottleneck and the LoRAs' inputs, in training mode only
    modules_to_save     modules trained whole and saved; None: the classification head, if the model has one
    dtype               of all that is trained; None: float32 over a half-precision base, else the base's
    """

    num_virtual_tokens: int = 10
    hidden: int | None = 512
    init_std: float = 1.0
    reduction: float = 16
    size: int | None = None
    r: int = 8
    adapter_init: str = "zero_up"
    lora_init: str = "uniform"
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None

    peft_type = None  # PEFT has no UniPELT: the file is in a format of our own

    def __post_init__(self):
        PrefixTuning(self.num_virtual_tokens, self.hidden, self.dropout, self.init_std)  # raises for bad settings
        settings.one_of("adapter_init", self.adapter_init, INITS)
        self.adapter()
        settings.rank(self.r)
        settings.one_of("lora_init", self.lora_init, ("uniform", "gaussian", "random_b"))
        whole = settings.names("modules_to_save", self.modules_to_save, or_regex=False)
        object.__setattr__(self, "modules_to_save", whole)  # the dataclass is frozen

    def adapter(self):
        """The configuration of the adapters alone."""
        shared = ("reduction", "size", "dropout", "modules_to_save", "dtype")
        return PfeifferAdapter(init=self.adapter_init, **{name: getattr(self, name) for name in shared})

    def parts(self, model):
        """{path: part}: in every layer two LoRAs, an adapter and a pair of the prefix; its numbers at the root."""
        adapter, loras, adapters = self.adapter(), {}, {}
        prefix = prefix_in_every_layer(model, self, GatedPrefix, GatedBiasedPrefix)
        for family in family_of(model, "UniPELT"):
            for path in family.layers(model):
                view, form, norm = View(), adapter.form(model, path), f"{path}.{family.ffn_norm}"
                like = {"dtype": form["dtype"], "device": form["device"]}
                for where in dict.fromkeys((family.q, family.v)):
                    host = model.get_submodule(f"{path}.{where}")
                    gates = 3 if family.q == family.k else 1  # GPT-2's c_attn
                    gate = Gate(view, f"{path}.{where}", linear_shape(core_of(host))[1], gates, **like)
                    lora = GatedLoRALinear(
                        host, gate, self.r, dropout=self.dropout, init=self.lora_init, dtype=like["dtype"]
                    )
                    loras[f"{path}.{where}"] = lora
                gate = Gate(view, f"{path}.adapter", form["d"], **like)
                if family.post_norm:
                    adapters[norm] = GatedPostNorm(gate, **form)
                else:
                    adapters[f"{path}.{family.ffn_out}"] = GatedPreNorm(gate, norm, **form)
                prefix[f"{path}.{family.attention}"].gate = Gate(view, f"{path}.prefix", form["d"], **like)
        return adapter.checked(model, loras | adapters | prefix)
