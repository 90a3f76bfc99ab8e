"""The kernels of 4-bit weights, run like those of test_kernels.py: as PyTorch references, interpreted, and on a GPU.

`gemv` and `gemm` have no reference of their own signature, so here their tests need the interpreter or a GPU.
"""

import os
import subprocess
import sys

import pytest
import torch
from test_kernels import DEVICE, DTYPES, NAN, compiled, near, needs_triton

from utils.kernels import INTERPRETED, dot_dtype, four_bit, tl
from utils.kernels.four_bit import (
    dequantize,
    dequantize_reference,
    gemm,
    gemv,
    group_of,
    matmul,
    matmul_reference,
    route,
    scales_of,
    scales_reference,
    splits_of,
    tiles,
)
from utils.quantization.blocks import dequantize_blockwise, unpack
from utils.quantization.weights import quantize_weight

runs_kernels = pytest.mark.skipif(
    not (INTERPRETED or DEVICE == "cuda"), reason="the kernels run interpreted or on a GPU"
)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_triton_s_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def guarded(t, poison):
    """The same numbers on the tests' device, with poison before and behind them. 64 numbers keep the alignment."""
    store = torch.full((t.numel() + 128,), poison, dtype=t.dtype, device=DEVICE)
    store[64:-64] = t.reshape(-1)
    return store[64:-64].view(t.shape)


def weight(shape, kind="nf4", block_size=64, double_quant=False, huge=False):
    """The arguments of a random 4-bit weight by name, and what it stands for, in float32, from the plain formulas.

    The second block is zeros. Reading a byte too far gives wrong numbers, or a scale that is NaN.
    huge: the last number is 3e4; not for products, where it would be all that counts
    """
    W = torch.randn(shape)
    W.view(-1)[block_size : 2 * block_size] = 0
    if huge:
        W.view(-1)[-1] = 3e4
    q = quantize_weight(W, kind, block_size, double_quant)
    index = unpack(q.packed, W.numel())
    means = dequantize_blockwise(index, scales_reference(q.absmax, q.nested), q.code, block_size).view(shape)
    nested = q.nested and (q.nested[0].to(DEVICE), guarded(q.nested[1], NAN), guarded(q.nested[2], NAN))
    absmax = guarded(q.absmax, 255 if double_quant else NAN)
    given = {"packed": guarded(q.packed, 255), "absmax": absmax, "code": guarded(q.code, NAN), "shape": W.shape}
    return given | {"block_size": block_size, "nested": nested}, means.to(DEVICE)


# ---------------------------------------------------------------------------------------------------------- unpacking


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, shape, block_size", [
    ("nf4", (1, 1), 64), ("nf4", (9, 7), 32), ("fp4", (70, 64), 64), ("int4", (33, 130), 48), ("nf4", (13, 29), 49),
    ("nf4", (3, 5, 7), 1), ("fp4", (65, 66), 256), ("nf4", (257, 48), 4096), ("nf4", (0, 8), 64),
])  # fmt: skip
def test_dequantization_is_equal_to_the_bit(kind, shape, block_size, dtype, double_quant):
    """Odd numbers of weights, blocks that end within a byte, and a last block that is not whole among them."""
    if 0 in shape:
        empty = torch.empty(0, 1, dtype=torch.uint8, device=DEVICE)
        got = dequantize(empty, torch.empty(0, device=DEVICE), torch.zeros(16, device=DEVICE), shape, block_size, dtype)
        assert got.shape == shape and got.dtype == dtype
        return
    given, means = weight(shape, kind, block_size, double_quant, huge=True)
    got = dequantize(**given, dtype=dtype)
    assert got.dtype == dtype and got.shape == shape and got.is_contiguous()
    assert torch.equal(got, means.to(dtype))
    assert torch.equal(dequantize_reference(**given, dtype=dtype), means.to(dtype))


def test_what_a_half_cannot_hold_is_infinite_there_too():
    given, means = weight((4, 64), huge=True)
    given["absmax"] *= 1024  # the huge number is 3e7
    got = dequantize(**given, dtype=torch.float16)
    assert got.isinf().sum() == 1 and torch.equal(got, (means * 1024).half())


def test_float64_is_the_reference_s():
    given, means = weight((5, 7), double_quant=True, huge=True)
    assert torch.equal(dequantize(**given, dtype=torch.float64), means.double())


