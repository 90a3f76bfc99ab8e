"""Chapter 02, the equations of LoRA: scale, update, forward pass, counting. The other exercises are in lora_*.py."""

import math

import torch
import torch.nn.functional as F

from utils.checks import lora_autograd, lora_backward, lora_freezing, lora_init, lora_merge, lora_targets
from utils.checks.core import Case, Exercise, Mistake, Remark
from utils.checks.draw import layers, low_rank, normal, pick
from utils.measure import peak_new_tensor
from utils.methods import lora

# ------------------------------------------------------------------------------------------------- lora_scale


def scale_cases(rng):
    drawn = [(16, 8), (16, 8, "standard"), (3, 8, "standard"), (pick(rng, 1, 24, 40), 5), (32, 16, "rslora"),
             (pick(rng, 1, 24, 40), pick(rng, 3, 6), "rslora")]
    named = [dict(zip(("alpha", "r", "scaling"), values, strict=False)) for values in drawn]
    unknown = {"alpha": 16, "r": 8, "scaling": pick(rng, "rsLORA", "sqrt")}
    return [Case(n, numbers={"alpha": n["alpha"], "r": n["r"]}) for n in named] + [
        Case(unknown, kinds=("unknown",), numbers={"scaling": unknown["scaling"]}, later=True)
    ]


def scale_by_table(alpha, r, scaling="standard"):
    powers = {"standard": 1.0, "rslora": 0.5}
    if scaling not in powers:
        raise ValueError("no such scaling")
    return alpha * r ** -powers[scaling]


def unknown_accepted(alpha, r, scaling="standard"):
    return alpha / math.sqrt(r) if scaling == "rslora" else alpha / r


def with_rule(standard, rslora):
    """A lora_scale with other formulas in it."""

    def lora_scale(alpha, r, scaling="standard"):
        if scaling not in ("standard", "rslora"):
            raise ValueError(scaling)
        return standard(alpha, r) if scaling == "standard" else rslora(alpha, r)

    return lora_scale


def standard_rule(alpha, r):
    return alpha / r


def root_rule(alpha, r):
    return alpha / math.sqrt(r)


ROOT_OF_R = "Under rslora the root is of r alone: alpha / sqrt(r). With alpha = {alpha} and r = {r} that is {expected}."

