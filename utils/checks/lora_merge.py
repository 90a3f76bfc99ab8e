"""Chapter 02, weights with the update in them: merging, and the LoRA of a fused weight."""

import math

import torch

from utils.checks.compare import close
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import layers, low_rank, pick
from utils.methods import lora

# ------------------------------------------------------------------------------------------------- lora_merge


def merge_cases(rng):
    drawn = [(layer, torch.float32, torch.float32) for layer in layers(rng)]
    drawn += [((40, 56, 4, 12, ("rectangular", "bf16", "float32 factors")), torch.bfloat16, torch.float32),
              ((48, 48, 6, 9, ("bf16", "bf16 factors")), torch.bfloat16, torch.bfloat16)]
    cases = []
    for (d_out, d_in, r, alpha, kinds), dtype, factor_dtype in drawn:
        W, A, B = low_rank(rng, d_out, d_in, r)
        numbers = {"r": r, "alpha": alpha, "layer": f"({d_out}, {d_in})"}
        inputs = {"W": W.to(dtype), "A": A.to(factor_dtype), "B": B.to(factor_dtype), "alpha": alpha}
        cases.append(Case(inputs, kinds, numbers, later="bf16" in kinds))
    return cases


def rounded_alike(want, got):
    """In float32 the same up to rounding; in bfloat16 the same bits, but for the odd tie that falls the other way."""
    if not isinstance(got, torch.Tensor) or got.shape != want.shape or not got.is_floating_point():
        return False
    if want.dtype == torch.float32:
        return torch.allclose(got.double(), want.double(), rtol=1e-4, atol=1e-4)
    return (got.to(torch.bfloat16) != want.to(torch.bfloat16)).float().mean().item() < 0.01


def merged(rule):
    """A merge with another rule for the float32 update."""
    return lambda W, A, B, alpha: (W.float() + rule(A.float(), B.float(), alpha)).to(W.dtype)


def merge_in_place(W, A, B, alpha):
    W += alpha / A.shape[0] * (B.float() @ A.float())
    return W


IN_BFLOAT16 = (
    "Right in float32; here W is bfloat16{factors}. Take product and sum in float32 and round once, at the end, to W's "
    "dtype: bfloat16 keeps 8 bits, and small updates are the first to go."
)
W_ALONE = IN_BFLOAT16.format(factors=", A and B float32")
ALL_THREE = IN_BFLOAT16.format(factors=", and so are A and B")
ROUNDED_TWICE = (
    "Right in float32; here W is bfloat16. You rounded the update and then the sum: round once, at the end. bfloat16 "
    "keeps 8 bits, and small updates are the first to go."
)

