"""Houlsby adapters: Parameter-Efficient Transfer Learning for NLP (Houlsby et al. 2019).

https://arxiv.org/abs/1902.00751

    y <- y + change(y)        change(y) = W_up f(W_down y + b_down) + b_up, see bottleneck.py

y (..., d) is the output of a sub-layer, after its dropout and before the residual addition (and so, in BERT, before the
norm). Each layer has two, one after attention and one after the feed-forward part. The paper trains the norms beside
them: d or 2 d numbers each. A decoder's attention to its encoder (T5) has none, as in AdapterHub.

    L layers, width d, bottleneck m: 2 L (2 d m + d + m) numbers, and the norms

Worked example: BERT-base (L = 12, d = 768) with m = 64: 24 x (98,304 + 832) = 2,379,264, and 25 norms of 1,536 make
2,417,664 numbers, 2.2 % of the model.

The authors' code has a GELU by the tanh approximation and a truncated normal start of both matrices (activation=
"gelu_tanh", init="houlsby"); AdapterHub's `double_seq_bn` has swish, and leaves the norms alone.
"""

from dataclasses import dataclass

import torch
from torch import nn

from utils.methods import settings
from utils.methods.bottleneck import Bottleneck, BottleneckConfig
from utils.methods.families import own_modules
from utils.methods.parts import Wrapper, adapter_dtype
from utils.targeting import inside, whole_modules


def houlsby(y, change):
    """A sub-layer's output with the adapter behind it. y: (..., d)   change: the adapter, a function of y"""
    return y + change(y)


class HoulsbyBottleneck(Bottleneck):
    """The adapter behind one sub-layer. Its host is the last module of that: in BERT a dropout, in Llama a projection.

    OPT drops by a function after its projections, so there the adapter's change is dropped with the rest.
    """

    def after(self, host, args, kwargs, output):
        return houlsby(output, self.change)


class TrainedNorm(Wrapper):
    """A norm that computes with trained copies of its numbers.

    In float32 over a half-precision base: near 1, where a norm's weights are, bfloat16 has steps of 2^-7, in which the
    steps of a usual learning rate would be rounded away one by one.
    """

    def __init__(self, base, dtype=None):
        super().__init__(base)
        numbers = dict(self.core.named_parameters(recurse=False))
        self.copies = nn.ParameterDict({n: p.detach().to(dtype, copy=True) for n, p in numbers.items()})

    def adapted_forward(self, *args, **kwargs):
        rounded = {n: p.to(getattr(self.core, n).dtype) for n, p in self.copies.items()}
        return torch.func.functional_call(self.core, rounded, args, kwargs)

    def tensors(self):
        return dict(self.copies)

    def facts(self):
        return f"{type(self.core).__name__}, a trained copy"


def norms(model):
    """{path: module} of every norm of a model that has numbers: LayerNorm's weight and bias, RMSNorm's weight."""
    found = {path: m for path, m in own_modules(model) if type(m).__name__.endswith("Norm")}
    return {path: m for path, m in found.items() if list(m.parameters())}


@dataclass(frozen=True)
class HoulsbyAdapter(BottleneckConfig):
    """What to attach. Trains 2 (2 d m + d + m) numbers per layer, and the norms (Houlsby et al. 2019).

    reduction        the bottleneck has m = d / reduction numbers     size: m itself, instead
    activation       "relu", "gelu", "gelu_tanh" (the authors'), "swish" (AdapterHub's), "tanh"
    dropout          probability, on the bottleneck's m numbers, in training mode only
    init             "zero_up" (W_up = 0: the identity), "houlsby" (both normal, 0.01), "bert" (both normal, 0.02)
    layers           layer numbers to adapt, or None for all
    layer_norms      whether all norms of the model are trained too, as in the paper
    modules_to_save  modules trained whole and saved; None: the classification head, if the model has one
    dtype            of the adapters; None: float32 over a half-precision base, else the base's
    """

    activation: str = "gelu"
    layer_norms: bool = True

    def __post_init__(self):
        super().__post_init__()
        settings.one_of("layer_norms", self.layer_norms, (True, False))

    def parts(self, model):
        """{path: adapter} behind attention and feed-forward part of every layer, and {path: wrapper} of the norms."""
        parts = {
            f"{layer}.{spot}": HoulsbyBottleneck(**self.form(model, layer))
            for family, layer in self.chosen_layers(model)
            for spot in (family.attention_out, family.ffn_out)
        }
        whole = whole_modules(model, self)
        for path, norm in norms(model).items() if self.layer_norms else ():
            if not any(inside(path, w) for w in whole):
                parts[path] = TrainedNorm(model.get_submodule(path), self.dtype or adapter_dtype(norm))
        return self.checked(model, parts)
