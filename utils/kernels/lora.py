"""LoRA's two thin products for several projections and several adapters at once.

    shrink   v = s A x        expand   y += B v

    x (rows, d_in)     each row has an adapter's number, or -1: that row belongs to the base alone and stays as it is
    A (n, R, d_in)     one per projection: the matrices of n adapters, stacked
    B (n, d_out, R)    likewise; d_out may differ between the projections (k and v are narrower than q under GQA)
    v (P, rows, R)     float32, for P = 1, 2 or 3 projections that read the same x: q, k, v, or gate and up
    s, ranks (P, n)    an adapter of rank r < R has r true rows of A and columns of B; whatever fills the rest is unused

Worked example: q, k, v of Llama-3-8B (4096 -> 4096, 1024, 1024) in 16 bits, R = 16, 2048 rows. One launch of shrink
reads x (16.8 MB) and writes v (3 x 2048 x 16 numbers, 0.4 MB); one launch of expand adds to the 2048 x 6144 outputs.
Neither holds a tensor of x's or y's size beside those. Six matrix products, a scaling and three sums did that before.

Rows that use the same adapter are found through `plan_rows`, as in Punica's SGMV (Chen et al. 2023,
https://arxiv.org/abs/2310.18547): sorted by adapter and cut into chunks, one chunk per program. Rows are read where
they lie: neither x nor y is permuted. No program adds to what another writes, so two runs give the same bits.

Training is the case n = 1, and `lora_grouped` is a layer for it. In a Llama's attention module:

    q, k, v = lora_grouped(x, [q_proj.weight, k_proj.weight, v_proj.weight], None, [Aq, Ak, Av], [Bq, Bk, Bv], scale)

Its backward pass needs no further idea: with g = dloss/dy, dv = s B^T g is a shrink, dx += A^T dv an expand, and
dA = dv x^T and dB = g v^T are sums of `outer` products over an adapter's rows.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from utils.kernels import capability_of, dot_dtype, power_of_two, runs_triton, tl, triton

# ------------------------------------------------------------------------------------- which program gets which rows


class Plan(NamedTuple):
    """Rows by adapter. Made once per batch and used by every layer; all but `chunk` are on the rows' device."""

    indices: torch.Tensor  # (rows,) the adapter of each row, or -1
    order: torch.Tensor  # (rows,) row numbers sorted by adapter, base rows first
    starts: torch.Tensor  # (n + 2,) where in `order` the rows of -1, 0, ... n - 1 begin, and the end
    chunk_adapter: torch.Tensor  # (chunks,)
    chunk_first: torch.Tensor  # (chunks,) where in `order` the chunk begins
    chunk_rows: torch.Tensor  # (chunks,) how many rows it has: at most `chunk`, and 0 for chunks to spare
    chunk: int


