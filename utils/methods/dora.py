"""DoRA: Weight-Decomposed Low-Rank Adaptation (Liu et al. 2024, https://arxiv.org/abs/2402.09353).

    W' = m (W + s B A) / |W + s B A|        y = W' x + b

    W (d_out, d_in), b (d_out,), A (r, d_in), B (d_out, r) and s are LoRA's
    |.| (d_out,)           the length of each row, over d_in, in nn.Linear's storage (the paper writes W transposed and
                           says columns); a constant in the backward pass (section 4.3 of the paper)
    m (d_out,)             the magnitude, trained; starts as |W + s B A|, so that the first forward is the base model's
    r (d_in + d_out) + d_out    numbers trained per layer

Worked example: Llama-2-7B's q_proj has W (4096, 4096). With r = 8 LoRA trains 65,536 numbers and m adds 4,096.

A row of W + s B A that is zero has no direction: its gain m / |.| counts as 1, and its magnitude gets no gradient until
B has made the row something. (PEFT divides by zero there, and every output becomes NaN.)

Dropout p > 0 in training: y = W x + b + (g - 1) W x' + g s B A x', with g = m / |.| and x' = dropout(x), as in the
authors' code and PEFT. It takes two products with W, forward and backward. With `dropout_on="update"` only the input of
s B A is dropped, y = b + g (W x + s B A x'), and one product is enough.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from utils.methods import settings
from utils.methods.layers import dense_weight, is_conv1d, mergeable_weight, plain_weight, product
from utils.methods.lora import (
    LoRA,
    LoRAEmbedding,
    LoRALinear,
    dropout_mask,
    lora_backward,
    lora_delta,
    lora_forward,
    lora_num_params,
)

# ---------------------------------------------------------------------------------------------- the equations


def dora_magnitude(W):
    """The length of each row of a weight.

    W: (d_out, d_in), as nn.Linear stores it   returns (d_out,)
    """
    return torch.linalg.vector_norm(W, dim=1)


def dora_gain(m, norm):
    """What each row is multiplied by: m / norm, and 1 where the norm is 0.

    m, norm: (d_out,)   returns (d_out,); the norm is a constant for the gradient, and m's is 0 where the norm is 0
    """
    norm = norm.detach()
    zero = norm == 0
    return torch.where(zero, 1.0, m / norm.masked_fill(zero, 1.0))  # no division by 0, not even in the gradient


def dora_weight(W, A, B, alpha, m):
    """The adapted weight: every row of W + (alpha / r) B A, brought to the length in m.

    W: (d_out, d_in)   A: (r, d_in)   B: (d_out, r)   m: (d_out,)
    returns (d_out, d_in); the norm is a constant for the gradient
    """
    direction = W + lora_delta(A, B, alpha)
    return dora_gain(m, dora_magnitude(direction))[:, None] * direction


@torch.no_grad()
def dora_norm(W, A, B, scale, w_sq=None):
    """The row norms of W + scale B A, without the (d_out, d_in) product B A:

        |W + s B A|^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B)

    W: (d_out, d_in)   A: (r, d_in)   B: (d_out, r)   w_sq: (d_out,), |W|^2 by row, if it is known
    returns (d_out,) without a gradient, in float32 or wider; rounding that makes a square negative makes it 0
    """
    wide = torch.promote_types(W.dtype, torch.float32)
    A, B = A.to(wide), B.to(wide)
    if w_sq is None:
        w_sq = squared_rows(W)
    WA = torch.cat([rows.to(wide) @ A.T for rows in W.split(1024)])  # (d_out, r); no wide copy of the whole W
    cross = (WA * B).sum(1)
    square = ((B @ (A @ A.T)) * B).sum(1)
    return (w_sq + 2 * scale * cross + scale**2 * square).clamp(min=0).sqrt()


@torch.no_grad()
def squared_rows(W):
    """|W|^2 by row, (d_out,), without a gradient, in float32 or wider."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32)).square()