LORA_MERGE = Exercise(
    name="lora_merge",
    reference=lora.lora_merge,
    cases=merge_cases,
    agrees=rounded_alike,
    base=lambda W, A, B, alpha: W.float(),
    mistakes=(
        Mistake("no_scale", merged(lambda A, B, alpha: B @ A),
                "You added B A alone. The factor alpha / r is missing: here {alpha} / {r}."),
        Mistake("no_rank", merged(lambda A, B, alpha: alpha * B @ A),
                "Your update is exactly {r} times the expected one, and r is {r}: the 1/r is missing."),
        Mistake("no_alpha", merged(lambda A, B, alpha: B @ A / A.shape[0]),
                "Your update is 1/{alpha} of the expected one, and alpha is {alpha}: alpha is missing."),
        Mistake("root", merged(lambda A, B, alpha: alpha / math.sqrt(A.shape[0]) * B @ A),
                "You scaled by alpha / sqrt(r). That is rsLoRA; use the scale that the forward pass used, alpha / r."),
        Mistake("subtracts", merged(lambda A, B, alpha: -alpha / A.shape[0] * B @ A),
                "You took the update away. That is how to unmerge; merging adds it."),
        Mistake("transposed", merged(lambda A, B, alpha: alpha / A.shape[0] * A.T @ B.T),
                "You added the transpose of the update. It runs only when the layer is square; on {layer} it fails. "
                "B comes first: (d_out, r) times (r, d_in)."),
        Mistake("update_alone", lambda W, A, B, alpha: (alpha / A.shape[0] * B.float() @ A.float()).to(W.dtype),
                "You returned the update without W. The merged weight is their sum."),
        Mistake("product_rounded", lambda W, A, B, alpha: W + (alpha / len(A) * (B @ A)).to(W.dtype), ROUNDED_TWICE),
        Mistake("factors_rounded",
                lambda W, A, B, alpha: W + alpha / A.shape[0] * (B.to(W.dtype) @ A.to(W.dtype)), ROUNDED_TWICE),
        Mistake("update_rounded",
                lambda W, A, B, alpha: W + (alpha / len(A) * (B.float() @ A.float())).to(W.dtype), ROUNDED_TWICE),
        Mistake("cast_too_late",
                lambda W, A, B, alpha: (W.float() + alpha / len(A) * (B @ A).float()).to(W.dtype), None, ALL_THREE),
        Mistake("scaled_then_cast",
                lambda W, A, B, alpha: (W.float() + (alpha / len(A) * B @ A).float()).to(W.dtype), None, ALL_THREE),
        Mistake("cast_nowhere", lambda W, A, B, alpha: W + alpha / len(A) * B @ A, None, ALL_THREE),
        Mistake("delta", lambda W, A, B, alpha: W + lora.lora_delta(A, B, alpha), None, ALL_THREE),
        Mistake("dtypes_mixed", lambda W, A, B, alpha: torch.addmm(W, B, A, alpha=alpha / len(A)), None,
                "Right in float32; here W is bfloat16"),
        Mistake("in_place", merge_in_place, None, "Your function changed W (max difference "),
        Mistake("in_float32", lambda W, A, B, alpha: W.float() + alpha / A.shape[0] * (B.float() @ A.float()), None,
                "Right values, wrong dtype: W is bfloat16, you returned float32."),
    ),
    alternatives=(
        merged(lambda A, B, alpha: (alpha * B / A.shape[0]) @ A),
        lambda W, A, B, alpha: torch.addmm(W.float(), B.float(), A.float(), alpha=alpha / len(A)).to(W.dtype),
        lambda W, A, B, alpha: (W.double() + alpha / len(A) * (B.double() @ A.double())).to(W.dtype),
    ),
    kinds={"bf16": IN_BFLOAT16.format(factors=""), "float32 factors": W_ALONE, "bf16 factors": ALL_THREE},
    fact="An update smaller than 1/512 of its weight vanishes when it is merged into bfloat16, which keeps 8 bits.",
)

# ------------------------------------------------------------------------------------------------- fuse_loras


def fuse_cases(rng):
    cases = []
    for d_in, d_outs, ranks, kinds in (
        (16, (16, 16, 16), (4, 4, 4), ()),
        (pick(rng, 10, 12), (12, 5, 5), (3, 3, 3), ("uneven",)),
        (9, (pick(rng, 6, 8), 4), (2, 2), ("uneven",)),
        (13, (7, 7), (2, 5), ("ranks",)),
        (10, (6, 8), (3, 3), ("bf16",)),
    ):
        dtype = torch.bfloat16 if "bf16" in kinds else torch.float32
        parts = [low_rank(rng, d_out, d_in, r, dtype) for d_out, r in zip(d_outs, ranks, strict=True)]
        inputs = {"As": [A for _, A, _ in parts], "Bs": [B for _, _, B in parts]}
        cases.append(Case(inputs, kinds, {"k": len(parts), "rows": sum(d_outs)}, later="bf16" in kinds))
    return cases


def same_product(want, got):
    """The same B A with the same shapes: in which order the ranks are stacked is a matter of taste."""
    if close(got, want):
        return True
    if not (isinstance(got, (tuple, list)) and [getattr(t, "shape", None) for t in got] == [t.shape for t in want]):
        return False
    (A, B), (C, D) = got, want
    return B.shape[1] == A.shape[0] and close(B @ A, D @ C)


def block_diagonal(As, Bs, order=None, fill=0.0):
    """The right answer, written with slices; order: in which order the ranks of the parts are stacked."""
    order = list(order if order is not None else range(len(As)))
    starts = [sum(b.shape[0] for b in Bs[:i]) for i in range(len(Bs))]
    B = torch.full((sum(b.shape[0] for b in Bs), sum(b.shape[1] for b in Bs)), fill, dtype=Bs[0].dtype)
    column = 0
    for i in order:
        d_out, r = Bs[i].shape
        B[starts[i] : starts[i] + d_out, column : column + r] = Bs[i]
        column += r
    return torch.cat([As[i] for i in order]), B