def plan_rows(indices, n_adapters, chunk=16):
    """The Plan for rows with these adapters.

    indices: (rows,) integers, -1 for base rows   chunk: rows per program, a power of two from 16 (the least that tl.dot
    takes, and enough for decoding) to 64 (prefill and training, where it reads A and B less often)
    The number of chunks depends on the shapes alone, so nothing waits for the GPU and a CUDA graph can be replayed.
    Raises ValueError for an index outside -1 ... n_adapters - 1, if indices is on the CPU; a GPU's is not looked at.
    """
    if indices.device.type == "cpu" and indices.numel() and not -1 <= indices.min() <= indices.max() < n_adapters:
        raise ValueError(f"adapter indices run from -1 (base) to {n_adapters - 1}, not to {indices.unique().tolist()}")
    order = torch.argsort(indices, stable=True)
    bounds = torch.arange(-1, n_adapters + 1, device=indices.device, dtype=indices.dtype)
    starts = torch.searchsorted(indices[order], bounds)  # (n + 2,)
    chunks_of = (starts.diff() + chunk - 1) // chunk  # (n + 1,) how many chunks each adapter needs, the base first
    ends = chunks_of.cumsum(0)
    rows = indices.numel()
    number = torch.arange(min(rows, rows // chunk + n_adapters + 1), device=indices.device)
    owner = torch.searchsorted(ends, number, right=True).clamp_(max=n_adapters)  # in `chunks_of`
    first = starts[owner] + (number - (ends - chunks_of)[owner]) * chunk
    size = (starts[owner + 1] - first).clamp_(0, chunk)
    return Plan(indices, *(t.int() for t in (order, starts, owner - 1, first, size)), chunk)


@functools.lru_cache(maxsize=16)
def one_adapter(rows, device, chunk):
    """The Plan for training: every row has adapter 0."""
    with torch.inference_mode(False):
        return plan_rows(torch.zeros(rows, dtype=torch.int32, device=device), 1, chunk)


@functools.lru_cache(maxsize=64)
def filled(value, projections, adapters, dtype, device):
    """A table of one number for each projection and adapter, kept, because filling it is a launch."""
    with torch.inference_mode(False):
        return torch.full((projections, adapters), value, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------ the kernels
#
# A and B are both "R x width" matrices; A is stored rank first, B width first. With that one switch a kernel serves
# forward and backward. Everything of P projections comes as a tuple, from which a program picks its own.


@triton.jit
def pick(items, p):
    """The p-th of a tuple of pointers; a tuple can be indexed only by numbers known when the kernel is compiled."""
    item = items[0]
    for i in tl.static_range(1, len(items)):
        if p == i:
            item = items[i]
    return item


@triton.jit
def pick_number(items, p):
    """The p-th of a tuple of integers, in 64 bits: a row's number times the row's length can pass 2^31."""
    item = tl.full((), items[0], tl.int64)
    for i in tl.static_range(1, len(items)):
        item = tl.where(p == i, items[i], item)
    return item


@triton.jit
def matrix_at(matrices, adapter, r, k, R, width, RANK_FIRST: tl.constexpr):
    """Addresses of the entries (r, k) of one adapter's matrix."""
    matrix = matrices + adapter.to(tl.int64) * R * width
    if RANK_FIRST:
        return matrix + r * width + k
    else:
        return matrix + k * R + r


@triton.jit
def shrink_kernel(
    xs, strides, widths, matrices, v, scales, ranks, order, chunk_adapter, chunk_first, chunk_rows, n_rows, n, R,
    RANK_FIRST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: the rows of a chunk, for one projection and up to BLOCK_R of the R columns of v."""
    # The projection's number changes fastest: programs that read the same x run at the same time and share the cache.
    p = tl.program_id(0) % len(xs)
    chunk = tl.program_id(0) // len(xs)
    adapter = tl.load(chunk_adapter + chunk)
    here = tl.arange(0, CHUNK) < tl.load(chunk_rows + chunk)
    rows = tl.load(order + tl.load(chunk_first + chunk) + tl.arange(0, CHUNK), mask=here, other=0).to(tl.int64)
    # A masked read of padding gives 0, whatever lies there: multiplying by 0 afterwards would keep a NaN.
    rank = tl.load(ranks + p * n + adapter, mask=adapter >= 0, other=0)
    scale = tl.load(scales + p * n + adapter, mask=adapter >= 0, other=0)
    x, matrix = pick(xs, p), pick(matrices, p)
    stride, K = pick_number(strides, p), pick_number(widths, p)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)

    acc = tl.zeros((CHUNK, BLOCK_R), tl.float32)
    for start in range(0, tl.where(rank > 0, K, 0), BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(x + rows[:, None] * stride + k[None, :], mask=here[:, None] & (k < K)[None, :], other=0)
        at = matrix_at(matrix, adapter, r[None, :], k[:, None], R, K, RANK_FIRST)
        m_tile = tl.load(at, mask=(k < K)[:, None] & (r < rank)[None, :], other=0)
        # "ieee": for float32, tensor cores would otherwise round the factors to TF32, 10 bits of mantissa
        acc = tl.dot(x_tile.to(DOT), m_tile.to(DOT), acc, input_precision="ieee")
    at = v + (p * n_rows + rows)[:, None] * R + r[None, :]
    tl.store(at, acc * scale, mask=here[:, None] & (r < R)[None, :])


@triton.jit
def expand_kernel(
    ys, strides, widths, matrices, v, ranks, order, chunk_adapter, chunk_first, chunk_rows, n_rows, n, R,
    RANK_FIRST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: the rows of a chunk, BLOCK_K columns of one y. A single y takes the sum over all projections."""
    p = tl.program_id(0) % len(ys)
    chunk = tl.program_id(0) // len(ys)
    adapter = tl.load(chunk_adapter + chunk)
    here = tl.arange(0, CHUNK) < tl.load(chunk_rows + chunk)
    rows = tl.load(order + tl.load(chunk_first + chunk) + tl.arange(0, CHUNK), mask=here, other=0).to(tl.int64)
    y, stride, K = pick(ys, p), pick_number(strides, p), pick_number(widths, p)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)

    first, last = p, p + 1
    if len(ys) < len(matrices):
        first, last = 0, len(matrices)
    most = 0  # of the ranks
    acc = tl.zeros((CHUNK, BLOCK_K), tl.float32)
    for q in range(first, last):
        rank = tl.load(ranks + q * n + adapter, mask=adapter >= 0, other=0)
        most = tl.maximum(most, rank)
        matrix = pick(matrices, q)
        for start in range(0, rank, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            at = v + (q * n_rows + rows)[:, None] * R + r[None, :]
            v_tile = tl.load(at, mask=here[:, None] & (r < rank)[None, :], other=0)
            at = matrix_at(matrix, adapter, r[:, None], k[None, :], R, K, RANK_FIRST)
            m_tile = tl.load(at, mask=(r < rank)[:, None] & (k < K)[None, :], other=0)
            acc = tl.dot(v_tile.to(DOT), m_tile.to(DOT), acc, input_precision="ieee")
    # Rows without an adapter are not written at all: even adding 0 would turn a -0 into a +0.
    mask = here[:, None] & (k < K)[None, :] & (most > 0)
    at = y + rows[:, None] * stride + k[None, :]
    tl.store(at, tl.load(at, mask=mask, other=0).to(tl.float32) + acc, mask=mask)


@triton.jit
def outer_kernel(
    v, xs, strides, widths, grads, order, starts, n_rows, R,
    RANK_FIRST: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_R x BLOCK_K entries of one adapter's gradient for one projection, over all of its rows."""
    p = tl.program_id(0) % len(xs)
    adapter = tl.program_id(0) // len(xs)
    x, grad = pick(xs, p), pick(grads, p)
    stride, K = pick_number(strides, p), pick_number(widths, p)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    stop = tl.load(starts + adapter + 2)

    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in range(tl.load(starts + adapter + 1), stop, CHUNK):
        i = start + tl.arange(0, CHUNK)
        rows = tl.load(order + i, mask=i < stop, other=0).to(tl.int64)
        at = v + (p * n_rows + rows)[None, :] * R + r[:, None]
        v_tile = tl.load(at, mask=(r < R)[:, None] & (i < stop)[None, :], other=0)
        x_tile = tl.load(x + rows[:, None] * stride + k[None, :], mask=(i < stop)[:, None] & (k < K)[None, :], other=0)
        acc = tl.dot(v_tile.to(DOT), x_tile.to(DOT), acc, input_precision="ieee")
    at = matrix_at(grad, adapter, r[:, None], k[None, :], R, K, RANK_FIRST)
    tl.store(at, acc, mask=(r < R)[:, None] & (k < K)[None, :])


def tiles(R, dtype, capability):
    """The block sizes. Factors of float32 are twice as large and go through ordinary multipliers, not tensor cores, so
    their tiles are smaller; that also keeps a T4 (64 KB of shared memory per block) far from its limit."""
    dot = dot_dtype(dtype, capability)
    wide = dot != tl.float32
    return {"BLOCK_R": min(power_of_two(R), 64 if wide else 32), "BLOCK_K": 64 if wide else 32, "DOT": dot}


# -------------------------------------------------------------------------------------- the functions, either way


def shrink(xs, matrices, scales, ranks, plan, rank_first=True):
    """v[p, i] = s[p, a] M_p[a] xs[p][i], with a the adapter of row i; 0 for base rows and beyond an adapter's rank.

    xs: P tensors (rows, width_p), or the same one P times   matrices: P of (n, R, width_p), or with rank_first=False
    of (n, width_p, R); contiguous   scales: (P, n) float32   ranks: (P, n) integers
    returns (P, rows, R), float32 (float64 for float64)
    """
    x, (n, R) = xs[0], sizes(matrices, rank_first)
    if not runs_triton(x):
        return shrink_reference(xs, matrices, scales, ranks, plan, rank_first)
    v = torch.empty(len(xs), len(x), R, dtype=torch.float32, device=x.device)
    how = tiles(R, x.dtype, capability_of(x))
    with torch.cuda.device_of(x):
        shrink_kernel[len(plan.chunk_rows) * len(xs), cdiv(R, how["BLOCK_R"])](
            *rowwise(xs), contiguous(matrices), v, scales.float(), ranks.int(), *chunks(plan), len(x), n, R,
            RANK_FIRST=rank_first, CHUNK=plan.chunk, **how,
        )  # fmt: skip
    return v


def shrink_reference(xs, matrices, scales, ranks, plan, rank_first=True):
    """`shrink` in plain torch."""
    v = xs[0].new_zeros(len(xs), len(xs[0]), sizes(matrices, rank_first)[1], dtype=wide(xs[0]))
    for p, a, rows, M in used(matrices, ranks, plan, rank_first):
        v[p, rows, : len(M)] = scales[p, a] * (xs[p][rows].to(v.dtype) @ M.to(v.dtype).T)
    return v


def expand(ys, v, matrices, ranks, plan, rank_first=False):
    """ys[p][i] += M_p[a] v[p, i], in place, with a the adapter of row i. Base rows keep their bits.

    ys: P tensors (rows, width_p), apart from each other in memory, or a single one, which takes the sum over p
    v: (P, rows, R) from `shrink`   matrices: P of (n, width_p, R), or with rank_first=True of (n, R, width_p)
    The sum is taken in float32 and rounded once.
    """
    y, (n, R) = ys[0], sizes(matrices, rank_first)
    if any(t.stride(1) != 1 and t.shape[1] > 1 for t in ys):
        raise ValueError("expand adds in place, so every row of y must lie in one piece (y.stride(1) == 1)")
    if not runs_triton(y):
        return expand_reference(ys, v, matrices, ranks, plan, rank_first)
    how = tiles(R, y.dtype, capability_of(y))
    with torch.cuda.device_of(y):
        expand_kernel[len(plan.chunk_rows) * len(ys), cdiv(max(t.shape[1] for t in ys), how["BLOCK_K"])](
            *rowwise(ys), contiguous(matrices), v, ranks.int(), *chunks(plan), len(y), n, R,
            RANK_FIRST=rank_first, CHUNK=plan.chunk, **how,
        )  # fmt: skip


def expand_reference(ys, v, matrices, ranks, plan, rank_first=False):
    """`expand` in plain torch."""
    sums = [y.to(v.dtype) for y in ys]
    for p, _, rows, M in used(matrices, ranks, plan, rank_first):
        y = p if len(ys) > 1 else 0
        sums[y] = sums[y].index_add(0, rows, v[p, rows, : len(M)] @ M.to(v.dtype))
    for y, total in zip(ys, sums, strict=True):
        rows = (plan.indices >= 0).nonzero()[:, 0]
        y[rows] = total[rows].to(y.dtype)


def outer(v, xs, n, plan, dtype, rank_first=True):
    """The gradients of n stacked matrices: G_p[a] = sum over the rows i of adapter a of v[p, i] xs[p][i]^T.

    v: (P, rows, R)   xs: P tensors (rows, width_p)   n: int   dtype: the result's
    returns P tensors (n, R, width_p), or with rank_first=False (n, width_p, R); 0 for an adapter without rows
    """
    x, R = xs[0], v.shape[2]
    if not runs_triton(x):
        return outer_reference(v, xs, n, plan, dtype, rank_first)
    shapes = [(n, R, t.shape[1]) if rank_first else (n, t.shape[1], R) for t in xs]
    grads = tuple(torch.empty(shape, dtype=dtype, device=x.device) for shape in shapes)
    how = tiles(R, x.dtype, capability_of(x))
    widest = max(t.shape[1] for t in xs)
    with torch.cuda.device_of(x):
        outer_kernel[n * len(xs), cdiv(widest, how["BLOCK_K"]), cdiv(R, how["BLOCK_R"])](
            v, *rowwise(xs), grads, plan.order, plan.starts, len(x), R, RANK_FIRST=rank_first, CHUNK=32, **how
        )
    return grads


def outer_reference(v, xs, n, plan, dtype, rank_first=True):
    """`outer` in plain torch."""
    rows_of = [(plan.indices == a).nonzero()[:, 0] for a in range(n)]
    sums = [torch.stack([v[p, rows].T @ x[rows].to(v.dtype) for rows in rows_of]) for p, x in enumerate(xs)]
    return tuple((total if rank_first else total.mT).to(dtype).contiguous() for total in sums)


def used(matrices, ranks, plan, rank_first):
    """(p, a, rows, M) of every projection and adapter in use; M (rank, width) is without padding."""
    for p, stack in enumerate(matrices):
        for a, matrix in enumerate(stack):
            rank, rows = int(ranks[p, a]), (plan.indices == a).nonzero()[:, 0]
            if rank > 0 and len(rows) > 0:
                yield p, a, rows, (matrix if rank_first else matrix.T)[:rank]


def chunks(plan):
    """What a kernel needs to find the rows of its chunk."""
    return plan.order, plan.chunk_adapter, plan.chunk_first, plan.chunk_rows


def sizes(matrices, rank_first):
    """(adapters, padded rank) of stacked matrices."""
    return matrices[0].shape[0], matrices[0].shape[1 if rank_first else 2]


def rowwise(tensors):
    """What a kernel needs of tensors whose rows lie anywhere, each row in one piece: pointers, steps and widths."""
    tensors = tuple(t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous() for t in tensors)
    return tensors, tuple(t.stride(0) for t in tensors), tuple(t.shape[1] for t in tensors)


def contiguous(tensors):
    return tuple(t.contiguous() for t in tensors)


def wide(x):
    """The dtype for sums: float32, or float64 where x has it."""
    return torch.promote_types(x.dtype, torch.float32)


def cdiv(a, b):
    return -(-a // b)


# ------------------------------------------------------------------------------------------- a layer, for training


def lora_grouped(x, weights, biases, As, Bs, scale, ranks=None, plan=None):
    """The outputs of P frozen linear layers that read the same x, each with its LoRA: x W_p^T + b_p + s B_p A_p x.

    x: (..., d_in)   weights: P of (d_out_p, d_in)   biases: P of (d_out_p,) or None, or None for no biases at all
    As: P of (r, d_in)   Bs: P of (d_out_p, r)   scale: a float; float32 A and B over a half-precision x are welcome
    returns P tensors (..., d_out_p) in x's dtype (autocast's under autocast); x, A and B get gradients
    For several adapters, with the padded rank R: As of (n, R, d_in), Bs of (n, d_out_p, R), a plan of the rows of
    x.reshape(-1, d_in), and if they differ ranks (P, n) and scale (P, n). Gradients of padding are 0.
    Raises ValueError for shapes that do not fit, for stacked adapters without a plan, and for a trained weight.
    """
    P = len(weights)
    biases = [None] * P if biases is None else biases
    if not P == len(biases) == len(As) == len(Bs):
        raise ValueError(f"{P} weights, {len(biases)} biases, {len(As)} As and {len(Bs)} Bs: give as many of each")
    As = [A[None] if A.dim() == 2 else A for A in As]
    Bs = [B[None] if B.dim() == 2 else B for B in Bs]
    n, R = As[0].shape[:2]
    for W, A, B in zip(weights, As, Bs, strict=True):
        if A.shape != (n, R, W.shape[1]) or B.shape != (n, W.shape[0], R) or W.shape[1] != x.shape[-1]:
            shapes = f"A {tuple(A.shape)}, B {tuple(B.shape)}, W {tuple(W.shape)} and x {tuple(x.shape)}"
            raise ValueError(f"{shapes} do not fit: A is (n, R, d_in) and B (n, d_out, R), the same n and R for all")
        if W.requires_grad:
            raise ValueError("lora_grouped gives W no gradient: set W.requires_grad = False")
    if plan is None and n > 1:
        raise ValueError(f"{n} adapters need a plan that says which rows are whose: plan_rows(indices, {n})")
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x = x.to(torch.get_autocast_dtype(device))
    rows = x.numel() // x.shape[-1]
    if plan is None:
        # 64 rows fill a tensor core's tile; without tensor cores a tile of 32 stays in registers
        full = 64 if not x.is_cuda or capability_of(x) >= (8, 0) else 32
        plan = one_adapter(rows, x.device, min(full, power_of_two(rows)))
    elif len(plan.indices) != rows:
        raise ValueError(f"the plan is for {len(plan.indices)} rows, but x has {rows}")
    ranks = filled(R, P, n, torch.int32, x.device) if ranks is None else ranks
    scales = scale if isinstance(scale, torch.Tensor) else filled(float(scale), P, n, torch.float32, x.device)
    with torch.autocast(device, enabled=False):
        return LoRAGrouped.apply(x, scales, ranks, plan, P, *weights, *biases, *As, *Bs)


class LoRAGrouped(torch.autograd.Function):
    """`lora_grouped` without its checks. For the backward pass it keeps x, and v: R numbers per row and projection."""

    @staticmethod
    def forward(ctx, x, scales, ranks, plan, P, *tensors):
        weights, biases, As, Bs = (tensors[i * P : (i + 1) * P] for i in range(4))
        rows = x.reshape(-1, x.shape[-1])
        weights = [W.to(x.dtype) for W in weights]
        biases = [None if b is None else b.to(x.dtype) for b in biases]
        ys = [F.linear(rows, W, b) for W, b in zip(weights, biases, strict=True)]
        v = shrink([rows] * P, As, scales, ranks, plan)
        expand(ys, v, Bs, ranks, plan)
        ctx.save_for_backward(x, v, *tensors[:P], *As, *Bs)
        ctx.plan, ctx.scales, ctx.ranks, ctx.P = plan, scales, ranks, P
        return tuple(y.view(*x.shape[:-1], -1) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        plan, scales, ranks, P = ctx.plan, ctx.scales, ctx.ranks, ctx.P
        x, v, *tensors = ctx.saved_tensors
        weights, As, Bs = (tensors[i * P : (i + 1) * P] for i in range(3))
        rows = x.reshape(-1, x.shape[-1])
        grads = [g.reshape(-1, g.shape[-1]) for g in grads]
        dv = shrink(grads, Bs, scales, ranks, plan, rank_first=False)  # s B^T g
        dx = None
        if ctx.needs_input_grad[0]:
            dx = grads[0] @ weights[0].to(x.dtype)
            for g, W in zip(grads[1:], weights[1:], strict=True):
                dx.addmm_(g, W.to(x.dtype))
            expand([dx], dv, As, ranks, plan, rank_first=True)
            dx = dx.view_as(x)
        n = As[0].shape[0]
        dAs = outer(dv, [rows] * P, n, plan, As[0].dtype)
        dBs = outer(v, grads, n, plan, Bs[0].dtype, rank_first=False)
        return dx, None, None, None, None, *[None] * (2 * P), *dAs, *dBs
