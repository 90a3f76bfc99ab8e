"""Pfeiffer adapters, one per layer: those of AdapterFusion (Pfeiffer et al. 2020).

https://arxiv.org/abs/2005.00247

With h the output of the feed-forward part and r the residual stream that is added to it:

    post-norm (BERT)     h <- h + change(LN(h + r)),  then LN(h + r) as ever, the same LN
    pre-norm (Llama)     h <- h + change(h + r),      then h + r as ever

change(x) = W_up f(W_down x + b_down) + b_up, see bottleneck.py. So the adapter reads what the layer would have put out,
and its change goes in before the last norm. A pre-norm layer has no norm at its end, so there the adapter simply
follows the layer. AdapterHub's `seq_bn` is the same in both. Half as many adapters as Houlsby's.

    L layers, width d, bottleneck m: L (2 d m + d + m) numbers

Worked example: BERT-base (L = 12, d = 768) with reduction 16, m = 48: 12 x 74,544 = 894,528 numbers, 0.8 %.
"""

from dataclasses import dataclass

from utils.methods.bottleneck import Bottleneck, BottleneckConfig, ReadingBottleneck, first


def pfeiffer(h, r, change, norm=None):
    """The feed-forward part's output with the adapter's change in it, before the residual addition.

    h: (..., d), the feed-forward part's output   r: (..., d), the residual   change: the adapter, a function
    norm: the layer norm behind the addition (post-norm), or None
    """
    total = h + r
    return h + change(total if norm is None else norm(total))


class PfeifferPostNorm(Bottleneck):
    """The adapter before the norm that ends a layer, its host. The norm's input is h + r, and the rest is the same."""

    def before(self, host, args, kwargs):
        total = first(args, kwargs)
        return (pfeiffer(total, 0, self.change, norm=host.forward),), {}  # forward: not through this hook again


class PfeifferPreNorm(ReadingBottleneck):
    """The adapter behind the feed-forward part's last module, its host. r is what its norm reads, `source`.

    OPT drops by a function after its projections, so there the adapter's change is dropped with the rest.
    """

    def after(self, host, args, kwargs, output):
        return pfeiffer(output, self.take(), self.change)


@dataclass(frozen=True)
class PfeifferAdapter(BottleneckConfig):
    """What to attach. Trains 2 d m + d + m numbers per layer (Pfeiffer et al. 2020, arXiv:2005.00247).

    reduction        the bottleneck has m = d / reduction numbers     size: m itself, instead
    activation       "relu", "gelu", "gelu_tanh", "swish", "tanh"
    dropout          probability, on the bottleneck's m numbers, in training mode only
    init             "zero_up" (W_up = 0: the identity), "houlsby" (both normal, 0.01), "bert" (both normal, 0.02)
    layers           layer numbers to adapt, or None for all
    modules_to_save  modules trained whole and saved; None: the classification head, if the model has one
    dtype            of the adapters; None: float32 over a half-precision base, else the base's
    """

    def parts(self, model):
        """{path: adapter} at the end of every layer."""
        parts = {}
        for family, layer in self.chosen_layers(model):
            norm, form = f"{layer}.{family.ffn_norm}", self.form(model, layer)
            if family.post_norm:
                parts[norm] = PfeifferPostNorm(**form)
            else:
                parts[f"{layer}.{family.ffn_out}"] = PfeifferPreNorm(norm, **form)
        return self.checked(model, parts)