def dora_forward(x, W, A, B, alpha, m, bias=None):
    """Output of a DoRA linear layer: LoRA's, each feature multiplied by its gain. The bias is not multiplied.

    x: (..., d_in)   W: (d_out, d_in)   A: (r, d_in)   B: (d_out, r)   m: (d_out,)   bias: (d_out,) or None
    returns (..., d_out), in x's dtype
    """
    gain = dora_gain(m, dora_norm(W, A, B, alpha / A.shape[0]))
    y = gain.to(x.dtype) * lora_forward(x, W, A, B, alpha)
    return y if bias is None else y + bias.to(x.dtype)


def dora_merge(W, A, B, alpha, m):
    """The adapted weight in W's dtype: computed in float32 and rounded once.

    W: (d_out, d_in), any float dtype   A: (r, d_in)   B: (d_out, r)   m: (d_out,)   returns a new (d_out, d_in)
    """
    return dora_weight(W.float(), A.float(), B.float(), alpha, m.float()).to(W.dtype)


def dora_num_params(shapes, r):
    """How many numbers DoRA trains.

    shapes: the (d_out, d_in) of each adapted weight   r: rank
    returns LoRA's count plus the sum of d_out, an int
    """
    return lora_num_params(shapes, r) + sum(d_out for d_out, _ in shapes)


def scale_columns(t, gain):
    """t * gain, taken as t + t (gain - 1): in bfloat16 a gain near 1 would be rounded to steps of 0.4 %.

    t: (..., d)   gain: (d,), any dtype   returns (..., d) in t's dtype
    """
    return torch.addcmul(t, t, (gain - 1).to(t.dtype))


