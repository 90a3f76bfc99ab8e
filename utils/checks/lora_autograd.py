"""Chapter 02, an autograd Function that keeps nothing but x."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from utils.checks.core import Case, Exercise, Mistake, Remark
from utils.checks.draw import low_rank, normal, pick
from utils.measure import saved_bytes
from utils.methods.lora import LoRAFunction, lora_backward


def function_cases(rng):
    cases = []
    for leading, d_out, d_in, r, kinds in (
        ((6,), 12, 12, 4, ()), ((pick(rng, 5, 7),), 9, 11, 3, ("bias",)), ((pick(rng, 5, 7),), 8, 14, 2, ("mask",)),
        ((2, 3), 7, 10, 2, ("leading", "mask", "bias")), ((2, 4), 10, 10, 3, ("leading",)),
        ((5,), 9, 6, 2, ("W trained",)), ((4,), 8, 11, 3, ("mixed",)),
    ):
        W, A, B = low_rank(rng, d_out, d_in, r)
        mask = torch.rand(*leading, d_in, generator=rng) < 0.6 if "mask" in kinds else None
        bias = normal(rng, d_out) if "bias" in kinds else None
        x, grad, scale = normal(rng, *leading, d_in), normal(rng, *leading, d_out), pick(rng, 2.0, 3.0, 0.25)
        if "mixed" in kinds:
            x, W, grad = x.bfloat16(), W.bfloat16(), grad.bfloat16()
        W.requires_grad_("W trained" in kinds)
        inputs = {"x": x, "W": W, "bias": bias, "A": A, "B": B, "scale": scale, "mask": mask, "grad": grad}
        cases.append(Case(inputs, kinds, {"scale": scale}, later="W trained" in kinds or "mixed" in kinds))
    return cases


def function_findings(attempt, x, W, bias, A, B, scale, mask, grad):
    """Output and gradients; where W is frozen, whether backward forms one for it all the same."""
    wanted = {"x": x, "A": A, "B": B} | ({} if bias is None else {"bias": bias}) | ({"W": W} if W.requires_grad else {})
    for tensor in wanted.values():
        tensor.requires_grad_(True)
    y = attempt.apply(x, W, bias, A, B, scale, mask)
    if not isinstance(y, torch.Tensor) or y.shape != grad.shape or not y.requires_grad:
        return {"output": y.detach() if isinstance(y, torch.Tensor) else y}
    found = {"output": y.detach(), "dtype of the output": str(y.dtype)}
    if y.dtype != x.dtype:
        return found
    y.backward(grad, retain_graph=True)
    for name, tensor in wanted.items():  # in x's dtype, the coarsest, for the tolerance
        found[f"gradient of {name}"] = None if tensor.grad is None else tensor.grad.to(x.dtype)
    # autograd drops a gradient that nobody wants, so ask backward itself; grad_fn is its ctx
    is_node = isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
    of_W = attempt.backward(y.grad_fn, grad)[1] if is_node and not W.requires_grad else None
    return found | {"unwanted gradient of W": of_W is not None}


def output_alone(attempt, *inputs):
    """What forward returns, for an attempt whose backward is not written yet."""
    y = attempt.apply(*inputs[:-1])
    return y.detach() if isinstance(y, torch.Tensor) else y


def keeps_more(attempt):
    """Whether anything is kept for the backward pass besides x, the parameters and the mask."""
    rng = torch.Generator().manual_seed(0)
    W, A, B = low_rank(rng, 48, 64, 4)
    x, bias = normal(rng, 3, 5, 64), normal(rng, 48)
    for tensor in (x, A, B, bias):
        tensor.requires_grad_(True)
    for mask in (None, x > 0):
        present = [x, W, bias, A, B] if mask is None else [x, W, bias, A, B, mask]
        if saved_bytes(lambda m=mask: attempt.apply(x, W, bias, A, B, 2.0, m), present) > 0:
            return True
        node = attempt.apply(x, W, bias, A, B, 2.0, mask).grad_fn
        on_ctx = getattr(node, "__dict__", {}).values()  # past save_for_backward
        if any(isinstance(value, torch.Tensor) and all(value is not t for t in present) for value in on_ctx):
            return True
    return False


class ForgetsMask(LoRAFunction):
    @staticmethod
    def backward(ctx, grad):
        x, W, A, B, _ = ctx.saved_tensors
        g, rows = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        dx, dA, dB = lora_backward(g, rows, W, A, B, ctx.scale)
        return dx.view_as(x), None, g.sum(0) if ctx.needs_input_grad[2] else None, dA, dB, None, None


class MaskOnBase(LoRAFunction):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        y = LoRAFunction.forward(ctx, x, W, bias, A, B, scale, mask)
        return y if mask is None else y + F.linear(x * mask - x, W)


class MaskIgnored(LoRAFunction):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        return LoRAFunction.forward(ctx, x, W, bias, A, B, scale, None)


class BiasForgotten(LoRAFunction):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        return LoRAFunction.forward(ctx, x, W, None, A, B, scale, mask)


class BaseAlone(LoRAFunction):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        return LoRAFunction.forward(ctx, x, W, bias, A, B, 0.0, mask)


class ScaleForgotten(LoRAFunction):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        return LoRAFunction.forward(ctx, x, W, bias, A, B, 1.0, mask)


def altered(change):
    """LoRAFunction with `change(gradients, ctx, grad)` applied to the list that backward returns."""

    class Altered(LoRAFunction):
        @staticmethod
        def backward(ctx, grad):
            found = list(LoRAFunction.backward(ctx, grad))
            change(found, ctx, grad)
            return tuple(found)

    return Altered


def for_W(found, ctx, grad):
    x = ctx.saved_tensors[0]
    found[1] = grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def no_bias(found, ctx, grad):
    found[2] = None


def always_bias(found, ctx, grad):
    found[2] = grad.flatten(0, -2).sum(0)


def never_for_W(found, ctx, grad):
    found[1] = None


def W_transposed(found, ctx, grad):
    found[1] = None if found[1] is None else found[1].T


def unscaled(found, ctx, grad):
    found[3], found[4] = found[3] / ctx.scale, found[4] / ctx.scale


def unscaled_x(found, ctx, grad):
    frozen = grad @ ctx.saved_tensors[1]
    found[0] = frozen + (found[0] - frozen) / ctx.scale


def all_unscaled(found, ctx, grad):
    unscaled(found, ctx, grad)
    unscaled_x(found, ctx, grad)


def swapped(found, ctx, grad):
    found[3], found[4] = found[4], found[3]


def too_few(found, ctx, grad):
    del found[5:]


class CastInForwardOnly(LoRAFunction):
    @staticmethod
    def backward(ctx, grad):
        x, W, A, B, mask = ctx.saved_tensors
        g, rows, mask = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (grad, x, mask))
        dx, dA, dB = lora_backward(g, rows, W, A, B, ctx.scale, mask)
        dW = g.T @ rows if ctx.needs_input_grad[1] else None
        return dx.view_as(x), dW, g.sum(0) if ctx.needs_input_grad[2] else None, dA, dB, None, None


class CastNowhere(CastInForwardOnly):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        ctx.save_for_backward(x, W, A, B, mask)
        ctx.scale = scale
        kept = x if mask is None else x * mask
        return F.linear(x, W, bias) + scale * F.linear(F.linear(kept, A), B)


class InFloat32(LoRAFunction):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        return LoRAFunction.forward(ctx, x, W, bias, A, B, scale, mask).float()


class ChangesX(LoRAFunction):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        y = LoRAFunction.forward(ctx, x.clone(), W, bias, A, B, scale, mask)
        if mask is not None:
            x *= mask
        return y


class Keeps(torch.autograd.Function):
    """Right, and wasteful: keeps the masked copy of x and x A^T."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        A, B = A.to(x.dtype), B.to(x.dtype)
        kept = x if mask is None else x * mask
        narrow = kept @ A.T
        ctx.save_for_backward(x, kept, narrow, W, A, B, mask)
        ctx.scale = scale
        return F.linear(x, W, bias) + scale * (narrow @ B.T)

    @staticmethod
    def backward(ctx, grad):
        x, kept, narrow, W, A, B, mask = ctx.saved_tensors
        g, grad_B = grad.flatten(0, -2), grad @ B
        dx = grad_B @ A * ctx.scale
        dx = grad @ W + (dx if mask is None else dx * mask)
        dA = ctx.scale * grad_B.flatten(0, -2).T @ kept.flatten(0, -2)
        dW = g.T @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
        dbias = g.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dW, dbias, dA, ctx.scale * g.T @ narrow.flatten(0, -2), None, None


