"""Parallel adapters: Towards a Unified View of Parameter-Efficient Transfer Learning (He et al. 2021).

https://arxiv.org/abs/2110.04366

    h <- FFN(x) + s change(x)        change(x) = W_up f(W_down x + b_down) + b_up, see bottleneck.py

The adapter stands beside the feed-forward part and reads the same x, so that both can run at once. s is a constant (4
in the paper) or one learned number that starts at 1. W_up starts at zero, W_down uniform in +-1/sqrt(d).

    L layers, width d, bottleneck m: L (2 d m + d + m) numbers, and L with a learned scale

Worked example: BERT-base (L = 12, d = 768) with reduction 2, m = 384: 12 x 590,976 = 7,091,712 numbers, 6.5 %.

In BERT x is the residual stream. In a pre-norm model (Llama) it is that after the norm, which is what the authors' code
reads too; AdapterHub's `par_bn` reads the stream before the norm: reads="residual".
"""

from dataclasses import dataclass

import torch
from torch import nn

from utils.methods import settings
from utils.methods.bottleneck import BottleneckConfig, ReadingBottleneck


def parallel(y, x, change, s):
    """The feed-forward part's output with the adapter beside it: y + s change(x).

    y: (..., d), FFN(x)   x: (..., d)   change: the adapter, a function of x   s: a number, or a tensor (1,)
    """
    return y + s * change(x)


class ParallelBottleneck(ReadingBottleneck):
    """The adapter beside a feed-forward part. Its host is that one's last module; `source` reads x.

    OPT drops by a function after its projections, so there the adapter's change is dropped with the rest.
    """

    def __init__(self, source, scale, **form):
        super().__init__(source, **form)
        learned = scale == "learned"
        self.scale = nn.Parameter(torch.ones_like(self.b_up[:1])) if learned else scale

    def after(self, host, args, kwargs, output):
        x = self.take()
        scale = self.scale.to(x.dtype) if isinstance(self.scale, nn.Parameter) else self.scale
        return parallel(output, x, self.change, scale)

    def tensors(self):
        learned = {"scale": self.scale} if isinstance(self.scale, nn.Parameter) else {}
        return super().tensors() | learned

    def facts(self):
        scale = "learned" if isinstance(self.scale, nn.Parameter) else f"{self.scale:g}"
        return f"{super().facts()}  scale {scale}"


@dataclass(frozen=True)
class ParallelAdapter(BottleneckConfig):
    """What to attach. Trains 2 d m + d + m numbers per layer (He et al. 2021, arXiv:2110.04366).

    reduction        the bottleneck has m = d / reduction numbers     size: m itself, instead
    scale            s, a number, or "learned": one number per layer that starts at 1
    reads            "ffn": what the feed-forward part reads, or "residual": the stream before its norm, as AdapterHub
                     does in pre-norm models; in post-norm models both are the same
    activation       "relu", "gelu", "gelu_tanh", "swish", "tanh"
    dropout          probability, on the bottleneck's m numbers, in training mode only
    init             "zero_up" (W_up = 0: the identity), "houlsby" (both normal, 0.01), "bert" (both normal, 0.02)
    layers           layer numbers to adapt, or None for all
    modules_to_save  modules trained whole and saved; None: the classification head, if the model has one
    dtype            of the adapters; None: float32 over a half-precision base, else the base's
    """

    reduction: float = 2
    scale: float | str = 4.0
    reads: str = "ffn"

    def __post_init__(self):
        super().__post_init__()
        settings.one_of("reads", self.reads, ("ffn", "residual"))
        if self.scale != "learned":
            settings.positive("scale", self.scale)

    def parts(self, model):
        """{path: adapter} beside the feed-forward part of every layer."""
        parts = {}
        for family, layer in self.chosen_layers(model):
            before_norm = self.reads == "residual" and not family.post_norm
            source = family.ffn_norm if before_norm else family.ffn_in
            form = self.form(model, layer)
            parts[f"{layer}.{family.ffn_out}"] = ParallelBottleneck(f"{layer}.{source}", self.scale, **form)
        return self.checked(model, parts)
