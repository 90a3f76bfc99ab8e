"""Weights of 4 bits: unpacking them, and multiplying with them.

    w_i = code[index_i] absmax_block(i)        two indices per byte, the first of a pair in the high four bits
    absmax_b = code2[absmax_b] absmax2_group(b) + offset        where the scales are double quantized

    dequantize    W' from its codes, with or without double quantization in one kernel
    matmul        x W'^T, by the kernel that `route` names: for few rows `gemv`, for some `gemm`, neither of which ever
                  writes W' to memory; for many, W' is unpacked and multiplied by cuBLAS

Worked example: q_proj of Llama-2-7B, 4096 x 4096, in blocks of 64 with float32 scales. Its codes and scales are 9.4 MB,
W' in 16 bits is 33.6 MB. To unpack is to move 43 MB: 9.0 us at the 4.8 TB/s of an H200's data sheet. To decode a
token, gemv must read the 9.4 MB (8.7 MB double quantized): 2.0 us, where the layer in 16 bits needs 7.0.

See utils.quantization for what the numbers mean and how they are made.
"""

import torch
import torch.nn.functional as F

from utils.kernels import DTYPES, INTERPRETED, capability_of, dot_dtype, power_of_two, runs_triton, tl, triton

# ----------------------------------------------------------------------------------------------------- in plain torch


