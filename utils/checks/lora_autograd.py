"""Chapter 02, the backward pass: its formulas, and an autograd Function that keeps nothing but x."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from utils.checks.core import Case, Exercise, Mistake, Remark
from utils.checks.draw import low_rank, normal, pick
from utils.measure import saved_bytes
from utils.methods.lora import LoRAFunction, lora_backward

# ------------------------------------------------------------------------------------------------- lora_backward


def backward_cases(rng):
    cases = []
    for n, d_out, d_in, r, kind in (
        (6, 16, 16, 4, ""), (pick(rng, 5, 7), 9, 11, 3, ""), (pick(rng, 10, 12), 13, 8, 2, ""), (1, 7, 5, 2, ""),
        (8, 12, 10, 3, "mask"), (6, 9, 7, 2, "no W"),
    ):
        W, A, B = low_rank(rng, d_out, d_in, r)
        scale = pick(rng, 2.0, 3.0, 0.25)
        inputs = {"grad": normal(rng, n, d_out), "x": normal(rng, n, d_in), "W": W, "A": A, "B": B, "scale": scale}
        if kind == "mask":
            inputs["mask"] = torch.rand(n, d_in, generator=rng) < 0.6
        if kind == "no W":
            inputs["W"] = None
        cases.append(Case(inputs, kinds=(kind,) if kind else (), numbers={"scale": scale, "n": n}))
    return cases


def input_gradient(dx, grad, x, W, A, B, scale, mask):
    """dx with the mask on the update's part alone. The formula is linear in B, so B = 0 leaves the frozen part."""
    if W is None:
        return None
    total = dx(grad, x, W, A, B, scale)
    if mask is None:
        return total
    frozen = dx(grad, x, W, A, torch.zeros_like(B), scale)
    return frozen + mask * (total - frozen)


def gradients(dx=None, dA=None, dB=None, answer=lambda dx, dA, dB: (dx, dA, dB), into_x=input_gradient):
    """A lora_backward in which some of the three formulas are others."""
    dx = dx or (lambda g, x, W, A, B, s: g @ W + s * (g @ B @ A))
    dA = dA or (lambda g, x, W, A, B, s: s * (g @ B).T @ x)
    dB = dB or (lambda g, x, W, A, B, s: s * g.T @ (x @ A.T))

    def lora_backward(grad, x, W, A, B, scale, mask=None):
        kept = (grad, x if mask is None else x * mask, W, A, B, scale)
        return answer(into_x(dx, *kept, mask), dA(*kept), dB(*kept))

    return lora_backward


def mask_ignored(grad, x, W, A, B, scale, mask=None):
    return gradients()(grad, x, W, A, B, scale)


def mask_not_in_dx(dx, *kept_and_mask):
    return input_gradient(dx, *kept_and_mask[:-1], None)


def mask_on_all_of_dx(dx, grad, x, W, A, B, scale, mask):
    total = input_gradient(dx, grad, x, W, A, B, scale, None)
    return total if mask is None or W is None else mask * total


def w_always_there(dx, grad, x, W, A, B, scale, mask):
    update = scale * (grad @ B @ A)
    return grad @ W + (update if mask is None else mask * update)


def by_autograd(grad, x, W, A, B, scale, mask=None):
    x, A, B = (t.detach().clone().requires_grad_() for t in (x, A, B))
    kept = x if mask is None else x * mask
    y = (0 if W is None else x @ W.T) + scale * (kept @ A.T @ B.T)
    dx, dA, dB = torch.autograd.grad(y, (x, A, B), grad)
    return None if W is None else dx, dA, dB


def by_einsum(grad, x, W, A, B, scale, mask=None):
    mask = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    dA = torch.einsum("no,or,ni,ni->ri", grad, B, x, mask) * scale
    dB = torch.einsum("no,ni,ni,ri->or", grad, x, mask, A) * scale
    if W is None:
        return None, dA, dB
    return torch.einsum("no,oi->ni", grad, W) + mask * torch.einsum("no,oi->ni", grad, scale * B @ A), dA, dB