def always_float32(As, Bs):
    return torch.cat(As), block_diagonal(As, [b.float() for b in Bs])[1]


def equal_parts(As, Bs):
    (d_out, r), k = Bs[0].shape, len(Bs)
    B = torch.zeros(k * d_out, k * r)
    for i, b in enumerate(Bs):
        B[i * d_out : (i + 1) * d_out, i * r : (i + 1) * r] = b
    return torch.cat(As), B


STACK = "stack makes a new axis; torch.cat puts the rows below one another."

FUSE_LORAS = Exercise(
    name="fuse_loras",
    reference=lora.fuse_loras,
    cases=fuse_cases,
    agrees=same_product,
    mistakes=(
        Mistake("shared", lambda As, Bs: (torch.cat(As), torch.cat(Bs)),
                "You stacked the B's in one column: A has the ranks of all parts, B of one, and B A cannot be formed. "
                "Move each B to the columns that meet its own A, with zeros around it."),
        Mistake("side_by_side", lambda As, Bs: (torch.cat(As), torch.cat(Bs, dim=1)),
                "You put the B's side by side, so all parts add into the same rows. Each part owns rows of its own: "
                "B has {rows} rows, with zeros outside the blocks."),
        Mistake("averaged", lambda As, Bs: (torch.stack(As).mean(0), torch.cat(Bs)),
                "You averaged the A's. Then all parts read x through one A, and {k} LoRAs have become one. Stack the "
                "A's."),
        Mistake("first_A", lambda As, Bs: (As[0], torch.cat(Bs)),
                "All parts share the first A. Each part has its own: stack them."),
        Mistake("order", lambda As, Bs: (torch.cat(As[::-1]), torch.block_diag(*Bs)),
                "A and B are stacked in different orders, so each B meets the A of another part."),
        Mistake("B_order", lambda As, Bs: (torch.cat(As), torch.block_diag(*Bs[::-1])),
                "The B's are in reversed order: rows and columns of part i come before those of part i + 1."),
        Mistake("transposed", lambda As, Bs: (torch.cat(As), torch.block_diag(*Bs).T),
                "B is transposed: its rows are the outputs, {rows} here."),
        Mistake("A_transposed", lambda As, Bs: (torch.cat([a.T for a in As], dim=1), torch.block_diag(*Bs)),
                "A is transposed: stack the A's on top of each other, (sum of the ranks, d_in)."),
        Mistake("not_zero", lambda As, Bs: block_diagonal(As, Bs, fill=1.0),
                "The blocks beside the diagonal are not zero: the rows of one part read the A of another."),
        Mistake("swapped", lambda As, Bs: (torch.block_diag(*Bs), torch.cat(As)),
                "The two are swapped: A comes first, then B."),
        Mistake("stacked", lambda As, Bs: (torch.stack(As), torch.block_diag(*Bs)), None, STACK),
        Mistake("float32_B", always_float32, None, "wrong dtype: As holds bfloat16, you returned float32"),
        Mistake("equal_parts", equal_parts, None, "Take each part's own"),
        Mistake("A_only", lambda As, Bs: torch.cat(As), None, "a tuple of 2 is expected"),
        Mistake("both_diagonal", lambda As, Bs: (torch.block_diag(*As), torch.block_diag(*Bs)), None, "Wrong shape"),
    ),
    alternatives=(
        block_diagonal,
        lambda As, Bs: [torch.vstack(tuple(As)), torch.block_diag(*Bs)],
        lambda As, Bs: block_diagonal(As, Bs, order=reversed(range(len(As)))),
    ),
    kinds={
        "uneven": "Works when all parts have the same d_out and fails when they differ, as q, k and v do under "
        "grouped-query attention. Take each part's own number of rows.",
        "ranks": "Works when all parts have the same rank and fails when ranks differ. Take each part's own.",
    },
    explain={"stack expects each tensor": STACK},
    fact="If all k ranks are equal, the fused LoRA needs k times the alpha to keep alpha / r.",
)

EXERCISES = (LORA_MERGE, FUSE_LORAS)
