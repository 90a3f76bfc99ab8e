"""MAM, mix and match: Towards a Unified View of Parameter-Efficient Transfer Learning (He et al. 2021).

https://arxiv.org/abs/2110.04366

Two methods at once, each where the paper found it to work best for its numbers:

    attention      softmax(q [P_k; K]^T s) [P_v; V]      a short prefix of l keys and values, utils/methods/prefix.py
    feed-forward   FFN(x) + s change(x)                  a wide parallel adapter, utils/methods/parallel.py

The paper's reason: prefix tuning is itself a parallel adapter, of attention, with a gate lambda and l rows as its
bottleneck (`prefix_as_gate` in prefix.py). Few numbers do most in attention, many do most beside the feed-forward part.

    prefix    l = 30, made by a network of width h = 800 with tanh while it is trained: l d + h d + h + 2 L d_kv (h + 1)
    adapter   m = d / 2 (512 of 1024 in the paper), s = 4, relu, W_up = 0: L (2 d m + d + m)

Worked example: BERT-base (L = 12, d = 768), l = 30, m = 384. The network trains 15,402,272 numbers to make the prefix
of 552,960 that stays; the adapters have 7,091,712.

Real tokens keep their positions: here and in the authors' code and AdapterHub's the prefix is no text in front, while
PEFT's prefix tuning counts it as some. Encoder-decoders get one network and a prefix in the self-attention of both
stacks; the authors have three networks, one of them for cross-attention, which has no prefix here.
"""

from dataclasses import dataclass

import torch

from utils.methods import settings
from utils.methods.attention import attention_modules
from utils.methods.bottleneck import adapter_num_params
from utils.methods.families import family_of
from utils.methods.parallel import ParallelAdapter
from utils.methods.parts import adapter_dtype, core_of
from utils.methods.prefix import BiasedPrefixAttention, Prefix, PrefixAttention, PrefixTuning, prefix_num_params

# ---------------------------------------------------------------------------------------------- the equations


def mam_num_params(layers, d, num_virtual_tokens=30, hidden=800, reduction=2):
    """How many numbers MAM trains in a model whose keys are as wide as its hidden states.

    layers: L   d: width   num_virtual_tokens: l   hidden: h of the prefix's network, None: a flat prefix
    returns those of the prefix and of L parallel adapters of the bottleneck d / reduction, an int
    """
    return prefix_num_params(num_virtual_tokens, layers, d, hidden) + layers * adapter_num_params(d, d // reduction)


# --------------------------------------------------------------------------------------------------- the parts


def prefix_in_every_layer(model, config, plain=PrefixAttention, biased=BiasedPrefixAttention):
    """{path: guest}: a prefix's numbers at the root, and a guest with one pair in every self-attention.

    config: has num_virtual_tokens, hidden, dropout, init_std, dtype
    plain, biased: the guests' classes; the second is for T5, whose scores have a bias by distance
    """
    method = type(config).__name__
    paths, families = attention_modules(model, method), family_of(model, method)
    d_kv = PrefixTuning.width(model, families[0])
    like = {"dtype": config.dtype or adapter_dtype(model), "device": next(model.parameters()).device}
    slots = range(len(paths))
    root = Prefix(config.num_virtual_tokens, d_kv, len(paths), slots, config.hidden, config.init_std, **like)
    if len(families) == 1:
        return {"": root} | {path: plain(root, slot, config.dropout) for path, slot in zip(paths, slots, strict=True)}
    parts, free = {"": root}, iter(slots)
    for family in families:
        stack = [f"{layer}.{family.attention}" for layer in family.layers(model)]
        for path in stack:  # the first layer of a stack holds the biases of all
            parts[path] = biased(root, next(free), config.dropout, core_of(model.get_submodule(stack[0])))
    return parts


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class MAM:
    """What to attach. Trains a prefix in attention and parallel adapters beside feed-forward parts (He et al. 2021).

    num_virtual_tokens  l, the length of the prefix
    hidden              width of the network that makes the prefix while it is trained; None: none, a flat prefix
    init_std            of the normal start of the network's input, or of a flat prefix
    reduction           the adapter's bottleneck has m = d / reduction numbers     size: m itself, instead
    scale               s, a number, or "learned": one number per layer that starts at 1
    reads               what the adapter reads: "ffn" or "residual", see utils/methods/parallel.py
    init                of the adapter: "zero_up", "houlsby" or "bert", see utils/methods/bottleneck.py
    dropout             probability, on the prefix and on the bottleneck's numbers, in training mode only
    modules_to_save     modules trained whole and saved; None: the classification head, if the model has one
    dtype               of all that is trained; None: float32 over a half-precision base, else the base's
    """

    num_virtual_tokens: int = 30
    hidden: int | None = 800
    init_std: float = 1.0
    reduction: float = 2
    size: int | None = None
    scale: float | str = 4.0
    reads: str = "ffn"
    init: str = "zero_up"
    dropout: float = 0.0
    modules_to_save: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None

    peft_type = None  # PEFT has no MAM: the file is in a format of our own

    def __post_init__(self):
        PrefixTuning(self.num_virtual_tokens, self.hidden, self.dropout, self.init_std)  # raises for bad settings
        self.adapter()
        whole = settings.names("modules_to_save", self.modules_to_save, or_regex=False)
        object.__setattr__(self, "modules_to_save", whole)  # the dataclass is frozen

    def adapter(self):
        """The configuration of the parallel adapters alone."""
        shared = ("reduction", "size", "scale", "reads", "init", "dropout", "modules_to_save", "dtype")
        return ParallelAdapter(**{name: getattr(self, name) for name in shared})

    def parts(self, model):
        """{path: guest}: the adapters beside the feed-forward parts, the prefix at the root and in every layer."""
        prefix, adapter = prefix_in_every_layer(model, self), self.adapter()
        return adapter.checked(model, adapter.parts(model) | prefix)