LORA_BACKWARD = Exercise(
    name="lora_backward",
    reference=lora_backward,
    cases=backward_cases,
    mistakes=(
        Mistake("no_frozen_path", gradients(dx=lambda g, x, W, A, B, s: s * (g @ B @ A)),
                "dx lacks the frozen path. W is frozen, but the gradient still flows through it to x: add grad W."),
        Mistake("only_frozen_path", gradients(dx=lambda g, x, W, A, B, s: g @ W),
                "dx lacks the path through B and A: add scale * grad B A."),
        Mistake("dx_unscaled", gradients(dx=lambda g, x, W, A, B, s: g @ W + g @ B @ A),
                "In dx the path through B and A is not multiplied by scale ({scale} here)."),
        Mistake("dx_all_scaled", gradients(dx=lambda g, x, W, A, B, s: s * (g @ W + g @ B @ A)),
                "In dx the frozen path is multiplied by scale as well. It belongs to the update alone."),
        Mistake("dA_unscaled", gradients(dA=lambda g, x, W, A, B, s: (g @ B).T @ x),
                "dA lacks the factor scale ({scale} here): y holds scale * B A x."),
        Mistake("dB_unscaled", gradients(dB=lambda g, x, W, A, B, s: g.T @ (x @ A.T)),
                "dB lacks the factor scale ({scale} here): y holds scale * B A x."),
        Mistake("unscaled", gradients(lambda g, x, W, A, B, s: g @ W + g @ B @ A,
                                      lambda g, x, W, A, B, s: (g @ B).T @ x,
                                      lambda g, x, W, A, B, s: g.T @ (x @ A.T)),
                "scale ({scale} here) appears in none of the three: y holds scale * B A x, so each has it once."),
        Mistake("AB_unscaled", gradients(None, lambda g, x, W, A, B, s: (g @ B).T @ x,
                                         lambda g, x, W, A, B, s: g.T @ (x @ A.T)),
                "dA and dB lack the factor scale ({scale} here)."),
        Mistake("scaled_twice", gradients(None, lambda g, x, W, A, B, s: s * s * (g @ B).T @ x,
                                          lambda g, x, W, A, B, s: s * s * g.T @ (x @ A.T)),
                "dA and dB hold scale twice ({scale} here). Each gradient has it once."),
        Mistake("swapped", gradients(answer=lambda dx, dA, dB: (dx, dB, dA)),
                "dA and dB are swapped. The order is dx, dA, dB."),
        Mistake("transposed", gradients(answer=lambda dx, dA, dB: (dx, dA.T, dB.T)),
                "dA and dB are transposed. A gradient has the shape of its parameter: (r, d_in) and (d_out, r)."),
        Mistake("dB_from_x", gradients(dB=lambda g, x, W, A, B, s: s * g.T @ x),
                "dB is grad^T x, the gradient of a full (d_out, d_in) weight. B sees A x, not x: use x A^T."),
        Mistake("mean", gradients(None, lambda g, x, W, A, B, s: s * (g @ B).T @ x / len(x),
                                  lambda g, x, W, A, B, s: s * g.T @ (x @ A.T) / len(x)),
                "dA and dB are averaged over the tokens: 1/{n} of the expected ones, and n is {n}. grad is the "
                "gradient of the loss already; sum."),
        Mistake("dA_without_B", gradients(dA=lambda g, x, W, A, B, s: s * (x @ A.T).T @ x), None,
                "The second returned value"),
        Mistake("dx_missing", gradients(answer=lambda dx, dA, dB: (dA, dB)), None, "a tuple of 2, and a tuple of 3"),
        Mistake("mask_ignored", mask_ignored,
                "Right without dropout. With a mask, A saw mask * x: use it for dA and dB, and in dx's second term."),
        Mistake("mask_not_in_dx", gradients(into_x=mask_not_in_dx),
                "dA and dB are right with a mask, dx is not: its second term came through mask * x, so the mask "
                "multiplies it."),
        Mistake("mask_on_all_of_dx", gradients(into_x=mask_on_all_of_dx),
                "With a mask, dx is masked as a whole. The frozen path saw x itself: mask the second term only."),
        Mistake("W_always_there", gradients(into_x=w_always_there), None, "TypeError"),
        Mistake("dx_negative", gradients(dx=lambda g, x, W, A, B, s: -(g @ W + s * (g @ B @ A))), None, "wrong sign"),
    ),
    alternatives=(by_autograd, by_einsum, gradients()),
    fact="Everything was made from x, grad and the parameters: nothing else has to be kept from the forward pass.",
)

# ------------------------------------------------------------------------------------------------- LoRAFunction


def function_cases(rng):
    cases = []
    for leading, d_out, d_in, r, has_bias, kinds in (
        ((6,), 12, 12, 4, False, ()), ((pick(rng, 5, 7),), 9, 11, 3, True, ("bias",)),
        ((pick(rng, 5, 7),), 8, 14, 2, False, ("mask",)), ((2, 3), 7, 10, 2, True, ("leading", "mask", "bias")),
        ((2, 4), 10, 10, 3, False, ("leading",)),
    ):
        W, A, B = low_rank(rng, d_out, d_in, r)
        mask = torch.rand(*leading, d_in, generator=rng) < 0.6 if "mask" in kinds else None
        bias = normal(rng, d_out) if has_bias else None
        x, grad, scale = normal(rng, *leading, d_in), normal(rng, *leading, d_out), pick(rng, 2.0, 3.0, 0.25)
        inputs = {"x": x, "W": W, "bias": bias, "A": A, "B": B, "scale": scale, "mask": mask, "grad": grad}
        cases.append(Case(inputs, kinds, {"scale": scale}))
    return cases