class KeepsOnCtx(LoRAFunction):
    """Right, and wasteful behind autograd's back: a copy of x as an attribute of ctx."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        ctx.copy = x.clone()
        return LoRAFunction.forward(ctx, x, W, bias, A, B, scale, mask)


class WithEinsum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        ctx.save_for_backward(x, W, A, B, mask)
        ctx.scale = scale
        kept = x if mask is None else torch.where(mask, x, 0)
        update = torch.einsum("...i,ri,or->...o", kept, A.to(x.dtype), B.to(x.dtype))
        y = torch.einsum("...i,oi->...o", x, W) + scale * update
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        x, W, A, B, mask = ctx.saved_tensors
        A, B = A.to(x.dtype), B.to(x.dtype)
        kept = x if mask is None else torch.where(mask, x, 0)
        low = ctx.scale * torch.einsum("...o,or->...r", grad, B)
        dx = torch.einsum("...r,ri->...i", low, A)
        dx = grad @ W + (dx if mask is None else torch.where(mask, dx, 0))
        dW = torch.einsum("...o,...i->oi", grad, x) if ctx.needs_input_grad[1] else None
        dA = torch.einsum("...r,...i->ri", low, kept)
        dB = ctx.scale * torch.einsum("...o,...i,ri->or", grad, kept, A)
        return dx, dW, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, dA, dB, None, None


class InNewStyle(torch.autograd.Function):
    """With setup_context, and no second derivative."""

    @staticmethod
    def forward(x, W, bias, A, B, scale, mask):
        kept = x if mask is None else x * mask
        return F.linear(x, W, bias) + scale * F.linear(F.linear(kept, A.to(x.dtype)), B.to(x.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, _, A, B, ctx.scale, mask = inputs
        ctx.save_for_backward(x, W, A, B, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return WithEinsum.backward(ctx, grad)


LORA_FUNCTION = Exercise(
    name="LoRAFunction",
    reference=LoRAFunction,
    cases=function_cases,
    call=function_findings,
    first=output_alone,
    mistakes=(
        Mistake("mask_forgotten", ForgetsMask,
                "The forward pass is right and backward forgets the mask. Where x was masked, the update saw zeros: "
                "dA and dB see mask * x, and the update's part of dx is masked too."),
        Mistake("mask_on_base", MaskOnBase,
                "The mask reaches the frozen path. Dropout belongs to the LoRA branch alone; x W^T sees the whole x."),
        Mistake("mask_ignored", MaskIgnored,
                "The mask has no effect. The LoRA branch should see x * mask."),
        Mistake("bias_forgotten", BiasForgotten, "bias is not added. It may be None; when it is not, it belongs to y."),
        Mistake("base_alone", BaseAlone, "Your output is the frozen path alone. Add scale * B A x."),
        Mistake("scale_forgotten", ScaleForgotten, "scale ({scale} here) is not used: y is x W^T + scale * B A x."),
        Mistake("gradients_unscaled", altered(unscaled),
                "The output is right; dA and dB lack the factor scale ({scale} here)."),
        Mistake("x_gradient_unscaled", altered(unscaled_x),
                "The output is right; the update's part of dx lacks the factor scale ({scale} here)."),
        Mistake("all_unscaled", altered(all_unscaled),
                "The output is right; backward forgets the factor scale ({scale} here): dA, dB and the update's part "
                "of dx each have it once. Keep it with ctx.scale = scale."),
        Mistake("never_for_W", altered(never_for_W),
                "W was trained here and got no gradient: ctx.needs_input_grad[1] tells when."),
        Mistake("W_transposed", altered(W_transposed), None, "each in the shape of its own"),
        Mistake("cast_in_forward_only", CastInForwardOnly, None, "cast A and B to x's dtype there too"),
        Mistake("cast_nowhere", CastNowhere, None, "Works in one dtype."),
        Mistake("in_float32", InFloat32,
                "Right in float32. With x in bfloat16 and A, B in float32, your output is float32: return x's dtype."),
        Mistake("gradient_for_W", altered(for_W), None, "backward forms a gradient for W"),
        Mistake("no_bias_gradient", altered(no_bias), None, "its gradient is grad summed over the tokens"),
        Mistake("always_bias_gradient", altered(always_bias), None, "When bias is None its gradient is None"),
        Mistake("gradients_swapped", altered(swapped), None, "returned an invalid gradient"),
        Mistake("too_few", altered(too_few), None, "One value for each argument of forward"),
        Mistake("changes_x", ChangesX, None, "Your function changed x"),
    ),
    alternatives=(WithEinsum, InNewStyle),
    remarks=(
        Remark("lean",
               "Right numbers, but you keep more for the backward pass than x, the parameters and the mask: a masked "
               "copy of x, or x A^T. Form it again in backward; x is kept anyway.",
               keeps_more,
               fact="Nothing is kept for the backward pass but x, the parameters and the mask.",
               attempts=(Keeps, KeepsOnCtx)),
    ),
    explain={
        "unwanted gradient of W": "backward forms a gradient for W, which is frozen: a product as large as W, thrown "
        "away. Return None in its place, or ask ctx.needs_input_grad[1] first.",
        "incorrect number of gradients": "One value for each argument of forward, seven here: None where nothing is "
        "trained.",
        "different than None": "When bias is None its gradient is None too: ask ctx.needs_input_grad[2].",
        "invalid gradient": "The gradients come in the order of forward's arguments, each in the shape of its own.",
    },
    kinds={
        "mixed": "Works in one dtype. With x in bfloat16 and A, B in float32, cast A and B to x's dtype in forward; "
        "the backward pass meets both again: cast A and B to x's dtype there too.",
        "W trained": "Right while W is frozen. Here it is trained: where ctx.needs_input_grad[1] says so, its gradient "
        "is that of any linear layer, (d_out, d_in).",
        "mask": "Right without a mask and wrong with one. The mask is on the input of the LoRA branch alone, in both "
        "passes.",
        "bias": "Right without a bias and wrong with one. bias is added to y; its gradient is grad summed over the "
        "tokens.",
    },
    fact="Beyond x, the parameters and the mask, one byte per entry, it keeps nothing. The plain formula with dropout "
    "keeps a mask, the masked copy of x, and x A^T.",
)

EXERCISES = (LORA_FUNCTION,)
