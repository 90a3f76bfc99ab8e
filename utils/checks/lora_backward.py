"""Chapter 02, the formulas of the backward pass."""

import torch

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import low_rank, normal, pick
from utils.methods.lora import lora_backward


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
        Mistake("W_always_there", gradients(into_x=w_always_there),
                "W may be None, when x needs no gradient: then return None for dx."),
        Mistake("dx_negative", gradients(dx=lambda g, x, W, A, B, s: -(g @ W + s * (g @ B @ A))), None, "wrong sign"),
    ),
    alternatives=(by_autograd, by_einsum, gradients(),
                  gradients(dx=lambda g, x, W, A, B, s: g @ W + s * (g @ (B @ A)))),
    kinds={"no W": "W may be None, when x needs no gradient: then return None for dx, and dA and dB as ever."},
    fact="Everything was made from x, grad and the parameters: nothing else has to be kept from the forward pass.",
)

EXERCISES = (LORA_BACKWARD,)