def function_findings(attempt, x, W, bias, A, B, scale, mask, grad):
    """Output and gradients, and whether backward forms one for W, which is frozen here."""
    wanted = {"x": x, "A": A, "B": B} | ({} if bias is None else {"bias": bias})
    for tensor in wanted.values():
        tensor.requires_grad_(True)
    y = attempt.apply(x, W, bias, A, B, scale, mask)
    if not isinstance(y, torch.Tensor) or y.shape != grad.shape or not y.requires_grad:
        return {"output": y.detach() if isinstance(y, torch.Tensor) else y}
    y.backward(grad, retain_graph=True)
    found = {"output": y.detach()} | {f"gradient of {name}": tensor.grad for name, tensor in wanted.items()}
    # autograd drops a gradient that nobody wants, so ask backward itself; grad_fn is its ctx
    is_node = isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)
    of_W = attempt.backward(y.grad_fn, grad)[1] if is_node else None
    return found | {"gradient of W": of_W is not None}


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


def unscaled(found, ctx, grad):
    found[3], found[4] = found[3] / ctx.scale, found[4] / ctx.scale


def swapped(found, ctx, grad):
    found[3], found[4] = found[4], found[3]


def too_few(found, ctx, grad):
    del found[5:]


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
        kept = x if mask is None else x * mask
        narrow = kept @ A.T
        ctx.save_for_backward(kept, narrow, W, A, B, mask)
        ctx.scale = scale
        return F.linear(x, W, bias) + scale * (narrow @ B.T)

    @staticmethod
    def backward(ctx, grad):
        kept, narrow, W, A, B, mask = ctx.saved_tensors
        g, grad_B = grad.flatten(0, -2), grad @ B
        dx = grad_B @ A * ctx.scale
        dx = grad @ W + (dx if mask is None else dx * mask)
        dA = ctx.scale * grad_B.flatten(0, -2).T @ kept.flatten(0, -2)
        dbias = g.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, dA, ctx.scale * g.T @ narrow.flatten(0, -2), None, None


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
        y = torch.einsum("...i,oi->...o", x, W) + scale * torch.einsum("...i,ri,or->...o", kept, A, B)
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        x, W, A, B, mask = ctx.saved_tensors
        kept = x if mask is None else torch.where(mask, x, 0)
        low = ctx.scale * torch.einsum("...o,or->...r", grad, B)
        dx = torch.einsum("...r,ri->...i", low, A)
        dx = grad @ W + (dx if mask is None else torch.where(mask, dx, 0))
        dA = torch.einsum("...r,...i->ri", low, kept)
        dB = ctx.scale * torch.einsum("...o,...i,ri->or", grad, kept, A)
        return dx, None, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None, dA, dB, None, None


class InNewStyle(torch.autograd.Function):
    """With setup_context, and no second derivative."""

    @staticmethod
    def forward(x, W, bias, A, B, scale, mask):
        kept = x if mask is None else x * mask
        return F.linear(x, W, bias) + scale * F.linear(F.linear(kept, A), B)

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
    mistakes=(
        Mistake("mask_forgotten", ForgetsMask,
                "The forward pass is right and backward forgets the mask. Where x was masked, the update saw zeros: "
                "dA and dB see mask * x, and the update's part of dx is masked too."),
        Mistake("mask_on_base", MaskOnBase,
                "The mask reaches the frozen path. Dropout belongs to the LoRA branch alone; x W^T sees the whole x."),
        Mistake("mask_ignored", MaskIgnored,
                "The mask has no effect. The LoRA branch should see x * mask."),
        Mistake("bias_forgotten", BiasForgotten, "bias is not added. It may be None; when it is not, it belongs to y."),
        Mistake("scale_forgotten", ScaleForgotten, "scale ({scale} here) is not used: y is x W^T + scale * B A x."),
        Mistake("gradients_unscaled", altered(unscaled),
                "The output is right; dA and dB lack the factor scale ({scale} here)."),
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
               attempts=(Keeps, KeepsOnCtx)),
    ),
    explain={
        "gradient of W": "backward forms a gradient for W, which is frozen: a product as large as W, thrown away. "
        "Return None in its place, or ask ctx.needs_input_grad[1] first.",
        "incorrect number of gradients": "One value for each argument of forward, seven here: None where nothing is "
        "trained.",
        "different than None": "When bias is None its gradient is None too: ask ctx.needs_input_grad[2].",
        "invalid gradient": "The gradients come in the order of forward's arguments, each in the shape of its own.",
    },
    kinds={
        "mask": "Right without a mask and wrong with one. The mask is on the input of the LoRA branch alone, in both "
        "passes.",
        "bias": "Right without a bias and wrong with one. bias is added to y; its gradient is grad summed over the "
        "tokens.",
    },
    fact="Beyond x, the parameters and the mask, one byte per entry, it keeps nothing. nn.Dropout under autograd keeps "
    "a mask, the masked copy of x, and x A^T.",
)

EXERCISES = (LORA_BACKWARD, LORA_FUNCTION)