LORA_SCALE = Exercise(
    name="lora_scale",
    reference=lora.lora_scale,
    cases=scale_cases,
    mistakes=(
        Mistake("always_root", with_rule(root_rule, root_rule),
                "You divide by sqrt(r) under both rules. That is rsLoRA; the standard rule is alpha / r."),
        Mistake("rule_ignored", with_rule(standard_rule, standard_rule),
                'You divide by r under both rules. scaling="rslora" asks for alpha / sqrt(r).'),
        Mistake("rules_swapped", with_rule(root_rule, standard_rule),
                "The two rules are swapped: standard is alpha / r, rslora is alpha / sqrt(r)."),
        Mistake("product", with_rule(lambda a, r: a * r, lambda a, r: a * math.sqrt(r)),
                "You multiplied by the rank where the scale divides by it: with r = {r} yours is {yours}, not "
                "{expected}."),
        Mistake("upside_down", with_rule(lambda a, r: r / a, lambda a, r: math.sqrt(r) / a),
                "Upside down: alpha is the numerator. With alpha = {alpha} and r = {r} the scale is {expected}."),
        Mistake("root_of_both", with_rule(standard_rule, lambda a, r: math.sqrt(a / r)), ROOT_OF_R),
        Mistake("root_of_alpha", with_rule(standard_rule, lambda a, r: math.sqrt(a) / r), ROOT_OF_R),
        Mistake("whole_division", with_rule(lambda a, r: a // r, root_rule),
                "// drops the fraction: alpha = {alpha} with r = {r} gives {yours} where {expected} is meant. Use /."),
        Mistake("unknown_accepted", unknown_accepted,
                "scaling={scaling!r} is no rule, and went through as if it were the standard one. A typing error would "
                "train silently at another scale: raise ValueError."),
        Mistake("no_alpha", with_rule(lambda a, r: 1 / r, lambda a, r: 1 / math.sqrt(r)), None, "is 1/alpha, and"),
        Mistake("key_error",
                lambda alpha, r, scaling="standard": alpha * {"standard": 1 / r, "rslora": r**-0.5}[scaling],
                None, "ValueError is expected, and yours raised KeyError"),
    ),
    alternatives=(with_rule(standard_rule, lambda a, r: a * r**-0.5), scale_by_table),
    fact="From r = 8 to r = 128 at a fixed alpha the standard scale falls 16-fold, rsLoRA's 4-fold.",
)

# ------------------------------------------------------------------------------------------------- lora_delta


def delta_cases(rng):
    drawn = [(*layer, torch.float32) for layer in layers(rng)]
    drawn += [(12, 9, 4, 24, ("rectangular", "bf16"), torch.bfloat16)]
    cases = []
    for d_out, d_in, r, alpha, kinds, dtype in drawn:
        _, A, B = low_rank(rng, d_out, d_in, r, dtype)
        cases.append(Case({"A": A, "B": B, "alpha": alpha}, kinds, {"r": r, "alpha": alpha, "d_in": d_in}))
    return cases


LORA_DELTA = Exercise(
    name="lora_delta",
    reference=lora.lora_delta,
    cases=delta_cases,
    grads=("A", "B"),
    mistakes=(
        Mistake("no_scale", lambda A, B, alpha: B @ A,
                "You returned B A alone. The factor alpha / r is missing: here {alpha} / {r}."),
        Mistake("no_rank", lambda A, B, alpha: alpha * B @ A,
                "Your update is exactly {r} times the expected one, and r is {r}: the 1/r is missing."),
        Mistake("no_alpha", lambda A, B, alpha: B @ A / A.shape[0],
                "Your update is 1/{alpha} of the expected one, and alpha is {alpha}: alpha is missing."),
        Mistake("root", lambda A, B, alpha: alpha / math.sqrt(A.shape[0]) * B @ A,
                "You scaled by alpha / sqrt(r). That is rsLoRA (chapter 4); the paper's rule is alpha / r."),
        Mistake("upside_down", lambda A, B, alpha: A.shape[0] / alpha * B @ A,
                "You scaled by r / alpha: upside down. Here the factor is {alpha} / {r}."),
        Mistake("rank_from_d_in", lambda A, B, alpha: alpha / A.shape[1] * B @ A,
                "You divided by A.shape[1], which is d_in ({d_in}). A is (r, d_in): the rank is its other axis."),
        Mistake("rank_from_d_out", lambda A, B, alpha: alpha / B.shape[0] * B @ A,
                "You divided by B.shape[0], which is d_out. B is (d_out, r): the rank is its other axis."),
        Mistake("transposed", lambda A, B, alpha: alpha / A.shape[0] * A.T @ B.T,
                "That is the transpose, (d_in, d_out). The update is added to W, which is (d_out, d_in): B comes "
                "first."),
        Mistake("order", lambda A, B, alpha: alpha / A.shape[0] * A @ B,
                "A @ B runs only when the layer is square, and is (r, r) then. Write the shapes side by side: "
                "(d_out, r) times (r, d_in)."),
        Mistake("entrywise_shape", lambda A, B, alpha: (alpha / A.shape[0] * B @ A).flatten(), None, "Wrong shape"),
        Mistake("detached", lambda A, B, alpha: alpha / A.shape[0] * B @ A.detach(), None, "no gradient reaches A."),
        Mistake("detached_B", lambda A, B, alpha: alpha / A.shape[0] * B.detach() @ A, None, "no gradient reaches B."),
        Mistake("in_place", lambda A, B, alpha: B.mul_(alpha / A.shape[0]) @ A, None, "Your function changed B"),
        Mistake("in_float32", lambda A, B, alpha: alpha / A.shape[0] * B.float() @ A.float(), None,
                "wrong dtype: A is bfloat16, you returned float32"),
    ),
    alternatives=(
        lambda A, B, alpha: torch.einsum("or,ri->oi", B * (alpha / A.shape[0]), A),
        lambda A, B, alpha: (A.T @ B.T).T * alpha / B.shape[1],
        lambda A, B, alpha: sum(torch.outer(b, a) for b, a in zip(B.T, A, strict=True)) * (alpha / len(A)),
    ),
    fact="Whatever A and B hold, its rank is at most r: a 4096 x 4096 update at r = 8 is made of "
    f"{8 * (4096 + 4096):,} numbers instead of {4096 * 4096:,}.",
)

# ------------------------------------------------------------------------------------------------- lora_forward


def forward_cases(rng):
    (square, narrow, wide), f32 = layers(rng), torch.float32
    drawn = [
        (square, (6,), f32, ()), (narrow, (4,), f32, ()), (wide, (pick(rng, 3, 9),), f32, ()),
        (square, (2, 2, 3), f32, ("leading",)), (wide, (2, pick(rng, 3, 4)), f32, ("leading",)),
        (narrow, (), f32, ("vector",)), ((12, 9, 4, 24, ("rectangular",)), (5,), torch.bfloat16, ("bf16",)),
    ]
    cases = []
    for (d_out, d_in, r, alpha, shape_kinds), leading, dtype, kinds in drawn:
        W, A, B = low_rank(rng, d_out, d_in, r, dtype)
        x = normal(rng, *leading, d_in, dtype=dtype)
        numbers = {"r": r, "alpha": alpha, "layer": f"({d_out}, {d_in})"}
        cases.append(Case({"x": x, "W": W, "A": A, "B": B, "alpha": alpha}, (*shape_kinds, *kinds), numbers))
    return cases


def forms_the_matrix(attempt):
    """Whether the attempt makes a tensor as large as W, on a layer where nothing else comes near."""
    W, A, B = low_rank(torch.Generator().manual_seed(0), 48, 64, 2)
    largest, _ = peak_new_tensor(lambda: attempt(torch.ones(2, 64), W, A, B, 4))
    return largest >= W.nbytes


def linear_twice(x, W, A, B, alpha):
    return F.linear(x, W) + F.linear(F.linear(x, A), B) * (alpha / A.shape[0])


def by_einsum(x, W, A, B, alpha):
    update = torch.einsum("...i,ri,or->...o", x, A, B)
    return torch.einsum("...i,oi->...o", x, W) + update * alpha / len(A)


def by_addmm(x, W, A, B, alpha):
    rows = x.reshape(-1, x.shape[-1])
    y = torch.addmm(rows @ W.T, rows @ A.T, B.T, alpha=alpha / A.shape[0])
    return y.reshape(*x.shape[:-1], W.shape[0])


def delta_formed(x, W, A, B, alpha):
    return x @ (W + alpha / A.shape[0] * (B @ A)).T


def in_place(x, W, A, B, alpha):
    W += alpha / A.shape[0] * (B @ A)
    return x @ W.T


def without_gradient(x, W, A, B, alpha):
    with torch.no_grad():
        return linear_twice(x, W, A, B, alpha)


def two_axes_only(x, W, A, B, alpha):
    n, d_in = x.shape
    return torch.addmm(x @ W.T, x @ A.T, B.T, alpha=alpha / A.shape[0])


ONLY_SQUARE = (
    "This runs only when the layer is square; on {layer} it fails. PyTorch stores W as (d_out, d_in): "
    "which axis does x meet?"
)

ROWS = "Each row of x is one vector: W x becomes x @ W.T in code."

LORA_FORWARD = Exercise(
    name="lora_forward",
    reference=lora.lora_forward,
    cases=forward_cases,
    grads=("A", "B", "x"),
    base=lambda x, W, A, B, alpha: x @ W.T,
    mistakes=(
        Mistake("no_rank", lambda x, W, A, B, alpha: x @ W.T + alpha * (x @ A.T @ B.T),
                "Your update is exactly {r} times the expected one, and r is {r}: the 1/r is missing."),
        Mistake("no_alpha", lambda x, W, A, B, alpha: x @ W.T + (x @ A.T @ B.T) / A.shape[0],
                "Your update is 1/{alpha} of the expected one, and alpha is {alpha}: alpha is missing."),
        Mistake("no_scale", lambda x, W, A, B, alpha: x @ W.T + x @ A.T @ B.T,
                "You added B A x alone. The factor alpha / r is missing: here {alpha} / {r}."),
        Mistake("root", lambda x, W, A, B, alpha: x @ W.T + alpha / math.sqrt(A.shape[0]) * (x @ A.T @ B.T),
                "You scaled by alpha / sqrt(r). That is rsLoRA (chapter 4); eq. 3 uses alpha / r."),
        Mistake("upside_down", lambda x, W, A, B, alpha: x @ W.T + A.shape[0] / alpha * (x @ A.T @ B.T),
                "You scaled by r / alpha: upside down. Here the factor is {alpha} / {r}."),
        Mistake("scaled_twice", lambda x, W, A, B, alpha: alpha / A.shape[0] * (x @ W.T + x @ A.T @ B.T),
                "The factor alpha / r multiplies the frozen path as well. It belongs to the update alone."),
        Mistake("columns", lambda x, W, A, B, alpha: W @ x + alpha / A.shape[0] * B @ (A @ x), ROWS),
        Mistake("columns_unscaled", lambda x, W, A, B, alpha: W @ x + B @ (A @ x), ROWS),
        Mistake("W_not_transposed", lambda x, W, A, B, alpha: x @ W + alpha / len(A) * (x @ A.T @ B.T), ONLY_SQUARE),
        Mistake("A_and_B_swapped", lambda x, W, A, B, alpha: x @ W.T + alpha / A.shape[0] * (x @ B @ A), ONLY_SQUARE),
        Mistake("all_untransposed", lambda x, W, A, B, alpha: x @ W + alpha / A.shape[0] * (x @ B @ A), ONLY_SQUARE),
        Mistake("update_alone", lambda x, W, A, B, alpha: alpha / A.shape[0] * (x @ A.T @ B.T),
                "You returned the update alone. The frozen path x W^T is missing."),
        Mistake("base_alone", lambda x, W, A, B, alpha: x @ W.T,
                "You returned the frozen path alone. The update, alpha / r times B A x, is missing."),
        Mistake("subtracted", lambda x, W, A, B, alpha: x @ W.T - alpha / len(A) * (x @ A.T @ B.T), None, "wrong sign"),
        Mistake("in_place", in_place, None, "Your function changed W (max difference "),
        Mistake("in_float32",
                lambda x, W, A, B, alpha: linear_twice(x.float(), W.float(), A.float(), B.float(), alpha),
                None, "Right values, wrong dtype: x is bfloat16, you returned float32."),
        Mistake("detached", lambda x, W, A, B, alpha: linear_twice(x, W, A.detach(), B, alpha), None,
                "Values are right but no gradient reaches A. Training would never move it."),
        Mistake("no_grad", without_gradient, None, "no gradient reaches A."),
        Mistake("x_detached", lambda x, W, A, B, alpha: x @ W.T + alpha / A.shape[0] * (x.detach() @ A.T @ B.T), None,
                "the gradient of x is not"),
        Mistake("two_axes", two_axes_only, None,
                "Works for (n, d_in) and fails for (batch, length, d_in): ... means any number of leading axes."),
    ),
    alternatives=(
        linear_twice, by_einsum, by_addmm,
        lambda x, W, A, B, alpha: x @ W.T + (x @ A.T) @ B.T * (alpha / A.shape[0]),
        lambda x, W, A, B, alpha: x @ W.T + x @ (A.T * alpha / A.shape[0]) @ B.T,
        lambda x, W, A, B, alpha: F.linear(x, W) + F.linear(x @ A.T, B * (alpha / B.shape[1])),
    ),
    remarks=(
        Remark("grouping",
               f"Right numbers, but you formed a (d_out, d_in) matrix: {4096 * 4096 * 4 / 1e6:.0f} MB for a 4096 "
               f"layer. "
               "Group the product the other way.",
               forms_the_matrix,
               fact="No (d_out, d_in) matrix is formed: x meets A first, and B meets the r numbers that come out.",
               attempts=(delta_formed, lambda x, W, A, B, alpha: x @ W.T + alpha / A.shape[0] * (x @ (B @ A).T))),
    ),
    explain={"shapes cannot be multiplied": ROWS},
    fact=f"At d = 4096 and r = 8 you touched {100 * 8 * (4096 + 4096) / 4096**2:.2g} % of the numbers that BA would "
    "have held.",
)

# ------------------------------------------------------------------------------------------------- lora_num_params


def count_cases(rng):
    d = pick(rng, 320, 512, 768)
    drawn = [[(4096, 4096), (1024, 4096)], [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)], [(d, d + 64)], []]
    ranks = [8, pick(rng, 4, 16), pick(rng, 1, 3), 8]
    return [Case({"shapes": shapes, "r": r}, numbers={"r": r}) for shapes, r in zip(drawn, ranks, strict=True)]