def scales_reference(absmax, nested):
    """The float32 scale of every block. absmax: (blocks,), uint8 if nested; nested: (offset, absmax2, code2) or None"""
    if nested is None:
        return absmax
    offset, absmax2, code2 = nested
    group = 256
    scales = code2.index_select(0, absmax.int())
    whole = len(scales) - len(scales) % group
    scales[:whole].view(-1, group).mul_(absmax2[: whole // group, None])
    if whole < len(scales):
        scales[whole:] *= absmax2[-1]
    return scales.add_(offset)


def dequantize_reference(packed, absmax, code, shape, block_size, dtype, nested=None):
    """The weight that these bytes stand for, computed in float32 and rounded once.

    packed: (ceil(n / 2), 1) uint8   absmax: (blocks,) float32, or uint8 with `nested`   code: (16,) float32
    shape: of the weight, n numbers   block_size: numbers per scale   dtype: of the result
    nested: (offset, absmax2, code2) of double quantized scales, or None   returns a tensor of that shape and dtype

    A byte is looked up whole: a table of 256 pairs of numbers, each pair read as one int64. That is twice as fast as
    taking the byte apart, and a part of the weight at a time stays in the processor's cache.
    """
    scales, packed = scales_reference(absmax, nested), packed.view(-1)
    n = torch.Size(shape).numel()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).view(torch.int64).view(-1)
    out = torch.empty(n, dtype=dtype, device=packed.device)
    whole = n - n % block_size if block_size % 2 == 0 else 0  # numbers in whole blocks that begin at a byte
    step = max(1, 2**18 // block_size) * block_size
    for start in range(0, whole, step):
        end = min(start + step, whole)
        values = pairs.index_select(0, packed[start // 2 : end // 2].int()).view(torch.float32)
        values.view(-1, block_size).mul_(scales[start // block_size : end // block_size, None])
        out[start:end] = values
    if whole < n:
        values = pairs.index_select(0, packed[whole // 2 :].int()).view(torch.float32)[: n - whole]
        scales = scales[whole // block_size :].repeat_interleave(min(block_size, n - whole))
        out[whole:] = values * scales[: n - whole]
    return out.view(shape)


# ------------------------------------------------------------------------------------------------------ the kernels
#
# The code book is looked up by tl.gather, which keeps it in shared memory: 16 entries in 16 banks, so that no two of a
# warp's 32 look-ups are in each other's way. From global memory each would need a 64-bit address, and in gemm's loop
# the compiler would even fetch each one asynchronously. gemv, which has little else to do, reads words: a shift, a
# mask, a look-up and a multiplication per weight. In gemm's loop words would cost twice the registers of bytes.


@triton.jit
def scale_of(absmax, offset, absmax2, code2, block, here):
    """The scales of these blocks; where `here` is false, some number. code2 and two more are None if not nested.

    A multiplication and an addition, each rounded: the kernels that promise the reference's bits are compiled without
    fused multiply-add.
    """
    scale = tl.load(absmax + block, mask=here, other=0)
    if code2 is not None:
        group = tl.load(absmax2 + block // 256, mask=here, other=0)
        scale = tl.load(code2 + scale.to(tl.int32), mask=here, other=0) * group + tl.load(offset)
    return scale


@triton.jit
def looked_up(index, code, COUNT: tl.constexpr):
    """The code book's numbers at these COUNT indices, in one dimension."""
    book = tl.load(code + tl.arange(0, 16))
    return tl.gather(book, tl.reshape(index, (COUNT,)), 0)


@triton.jit
def two_of(codes):
    """The two indices in each byte, side by side in the last dimension: in registers, so nothing is moved."""
    codes = codes.to(tl.int32)
    return tl.interleave(codes >> 4, codes & 15)


@triton.jit
def eight_of(words):
    """The eight indices in each word of 32 bits, along a new last dimension. words: (rows, width)

    The lowest byte is the first, and of a byte the high half: they begin at bits 4, 0, 12, 8, 20, 16, 28, 24.
    """
    shift = 4 * (tl.arange(0, 8) ^ 1)
    return (words[:, :, None] >> shift[None, None, :]) & 15


@triton.jit
def dequantize_kernel(
    packed, absmax, offset, absmax2, code2, code, out, n, n_bytes,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program: TILE numbers. GROUP neighbours share a scale; TILE and GROUP are powers of two."""
    first = tl.program_id(0).to(tl.int64) * TILE
    byte = first // 2 + tl.arange(0, TILE // 2)
    codes = tl.load(packed + byte, mask=byte < n_bytes, other=0)
    group = first + tl.arange(0, TILE // GROUP) * GROUP
    scale = scale_of(absmax, offset, absmax2, code2, group // BLOCK_SIZE, group < n)
    numbers = looked_up(two_of(codes), code, TILE)
    w = tl.reshape(tl.reshape(numbers, (TILE // GROUP, GROUP)) * scale[:, None], (TILE,))
    at = first + tl.arange(0, TILE)
    tl.store(out + at, w.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def scales_kernel(absmax, offset, absmax2, code2, out, blocks, TILE: tl.constexpr):
    """One program: TILE scales, no longer double quantized."""
    block = tl.program_id(0) * TILE + tl.arange(0, TILE)
    here = block < blocks
    tl.store(out + block, scale_of(absmax, offset, absmax2, code2, block, here), mask=here)


@triton.jit
def gemv_kernel(
    x, packed, absmax, offset, absmax2, code2, code, bias, y, rows, d_out, d_in, row_words, stride,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N columns of y, all of the few rows. Codes are multiplied with x before their scale is."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = n.to(tl.int64)[:, None]  # of W; 64 bits, because a vocabulary times a width can pass 2^31
    packed = packed.to(tl.pointer_type(tl.int32))
    m = tl.arange(0, ROWS)
    total = tl.zeros((BLOCK_N, ROWS), tl.float32)
    for start in range(0, d_in, BLOCK_K):
        word = start // 8 + tl.arange(0, BLOCK_K // 8)[None, :]
        words = tl.load(packed + row * row_words + word, mask=(row < d_out) & (word < row_words), other=0)
        group = start + tl.arange(0, BLOCK_K // GROUP)[None, :] * GROUP
        here = (row < d_out) & (group < d_in)
        scale = scale_of(absmax, offset, absmax2, code2, (row * d_in + group) // BLOCK_SIZE, here)
        k = start + tl.arange(0, BLOCK_K)
        for i in tl.static_range(ROWS):
            x_row = tl.load(x + i * stride + k, mask=(k < d_in) & (i < rows), other=0).to(tl.float32)
            # The compiler does this once. It stands here so that x is on its way before the codes are waited for.
            w = looked_up(eight_of(words), code, BLOCK_N * BLOCK_K)
            w = tl.reshape(w, (BLOCK_N, BLOCK_K // GROUP, GROUP))
            products = w * tl.reshape(x_row, (1, BLOCK_K // GROUP, GROUP))
            sums = tl.sum(tl.sum(products, 2) * scale, 1)
            total += tl.where(m[None, :] == i, sums[:, None], 0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < d_out, other=0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * d_out + n[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m < rows)[None, :] & (n < d_out)[:, None])


@triton.jit
def gemm_kernel(
    x, packed, scales, code, bias, y, rows, d_out, d_in, row_bytes, stride, depth,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows and BLOCK_N columns of y, over `depth` of the d_in products, from split * depth on.

    It computes y^T = W x^T, because W is then the factor that tensor cores can take from registers, where it is
    unpacked, and the rows, of which there may be few, are the side that may be short. With several splits y is
    (splits, rows, d_out), the sums that are still to be added up.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row, x_row = n.to(tl.int64)[:, None], m.to(tl.int64)[None, :]
    begin = tl.program_id(2) * depth
    end = tl.minimum(begin + depth, d_in)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        byte = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        codes = tl.load(packed + row * row_bytes + byte, mask=(row < d_out) & (byte < row_bytes), other=0)
        group = start + tl.arange(0, BLOCK_K // GROUP)[None, :] * GROUP
        here = (row < d_out) & (group < d_in)
        scale = tl.load(scales + (row * d_in + group) // BLOCK_SIZE, mask=here, other=0)
        k = start + tl.arange(0, BLOCK_K)[:, None]
        x_tile = tl.load(x + x_row * stride + k, mask=(x_row < rows) & (k < d_in), other=0)
        w = looked_up(two_of(codes), code, BLOCK_N * BLOCK_K)
        w = tl.reshape(w, (BLOCK_N, BLOCK_K // GROUP, GROUP))
        w = tl.reshape(w * scale[:, :, None], (BLOCK_N, BLOCK_K)).to(x.dtype.element_ty)  # rounded, as in memory
        # "ieee": for float32, tensor cores would otherwise round the factors to TF32, 10 bits of mantissa
        acc = tl.dot(w.to(DOT), x_tile.to(DOT), acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + n, mask=n < d_out, other=0).to(tl.float32)[:, None]
    at = (tl.program_id(2) * rows + x_row) * d_out + n[:, None]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=(x_row < rows) & (n < d_out)[:, None])


@triton.jit
def add_up_kernel(sums, bias, y, splits, size, d_out, TILE: tl.constexpr):
    """One program: TILE numbers of y, each the sum over the splits, in their order, and the bias."""
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = at < size
    total = tl.zeros((TILE,), tl.float32)
    part = at
    for _ in range(splits):
        total += tl.load(sums + part, mask=here, other=0)
        part += size
    if bias is not None:
        total += tl.load(bias + at % d_out, mask=here, other=0).to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=here)


# -------------------------------------------------------------------------------------- the functions, either way

NOT_NESTED = (None, None, None)


def dequantize(packed, absmax, code, shape, block_size, dtype, nested=None):
    """`dequantize_reference`, by a kernel where Triton runs: the same bits."""
    if not runs_triton(code) or dtype not in DTYPES:
        return dequantize_reference(packed, absmax, code, shape, block_size, dtype, nested)
    # The interpreter cuts bfloat16 off where a GPU rounds it: there the kernel writes float32 and torch rounds.
    written = torch.float32 if INTERPRETED else dtype
    out = torch.empty(shape, dtype=written, device=packed.device)
    n, tile = out.numel(), 4096
    with torch.cuda.device_of(packed):
        dequantize_kernel[(cdiv(n, tile),)](
            packed, absmax, *(nested or NOT_NESTED), code, out, n, packed.numel(),
            BLOCK_SIZE=block_size, GROUP=group_of(block_size, most=32), TILE=tile, enable_fp_fusion=False,
        )  # fmt: skip
    return out.to(dtype)


@torch.no_grad()
def matmul(x, packed, absmax, code, shape, block_size, bias=None, nested=None):
    """x W'^T + bias, without a backward pass (utils.quantization.linear has one).

    x: (..., d_in)   shape: (d_out, d_in)   bias: (d_out,) or None   the others: as in `dequantize_reference`
    returns (..., d_out), in x's dtype
    """
    d_out, d_in = shape
    if x.shape[-1] != d_in:
        raise ValueError(f"x {tuple(x.shape)} does not fit a weight of {tuple(shape)}: its last side must be {d_in}")
    rows = x.reshape(-1, d_in)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    words = packed.storage_offset() % 4 == 0  # gemv reads four bytes at a time
    way = route(len(rows), d_in, x.dtype, capability_of(x)) if runs_triton(x) and words else "unpack"
    if way == "unpack":
        W = dequantize(packed, absmax, code, shape, block_size, x.dtype, nested)
        return F.linear(x, W, bias)
    y = {"gemv": gemv, "gemm": gemm}[way](rows, packed, absmax, code, shape, block_size, bias, nested)
    return y.view(*x.shape[:-1], d_out)


def matmul_reference(x, packed, absmax, code, shape, block_size, bias=None, nested=None):
    """`matmul` in plain torch."""
    return F.linear(x, dequantize_reference(packed, absmax, code, shape, block_size, x.dtype, nested), bias)


def route(rows, d_in, dtype, capability):
    """Which way x W'^T is computed: "gemv", "gemm" or "unpack" (W' into memory, then cuBLAS).

    rows: of x   capability: (major, minor) of the GPU, or None for the interpreter
    - Unpacking costs the same for any number of rows: 9 bytes read become 32 written, and read again. Not to do it pays
      as long as reading W' is what takes the time, and not multiplying: for some tens of rows.
    - gemv multiplies without tensor cores, once per row; gemm's tile is 16 rows, even for one.
    - Without tensor cores in Triton (see dot_dtype) gemm cannot win, and gemv goes as far as its 16 rows.
    - The kernels want every row of W to begin at a whole word, so d_in must be a multiple of 8.
    The numbers 4 and 64 were not measured by this project. bitsandbytes 0.50 has a kernel of its own up to 4 rows, and
    leaves its fused product after 16 to 64 on an H100, depending on the shape.
    """
    if rows == 0 or d_in % 8:
        return "unpack"
    tensor_cores = dot_dtype(dtype, capability) != tl.float32
    if rows <= (4 if tensor_cores else 16):
        return "gemv"
    return "gemm" if tensor_cores and rows <= 64 else "unpack"


def gemv(x, packed, absmax, code, shape, block_size, bias=None, nested=None):
    """`matmul` for x (rows, d_in), up to 16 rows of stride 1. W' is not rounded to x's dtype: only y is."""
    (rows, d_in), d_out = x.shape, shape[0]
    y = torch.empty(rows, d_out, dtype=x.dtype, device=x.device)
    few = power_of_two(rows, least=1)
    block_n, block_k = (4 if few == 1 else 2), min(power_of_two(d_in, least=64), 4096)
    with torch.cuda.device_of(x):
        gemv_kernel[(cdiv(d_out, block_n),)](
            x, packed, absmax, *(nested or NOT_NESTED), code, bias, y, rows, d_out, d_in, d_in // 8, x.stride(0),
            BLOCK_SIZE=block_size, GROUP=group_of(block_size, d_in, most=32),
            ROWS=few, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=max(1, block_k // 1024),
        )  # fmt: skip
    return y


def gemm(x, packed, absmax, code, shape, block_size, bias=None, nested=None, splits=None):
    """`matmul` for x (rows, d_in), any number of rows of stride 1. W' is rounded to x's dtype, as in memory.

    splits: into how many parts the sum over d_in is cut, to give every multiprocessor work; None: by the shapes. The
    parts are added up in their order, so that two runs give the same bits.
    """
    (rows, d_in), d_out = x.shape, shape[0]
    scales = absmax if nested is None else scales_of(absmax, nested)
    how = tiles(rows, x.dtype, capability_of(x))
    grid = cdiv(d_out, how["BLOCK_N"]), cdiv(rows, how["BLOCK_M"])
    steps = cdiv(d_in, how["BLOCK_K"])
    if splits is None:
        splits = splits_of(steps, grid[0] * grid[1], multiprocessors_of(x))
    depth = cdiv(steps, splits) * how["BLOCK_K"]
    splits = cdiv(d_in, depth)  # 5 steps in 4 splits are 2, 2 and 1
    y = torch.empty(rows, d_out, dtype=x.dtype, device=x.device)
    sums = y if splits == 1 else torch.empty(splits, rows, d_out, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        gemm_kernel[(*grid, splits)](
            x, packed, scales, code, bias if splits == 1 else None, sums,
            rows, d_out, d_in, d_in // 2, x.stride(0), depth,
            BLOCK_SIZE=block_size, GROUP=group_of(block_size, d_in, most=how["BLOCK_K"]), **how,
        )  # fmt: skip
        if splits > 1:
            add_up_kernel[(cdiv(y.numel(), 1024),)](sums, bias, y, splits, y.numel(), d_out, TILE=1024)
    return y


def tiles(rows, dtype, capability):
    """gemm's block sizes. Three stages of x's tile must fit in shared memory: 99 KB on an L4, 64 KB on a T4."""
    dot = dot_dtype(dtype, capability)
    if dot == tl.float32:
        return {"BLOCK_M": min(power_of_two(rows), 32), "BLOCK_N": 64, "BLOCK_K": 32, "DOT": dot}
    block_m = min(power_of_two(rows), 128)
    return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 128 if block_m <= 64 else 64, "DOT": dot}


def splits_of(steps, programs, multiprocessors):
    """As many as give every multiprocessor two programs, of at least four steps each. Not measured."""
    return max(1, min(cdiv(2 * multiprocessors, programs), steps // 4))


def multiprocessors_of(x):
    """Multiprocessors of the tensor's GPU; 1 under the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def scales_of(absmax, nested):
    """`scales_reference` by a kernel."""
    out = torch.empty(absmax.numel(), dtype=torch.float32, device=absmax.device)
    with torch.cuda.device_of(absmax):
        scales_kernel[(cdiv(out.numel(), 1024),)](
            absmax, *nested, out, out.numel(), TILE=1024, enable_fp_fusion=False
        )  # fmt: skip
    return out


def group_of(*numbers, most):
    """How many neighbours certainly share a scale: the largest power of two that divides all numbers, up to `most`."""
    together = most
    for number in numbers:
        together |= number
    return together & -together


def cdiv(a, b):
    return -(-a // b)