@runs_kernels
@pytest.mark.parametrize("blocks", [1, 255, 256, 257, 3000])
def test_scales_unpacked_by_a_kernel(blocks):
    given, _ = weight((blocks, 64), double_quant=True)
    assert torch.equal(scales_of(given["absmax"], given["nested"]), scales_reference(given["absmax"], given["nested"]))


# ------------------------------------------------------------------------------------------------------- multiplying


def inputs(rows, given, dtype, bias=True):
    """x whose rows lie apart, with NaN between them, and a bias with NaN around it."""
    d_out, d_in = given["shape"]
    x = torch.full((rows + 1, d_in + 16), NAN, dtype=dtype, device=DEVICE)[:rows, :d_in]
    x.copy_(torch.randn(rows, d_in))
    return x, guarded(torch.randn(d_out).to(dtype), NAN) if bias else None


def product(x, means, bias):
    y = x.double() @ means.double().T
    return y if bias is None else y + bias.double()


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, shape, block_size, double_quant", [
    (1, (5, 8), 64, False), (1, (3, 4104), 64, True), (3, (9, 72), 48, False), (16, (9, 136), 32, True),
    (2, (6, 200), 49, True), (4, (1, 1024), 256, False),
])  # fmt: skip
def test_few_rows(rows, shape, block_size, double_quant, dtype):
    """gemv adds in float32 and rounds y alone: half the tolerance of a product of 16-bit weights is enough."""
    given, means = weight(shape, "nf4", block_size, double_quant)
    x, bias = inputs(rows, given, dtype, bias=rows != 3)
    y = gemv(x, bias=bias, **given)
    assert y.dtype == dtype
    near(y, product(x, means, bias), dtype, times=1 if dtype == torch.float32 else 0.5)


@runs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, shape, block_size, splits, double_quant", [
    (1, (5, 8), 64, None, True), (17, (70, 72), 48, None, False), (130, (33, 136), 32, 1, True),
    (16, (9, 264), 49, 3, False), (40, (65, 200), 256, 2, True),
])  # fmt: skip
def test_many_rows(rows, shape, block_size, splits, double_quant, dtype):
    """gemm rounds W' to x's dtype, and y: 2^-9 each in bfloat16 (the interpreter cuts off: 2^-8)."""
    given, means = weight(shape, "nf4", block_size, double_quant)
    x, bias = inputs(rows, given, dtype, bias=rows != 17)
    y = gemm(x, bias=bias, splits=splits, **given)
    assert y.dtype == dtype
    near(y, product(x, means, bias), dtype)
    assert torch.equal(y, gemm(x, bias=bias, splits=splits, **given))


@runs_kernels
@pytest.mark.parametrize("multiply", [gemv, gemm])
def test_bfloat16_is_multiplied_as_numbers(multiply):
    """The interpreter's tl.dot takes bfloat16 for integers. These weights and x are exact, and so must y be."""
    W = torch.tensor([1.0, -1.0, 0.0, 1.0] * 8).repeat(16, 1)
    q = quantize_weight(W, "int4", 64)
    assert torch.equal(q.dequantize(torch.float32), W)
    x = torch.eye(32)[:16].bfloat16().to(DEVICE)
    args = (q.packed.to(DEVICE), q.absmax.to(DEVICE), q.code.to(DEVICE), q.shape, 64)
    assert torch.equal(multiply(x, *args).float(), (x.float().cpu() @ W.T).to(DEVICE))
    assert torch.equal(multiply(torch.ones_like(x), *args).unique().cpu(), torch.tensor([8.0]).bfloat16())