def column_dots(a, b, dtype):
    """The sum over rows of a * b, taken in `dtype`, some rows at a time: no product as large as a is made.

    a, b: (n, d)   returns (d,)
    """
    if torch.compiler.is_compiling():  # it makes no product either, and would make a graph for every n
        return (a.to(dtype) * b).sum(0)
    rows = max(256, -(-a.shape[0] // 8))
    return sum((some.to(dtype) * others).sum(0) for some, others in zip(a.split(rows), b.split(rows), strict=True))


class DoRAFunction(torch.autograd.Function):
    """A DoRA linear layer that keeps x and its output before the gain for the backward pass, and nothing else so large.

    apply(x, W, bias, A, B, gain, scale, mask, keep, whole) -> (..., d_out)
    gain: (d_out,)   scale: alpha / r   mask: ones and zeros of x's shape, or None   keep: 1 - p of the dropout
    whole: True drops x for all that the adapter adds, False for s B A alone
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, gain, scale, mask, keep, whole):
        kept = x if mask is None else (x * mask).div_(keep)
        seen = kept if whole else x  # what is multiplied with W and the gain
        same_W = W.to(x.dtype)
        core = F.linear(seen, same_W)  # (..., d_out)
        narrow = F.linear(kept, A.to(x.dtype))  # (..., r)
        core.view(-1, core.shape[-1]).addmm_(narrow.view(-1, narrow.shape[-1]), B.to(x.dtype).T, alpha=scale)
        y = scale_columns(core, gain)
        if seen is not x:  # W x + (g - 1) W x' is W (x - x') + g W x'
            y.view(-1, y.shape[-1]).addmm_((x - kept).reshape(-1, x.shape[-1]), same_W.T)
        if bias is not None:
            y += bias.to(x.dtype)
        ctx.save_for_backward(x, W, A, B, gain, core, mask)
        ctx.scale, ctx.keep, ctx.whole = scale, keep, whole
        return y

    @staticmethod
    @once_differentiable  # core is made here: to differentiate twice, set `fast` to False
    def backward(ctx, grad):
        x, W, A, B, gain, core, mask = ctx.saved_tensors
        shape, dtype = x.shape, x.dtype
        grad, x, core, mask = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (grad, x, core, mask))
        W, A, B = W.to(dtype), A.to(dtype), B.to(dtype)
        needs_x, needs_W, needs_bias = ctx.needs_input_grad[:3]
        grad_core = scale_columns(grad, gain)
        if ctx.whole and mask is not None:
            seen = (x * mask).div_(ctx.keep)
            dx, dA, dB = lora_backward(grad_core, seen, W if needs_x else None, A, B, ctx.scale)
            if needs_x:
                plain = grad @ W  # what reaches x beside the dropout: mask / keep of it is in dx already
                dx = plain.add_(dx.sub_(plain).mul_(mask), alpha=1 / ctx.keep)
        else:
            seen = x
            dx, dA, dB = lora_backward(grad_core, x, W if needs_x else None, A, B, ctx.scale / ctx.keep, mask)
        dW = grad_core.T @ seen if needs_W else None  # only if someone unfroze the base
        if needs_W and seen is not x:
            dW += grad.T @ (x - seen)
        dbias = grad.sum(0) if needs_bias else None
        dgain = column_dots(grad, core, gain.dtype) if ctx.needs_input_grad[5] else None
        return None if dx is None else dx.view(shape), dW, dbias, dA, dB, dgain, None, None, None, None


# ------------------------------------------------------------------------------------------------- the modules

optimizer_steps = 0  # of all optimizers


def _count_step(*_):
    global optimizer_steps
    optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


class Magnitude:
    """What DoRA adds to one of LoRA's modules: m, and the norm that goes with it, computed when A, B or W has changed.

    A change is seen by a tensor's version (written in place), by its address (replaced, moved), and by any step of an
    optimizer, since some write through `.data`, which leaves neither trace. On a CPU A and B are compared by number as
    well, which costs next to nothing there and would make a GPU wait. Not seen: a frozen W written through `.data`.
    """

    def add_magnitude(self):
        self._forget()
        # m is float32 even if A and B are narrower: rounded to half precision it would move weights by up to 0.4 %
        self.m = nn.Parameter(self.norm().to(torch.promote_types(self.B.dtype, torch.float32), copy=True))

    def dense_weight(self):
        """The (d_out, d_in) weight that the norm is of. A weight that is stored in another form is unpacked here."""
        raise NotImplementedError

    def gain(self):
        """m / |W + s B A|, (d_out,), through which m gets its gradient."""
        return dora_gain(self.m, self.norm())

    def norm(self):
        """|W + s B A| by row, (d_out,), without a gradient."""
        device = "cpu" if self.A.is_meta else self.A.device.type  # autocast knows no meta device
        with torch.no_grad(), torch.autocast(device, enabled=False):
            if torch.compiler.is_compiling():  # a part of the graph, computed in every pass
                return dora_norm(self.dense_weight(), self.A, self.B, self.scale)
            with torch.inference_mode(False):  # a norm made in inference mode could not be used in training later
                return self._remembered(self.core.weight, self.A, self.B)

    def _remembered(self, stored, A, B):
        now = (stamp(stored), stored.requires_grad and optimizer_steps)
        if self._weight_stamp != now:
            self._weight_stamp, self._stamp = now, None
            self._held = stored.detach()  # so that no other weight can get its address
            self._w_sq = squared_rows(self.dense_weight())
        now = (stamp(A), stamp(B), optimizer_steps)
        if self._stamp != now or not self._same_numbers(A, B):
            self._stamp, self._norm = now, dora_norm(self.dense_weight(), A, B, self.scale, self._w_sq)
            self._A_B = [t.detach().clone() if t.device.type == "cpu" else t.detach() for t in (A, B)]
        return self._norm

    def _same_numbers(self, A, B):
        return A.device.type != "cpu" or (torch.equal(A, self._A_B[0]) and torch.equal(B, self._A_B[1]))

    def _forget(self):
        self._weight_stamp = self._stamp = self._held = self._w_sq = self._norm = self._A_B = None

    def _apply(self, fn, recurse=True):
        self._forget()  # on the way to another device or dtype: let go of the old tensors
        return super()._apply(fn, recurse)

    def __getstate__(self):  # of a copy, or a pickle
        return {k: v for k, v in self.__dict__.items() if k not in ("_held", "_w_sq", "_norm", "_A_B")}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._forget()


def stamp(t):
    """Where a tensor lies and how often it was written to."""
    return t.data_ptr(), 0 if t.is_inference() else t._version


class DoRALinear(Magnitude, LoRALinear):
    """A linear layer with a DoRA on it. base: nn.Linear or Conv1D, or a wrapper of one."""

    dropout_on = "all"

    def __init__(self, base, r, alpha, scaling="standard", dropout=0.0, init="uniform", dtype=None):
        super().__init__(base, r, alpha, scaling, dropout, init, dtype)
        self.add_magnitude()

    def dense_weight(self):
        return dense_weight(self.core)

    def adapted_forward(self, x):
        layer, scale, mask, keep = self.inner, self.scale, None, 1.0
        device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self.dropout > 0 and self.training:
            mask, keep = dropout_mask(x, self.dropout), 1 - self.dropout
        weight, whole = plain_weight(layer), self.dropout_on == "all"
        if weight is None or (not self.fast and mask is not None):
            # Of a layer with hooks, or a second adapter, the output is taken as it is.
            kept = x if mask is None else x * mask / keep
            update = scale * F.linear(F.linear(kept, self.A.to(x.dtype)), self.B.to(x.dtype))
            core = product(self.core, kept if whole else x) + update
            return layer(x) + update + core * (self.gain() - 1).to(x.dtype)
        with torch.autocast(device, enabled=False):
            if not self.fast:
                W, A, B = (t.to(x.dtype) for t in (weight, self.A, self.B))
                return dora_forward(x, W, A, B, scale * self.r, self.m, layer.bias)
            return DoRAFunction.apply(x, weight, layer.bias, self.A, self.B, self.gain(), scale, mask, keep, whole)

    def merged_tensors(self):
        """The core's weight with the update in it, stored as the core stores it."""
        merged = dora_merge(mergeable_weight(self.core), self.A, self.B, self.scale * self.r, self.m)
        return {"weight": merged.T.contiguous() if is_conv1d(self.core) else merged}

    def tensors(self):
        return super().tensors() | {"lora_magnitude_vector": self.m}


class DoRAEmbedding(Magnitude, LoRAEmbedding):
    """An embedding with a DoRA on it: y = g (W[ids] + s B A[:, ids]).

    As in PEFT it is taken for the linear layer W^T of one-hot vectors: m is (dim,), over the columns of W.
    """

    def __init__(self, base, r, alpha, scaling="standard", dropout=0.0, init="uniform", dtype=None):
        super().__init__(base, r, alpha, scaling, dropout, init, dtype)
        self.add_magnitude()

    def dense_weight(self):
        return self.core.weight.T  # (dim, vocabulary)

    def adapted_forward(self, ids):
        return scale_columns(super().adapted_forward(ids), self.gain())

    def merged_tensors(self):
        merged = dora_merge(self.dense_weight(), self.A, self.B, self.scale * self.r, self.m)
        return {"weight": merged.T.contiguous()}

    def tensors(self):
        return super().tensors() | {"lora_magnitude_vector": self.m}


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class DoRA(LoRA):
    """What to attach. Trains r (d_in + d_out) + d_out numbers per matched layer (Liu et al. 2024, arXiv:2402.09353).

    dropout_on       "all": the input of all that the adapter adds, as PEFT; "update": the input of s B A alone, which
                     halves the products with W. A file does not say which: it matters in training only.
    All other settings are LoRA's.
    """

    dropout_on: str = "all"

    linear, embedding = DoRALinear, DoRAEmbedding

    def __post_init__(self):
        super().__post_init__()
        settings.one_of("dropout_on", self.dropout_on, ("all", "update"))

    def wrap(self, module, path, dtype):
        """The wrapper for one matched module, or ValueError when there is no form for it."""
        part = super().wrap(module, path, dtype)
        part.dropout_on = self.dropout_on
        return part

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are DoRA's own."""
        return super().to_peft(adapter) | {"use_dora": True}
