"""The row norms that DoRA divides by, without forming the matrix whose rows they are.

    n_i = | W_i + s (B A)_i |        (Liu et al. 2024, https://arxiv.org/abs/2402.09353; see utils/methods/dora.py)

    W (d_out, d_in)   A (r, d_in)   B (d_out, r)   n (d_out,), float32

The kernel adds W and s B A one tile at a time, in registers, so that W is read once and nothing of its size is written.
Worked example: a (4096, 4096) weight in 16 bits is 33.6 MB to read. Forming B A and the sum in float32 would write and
read 67.1 MB twice. The reference is `dora_norm`, which multiplies the square out instead; where W and s B A nearly
cancel, the tiles are the more accurate of the two.

There is no backward pass: DoRA treats n as a constant, so the result requires no gradient even where A and B do.
"""

import torch

from utils.kernels import power_of_two, runs_triton, tl, triton
from utils.methods.dora import dora_norm as dora_row_norm_reference


@triton.jit
def row_norm_kernel(
    W, A, B, norms, scale, d_out, d_in, R,
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the norms of ROWS rows."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    here = rows < d_out
    # 64 bits: a vocabulary times a width can pass 2^31
    W_row, B_row = W + rows.to(tl.int64)[:, None] * d_in, B + rows.to(tl.int64)[:, None] * R
    squares = tl.zeros((ROWS, BLOCK_K), tl.float32)
    for start in range(0, d_in, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        delta = tl.zeros((ROWS, BLOCK_K), tl.float32)
        for r_start in range(0, R, BLOCK_R):
            r = r_start + tl.arange(0, BLOCK_R)
            b = tl.load(B_row + r[None, :], mask=here[:, None] & (r < R)[None, :], other=0)
            a = tl.load(A + r[:, None] * d_in + k[None, :], mask=(r < R)[:, None] & (k < d_in)[None, :], other=0)
            # float32 on every device: tensor cores would round A and B, and the interpreter misreads bfloat16
            delta = tl.dot(b.to(tl.float32), a.to(tl.float32), delta, input_precision="ieee")
        w = tl.load(W_row + k[None, :], mask=here[:, None] & (k < d_in)[None, :], other=0).to(tl.float32)
        total = w + scale * delta
        squares += total * total
    tl.store(norms + rows, tl.sqrt(tl.sum(squares, 1)), mask=here)


@torch.no_grad()
def dora_row_norm(W, A, B, scale):
    """The norms of the rows of W + scale B A.

    W: (d_out, d_in)   A: (r, d_in)   B: (d_out, r), each of any floating dtype   scale: float
    returns (d_out,), float32 (float64 where W has it)
    """
    if not runs_triton(W):
        return dora_row_norm_reference(W, A, B, scale)
    (d_out, d_in), R = W.shape, A.shape[0]
    norms = torch.empty(d_out, dtype=torch.float32, device=W.device)
    with torch.cuda.device_of(W):
        row_norm_kernel[(-(-d_out // 16),)](
            W.contiguous(), A.contiguous(), B.contiguous(), norms, float(scale), d_out, d_in, R,
            ROWS=16, BLOCK_R=min(power_of_two(R), 32), BLOCK_K=64,
        )  # fmt: skip
    return norms