LORA_NUM_PARAMS = Exercise(
    name="lora_num_params",
    reference=lora.lora_num_params,
    cases=count_cases,
    mistakes=(
        Mistake("product", lambda shapes, r: sum(r * o * i for o, i in shapes),
                "You multiplied d_in by d_out: that is r times the weight itself. A holds r * d_in numbers, B holds "
                "d_out * r; add them."),
        Mistake("no_B", lambda shapes, r: sum(r * i for o, i in shapes),
                "You counted A alone. B holds d_out * r numbers as well."),
        Mistake("no_A", lambda shapes, r: sum(r * o for o, i in shapes),
                "You counted B alone. A holds r * d_in numbers as well."),
        Mistake("with_W", lambda shapes, r: sum(r * (o + i) + o * i for o, i in shapes),
                "W itself is counted too. It is frozen: only A and B are trained."),
        Mistake("square", lambda shapes, r: sum(2 * r * i for o, i in shapes),
                "2 r d_in is right only for square layers. Use both d_out and d_in of each shape."),
        Mistake("first_only", lambda shapes, r: sum(r * (o + i) for o, i in shapes[:1]),
                "Only the first layer is counted. Sum over all shapes."),
        Mistake("no_rank", lambda shapes, r: sum(o + i for o, i in shapes), None, "which is 1/r, and r is 8"),
        Mistake("doubled", lambda shapes, r: 2 * sum(r * (o + i) for o, i in shapes), None, "exactly 2 times"),
        Mistake("empty_is_none", lambda shapes, r: sum(r * (o + i) for o, i in shapes) or None, None, "returned None"),
        Mistake("float", lambda shapes, r: 1.0 * sum(r * (o + i) for o, i in shapes), None, "an int is expected"),
    ),
    alternatives=(
        lambda shapes, r: r * sum(o + i for o, i in shapes),
        lambda shapes, r: sum(torch.zeros(r, i).numel() + torch.zeros(o, r).numel() for o, i in shapes),
        lambda shapes, r: sum(r * sum(shape) for shape in shapes),
    ),
    fact="Llama-2-7B with r = 8 on q_proj and v_proj of its 32 layers: "
    f"{lora.lora_num_params([(4096, 4096)] * 64, 8):,} numbers.",
)

EXERCISES = (
    LORA_SCALE,
    LORA_DELTA,
    LORA_FORWARD,
    LORA_NUM_PARAMS,
    *lora_init.EXERCISES,
    *lora_merge.EXERCISES,
    *lora_targets.EXERCISES,
    *lora_freezing.EXERCISES,
    *lora_backward.EXERCISES,
    *lora_autograd.EXERCISES,
)