@runs_kernels
def test_addresses_beyond_32_bits():
    """Row 2050 of rows that begin 2^20 numbers apart. Memory that nobody touches costs nothing."""
    try:
        store = torch.empty(2051 * 2**20, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4.3 GB of address space are not to be had")
    given, means = weight((3, 16))
    x = store.as_strided((2051, 16), (2**20, 1))
    x[2050] = 1.0
    near(gemm(x, **given)[2050], means.double().sum(1), torch.float16)


# ------------------------------------------------------------------------------------------------ which way, and matmul


def test_the_way_follows_from_the_shapes_alone():
    h100, t4 = (9, 0), (7, 5)
    ways = {rows: route(rows, 4096, torch.bfloat16, h100) for rows in (0, 1, 4, 5, 64, 65, 4096)}
    assert ways == {0: "unpack", 1: "gemv", 4: "gemv", 5: "gemm", 64: "gemm", 65: "unpack", 4096: "unpack"}
    assert [route(rows, 4096, torch.float16, t4) for rows in (1, 16, 17)] == ["gemv", "gemv", "unpack"]
    assert [route(rows, 4096, torch.float32, h100) for rows in (16, 17)] == ["gemv", "unpack"]
    assert [route(1, d_in, torch.float16, h100) for d_in in (8, 12, 4095)] == ["gemv", "unpack", "unpack"]


def test_every_multiprocessor_gets_work():
    assert splits_of(steps=32, programs=64, multiprocessors=132) == 5  # 4096 x 4096 on an H200: 320 programs
    assert splits_of(steps=32, programs=448, multiprocessors=132) == 1
    assert splits_of(steps=8, programs=1, multiprocessors=132) == 2  # at least four steps each
    assert splits_of(steps=1, programs=1, multiprocessors=132) == 1


def test_how_many_neighbours_share_a_scale():
    assert [group_of(block, 4096, most=32) for block in (16, 48, 49, 64, 96)] == [16, 16, 1, 32, 32]
    assert group_of(64, 8, most=32) == 8


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("lead", [(), (3,), (2, 9)])
@pytest.mark.parametrize("shape", [(9, 72), (5, 13)])
def test_matmul(shape, lead, dtype):
    """Of any leading shape; 13 numbers in a row do not begin at whole words."""
    given, means = weight(shape, "nf4", 64, True)
    x, bias = torch.randn(*lead, shape[1]).to(DEVICE, dtype), torch.randn(shape[0]).to(DEVICE, dtype)
    y = matmul(x, bias=bias, **given)
    assert y.dtype == dtype and y.shape == (*lead, shape[0])
    near(y, product(x, means, bias), dtype, times=2 if dtype == torch.float32 else 1)
    near(
        matmul_reference(x, bias=bias, **given),
        product(x, means, bias),
        dtype,
        times=2 if dtype == torch.float32 else 1,
    )


def test_x_in_any_order():
    given, means = weight((9, 72))
    x = torch.randn(72, 5, device=DEVICE).T
    near(matmul(x, **given), product(x, means, None), torch.float32, times=2)
    x = torch.randn(2, 144, 5, device=DEVICE).mT[:, 1:, ::2]
    near(matmul(x, **given), product(x, means, None), torch.float32, times=2)


def test_codes_that_begin_within_a_word():
    given, means = weight((9, 72))
    shifted = torch.empty(given["packed"].numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
    shifted.copy_(given["packed"][:, 0])
    x = torch.randn(2, 72, device=DEVICE)
    near(matmul(x, **given | {"packed": shifted[:, None]}), product(x, means, None), torch.float32, times=2)


def test_matmul_has_no_backward_pass_and_says_what_does_not_fit():
    given, _ = weight((9, 72))
    x = torch.randn(2, 72, device=DEVICE, requires_grad=True)
    assert not matmul(x, **given).requires_grad
    with pytest.raises(ValueError, match=r"x \(2, 9\) does not fit a weight of \(9, 72\): its last side must be 72"):
        matmul(torch.randn(2, 9, device=DEVICE), **given)


@runs_kernels
def test_matmul_takes_the_way_that_route_names(monkeypatch):
    given, _ = weight((9, 72))
    taken = []
    for name in ("gemv", "gemm", "dequantize"):
        do = getattr(four_bit, name)
        monkeypatch.setattr(four_bit, name, lambda *a, do=do, name=name, **k: (taken.append(name), do(*a, **k))[1])
    for way in ("gemv", "gemm", "unpack"):
        monkeypatch.setattr(four_bit, "route", lambda *a, way=way: way)
        matmul(torch.randn(2, 72, device=DEVICE), **given)
    assert taken == ["gemv", "gemm", "dequantize"]


# --------------------------------------------------------------------------------- what the compiler makes of them

PLAIN = {"offset": None, "absmax2": None, "code2": None}
SIXTEENS = ("x", "packed", "absmax", "scales", "code", "y", "out", "sums", "n", "n_bytes", "d_out", "d_in", "row_words",
            "row_bytes", "stride", "depth", "size")  # fmt: skip


def types_of(dtype, nested):
    types = dict.fromkeys(("x", "y", "out", "bias"), f"*{dtype}") | dict.fromkeys(("packed",), "*u8")
    types |= dict.fromkeys(("scales", "code", "sums", "absmax2", "code2", "offset"), "*fp32")
    return types | {"absmax": "*u8" if nested else "*fp32"}


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability, dtype, nested", [
    ((7, 5), "fp16", True), ((7, 5), "bf16", False), ((8, 9), "bf16", False), ((9, 0), "bf16", True),
    ((9, 0), "fp16", False),
])  # fmt: skip
def test_the_kernels_compile_without_a_gpu(capability, dtype, nested, tmp_path, monkeypatch):
    """What they are meant to become: 16 bytes at a time, products and sums of scales apart, tensor cores in gemm."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    types, scales = types_of(dtype, nested), {} if nested else PLAIN

    def made(kernel, constants, **options):
        return compiled(kernel, capability, types, constants, SIXTEENS, **options)

    unpacking = made(
        four_bit.dequantize_kernel, {**scales, "BLOCK_SIZE": 64, "GROUP": 32, "TILE": 4096}, enable_fp_fusion=False
    )
    few = made(
        four_bit.gemv_kernel,
        {**scales, "BLOCK_SIZE": 64, "GROUP": 32, "ROWS": 1, "BLOCK_N": 4, "BLOCK_K": 4096, "bias": None},
    )
    how = tiles(64, torch_dtype, capability)
    many = made(four_bit.gemm_kernel, {"BLOCK_SIZE": 64, "GROUP": how["BLOCK_K"] // 2, **how})
    limit = (64 if capability < (8, 0) else 99) * 1024  # of a T4's and an L4's block
    assert all(program.metadata.shared <= limit and program.asm["cubin"] for program in (unpacking, few, many))
    assert "ld.global.v4.b32" in unpacking.asm["ptx"] and "st.global.v4.b32" in unpacking.asm["ptx"]
    assert "fma" not in unpacking.asm["ptx"]
    assert few.asm["ptx"].count("ld.global.v4.b32") >= 4  # four rows of W
    cores = {9: "wgmma", 8: "mma.sync"}.get(capability[0])
    assert dot_dtype(torch_dtype, capability) == tl.float32 if cores is None else cores in many.asm["ptx"]
    if nested:
        assert "fma" not in made(four_bit.scales_kernel, {"TILE": 1024}, enable_fp_fusion=False).asm["ptx"]
    else:
        made(four_bit.add_up_kernel, {"TILE": 1024})


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_kernels_compile_for_one_of_everything_and_for_most(tmp_path, monkeypatch):
    """One row, one column, one block: the compiler sees constants. And gemv's 16 rows, and gemm's 128."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ones = dict.fromkeys(("rows", "d_out", "n", "n_bytes", "row_words", "splits", "size", "blocks", "stride"), "one")
    types = types_of("bf16", False) | ones
    small = {**PLAIN, "BLOCK_SIZE": 49, "GROUP": 1}
    compiled(four_bit.dequantize_kernel, (8, 0), types, {**small, "TILE": 4096}, enable_fp_fusion=False)
    few = {"ROWS": 1, "BLOCK_N": 4, "BLOCK_K": 64}
    compiled(four_bit.gemv_kernel, (8, 0), types, {**small, **few}, num_warps=1)
    many = {"BLOCK_SIZE": 49, "GROUP": 1, **tiles(1, torch.bfloat16, (8, 0))}
    compiled(four_bit.gemm_kernel, (8, 0), types, many)
    compiled(four_bit.add_up_kernel, (8, 0), types, {"TILE": 1024})
    compiled(four_bit.scales_kernel, (8, 0), types_of("bf16", True) | ones, {"TILE": 1024})
    types = types_of("fp16", False)
    large = {**PLAIN, "BLOCK_SIZE": 64, "GROUP": 32, "ROWS": 16, "BLOCK_N": 2, "BLOCK_K": 4096}
    compiled(four_bit.gemv_kernel, (7, 5), types, large, SIXTEENS)
    for capability in ((8, 9), (9, 0)):
        how = tiles(1000, torch.float16, capability)
        program = compiled(four_bit.gemm_kernel, capability, types, {"BLOCK_SIZE": 64, "GROUP": 64, **how}, SIXTEENS)
        assert how["BLOCK_M"] == 128 and program.metadata.shared <= 99 * 1024
