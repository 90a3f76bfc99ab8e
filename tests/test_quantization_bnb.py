"""Four bits against bitsandbytes: the same bytes, the same scales, the same weights back, and files in both directions.

Where the two differ, the tests say by how much and why:
- Of an all-zero block at the end that is shorter, bitsandbytes stores the scale 1e-38, the floor of its division.
- Double quantization: its C++ rounds a scale to a grid of 2^-15 before it looks for the nearest of 256 numbers, so that
  a scale within 2^-15 of a midpoint may get either neighbour. (Within 2^-15 of zero several numbers are as near.)
- Its unpacking on a CPU begins every row with a new scale. Where a row is not a whole number of blocks, that is not how
  the weight was packed, and other weights come out.
"""

import bitsandbytes as bnb
import bitsandbytes.functional as bf
import pytest
import torch
from torch import nn

from utils.quantization.blocks import quantize_blockwise, unpack
from utils.quantization.codebooks import dynamic_codebook, fp4_codebook, nf4_codebook
from utils.quantization.linear import NF4Linear, QuantizedLinear
from utils.quantization.weights import QuantizedWeight, quantize_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = (1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129, 257, 1000, 4095, 4096, 4097, 12_345, 70_001)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")


@pytest.fixture(autouse=True)
def uncompiled():
    """For odd rows and large blocks bitsandbytes compiles a function of its own, which takes longer than every test."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(n, kind, dtype):
    """n numbers of a kind: normal ones, many zeros, whole numbers (ties), outliers, numbers near the smallest."""
    w = torch.randn(n) * 0.02
    if kind == "zeros":
        w[n // 3 :] = 0  # whole blocks of zeros, the short last one among them
    if kind == "outliers":
        w[::97] *= 1e6 if dtype != torch.float16 else 1e5
    if kind == "tiny":
        w *= 1e-30 if dtype != torch.float16 else 1e-4
    if kind == "ties":
        w = torch.randint(-8, 9, (n,)).float()
    return w.to(dtype)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_and_scale(quant_type, dtype):
    for n in SIZES:
        for kind in ("normal", "zeros", "outliers", "tiny", "ties"):
            w = weights(n, kind, dtype)
            for block_size in BLOCKS if n < 10_000 else BLOCKS[:: len(BLOCKS) - 1]:
                packed, state = bf.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
                ours = quantize_weight(w, quant_type, block_size)
                case = f"{n} {kind} numbers in blocks of {block_size}"
                assert torch.equal(ours.packed, packed), case
                theirs = torch.where(state.absmax == 1e-38, 0, state.absmax)
                assert torch.equal(ours.absmax, theirs), case


def test_many_bytes():
    """A million numbers of one draw: 100 % of the bytes."""
    w = torch.randn(2**20)
    packed, _ = bf.quantize_4bit(w, quant_type="nf4")
    assert torch.equal(quantize_weight(w).packed, packed)


def test_the_zero_scale_of_a_short_block():
    w = torch.zeros(70)
    packed, state = bf.quantize_4bit(w, quant_type="nf4")
    ours = quantize_weight(w)
    assert torch.equal(ours.packed, packed)
    assert ours.absmax.tolist() == [0, 0] and state.absmax[0] == 0 and 0 < state.absmax[1] <= 1.1e-38


def test_the_code_books():
    assert torch.equal(nf4_codebook(), bf.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(fp4_codebook(), bf.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(dynamic_codebook(), bf.create_dynamic_map())
    assert torch.equal(dynamic_codebook(signed=False), bf.create_dynamic_map(signed=False))


# ------------------------------------------------------------------------------------------- 8 bits, and nested


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000, 70_001])
def test_8_bits_differ_only_beside_a_midpoint(n, signed):
    code = dynamic_codebook(signed)
    x = torch.randn(n) if signed else torch.rand(n)
    theirs, state = bf.quantize_blockwise(x, code=code, blocksize=256)
    ours, absmax = quantize_blockwise(x, code, 256)
    assert torch.equal(absmax, state.absmax)
    scaled = x / absmax.repeat_interleave(256)[:n]
    difference = (ours.int() - theirs.int()).abs()
    assert difference[scaled.abs() > 2**-15].max() <= 1 and (difference != 0).float().mean() < 0.01
    midpoints = (code[:-1] + code[1:]) / 2
    gap = (scaled[difference != 0][:, None] - midpoints).abs().amin(1)
    assert (gap <= 2**-15).all()
    error, other = ((code[index.long()] - scaled).abs() for index in (ours, theirs))
    assert (error <= other + 1e-7).all() and (other <= error + 2**-15).all()  # ours is the nearer one


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (64, 64), (257, 64), (128, 640), (300, 1024)])
def test_double_quantization(shape, dtype, quant_type):
    w = torch.randn(shape).to(dtype) * torch.rand(shape[0], 1).to(dtype)
    packed, state = bf.quantize_4bit(w, quant_type=quant_type, compress_statistics=True)
    ours = quantize_weight(w, quant_type, double_quant=True)
    assert torch.equal(ours.packed, packed)
    offset, absmax2, code2 = ours.nested
    assert torch.equal(offset, state.offset) and torch.equal(code2, state.state2.code)
    assert torch.equal(absmax2, state.state2.absmax)
    difference = ours.absmax.int() - state.absmax.int()
    assert difference.abs().max() <= 1 and (difference != 0).float().mean() < 0.01


# --------------------------------------------------------------------------------------------------- unpacking


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 128, 1024, 4096])
def test_weights_come_back_to_the_bit(block_size, quant_type, double_quant):
    """Rows of whole blocks, from bitsandbytes' own bytes and scales, in each dtype."""
    for shape in ((1, block_size), (5, block_size), (70 if block_size < 1000 else 3, 2 * block_size)):
        for stored in DTYPES:
            packed, state = bf.quantize_4bit(
                torch.randn(shape).to(stored), blocksize=block_size, quant_type=quant_type,
                compress_statistics=double_quant,
            )  # fmt: skip
            weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
            ours = QuantizedWeight.from_bitsandbytes(weight)
            assert ours.dtype == stored and ours.block_size == block_size and bool(ours.nested) == double_quant
            for dtype in DTYPES:
                state.dtype = dtype
                assert torch.equal(ours.dequantize(dtype), bf.dequantize_4bit(packed, state)), (shape, dtype)


@pytest.mark.parametrize("shape", [(50, 96), (50, 32), (9, 100), (64, 66), (7, 65), (31, 1)])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_rows_of_other_lengths_come_back_right(quant_type, shape):
    """Each number within half a step of its block's scale; bitsandbytes' at most as near, on a CPU often far off."""
    w = torch.randn(shape) * torch.linspace(0.1, 10, shape[0])[:, None]
    packed, state = bf.quantize_4bit(w, quant_type=quant_type)
    ours = quantize_weight(w, quant_type)
    assert torch.equal(ours.packed, packed)
    found, theirs = ours.dequantize(), bf.dequantize_4bit(packed, state).view(shape)
    error, other = ((t - w).norm() / w.norm() for t in (found, theirs))
    assert error < 0.2
    assert error <= other * (1 + 1e-6)


def test_bitsandbytes_is_known_to_be_wrong_there():
    """If this fails, bitsandbytes has mended its CPU kernel, and the note at the top can go (AVX-512 only)."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("the kernel needs AVX-512")
    w = torch.randn(50, 96)
    theirs = bf.dequantize_4bit(*bf.quantize_4bit(w, quant_type="nf4"))
    assert (theirs - w).norm() / w.norm() > 2 * (quantize_weight(w).dequantize() - w).norm() / w.norm()


# ------------------------------------------------------------------------------------------------- state dicts


def theirs(quant_type="nf4", double_quant=True, d_out=16, d_in=128, dtype=torch.float32, bias=True):
    """A Linear4bit, quantized."""
    layer = bnb.nn.Linear4bit(
        d_in, d_out, bias=bias, quant_type=quant_type, compress_statistics=double_quant, compute_dtype=dtype
    )
    plain = nn.Linear(d_in, d_out, bias=bias).to(dtype)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(dtype).to("cpu").train()
    assert layer.weight.quant_state is not None
    return layer, plain


KINDS = pytest.mark.parametrize(
    "quant_type, double_quant, dtype",
    [
        ("nf4", True, torch.float32),
        ("nf4", False, torch.bfloat16),
        ("fp4", True, torch.float16),
        ("fp4", False, torch.float32),
    ],
)


def ours(plain, quant_type="nf4", double_quant=True, dtype=None):
    kind = NF4Linear if quant_type == "nf4" else QuantizedLinear
    return kind(quantize_weight(plain.weight, quant_type, 64, double_quant), plain.bias, dtype)


def bytes_of(state):
    return {
        k: (t.dtype, t.shape, t.detach().contiguous().view(-1).view(torch.uint8).tolist()) for k, t in state.items()
    }


@KINDS
def test_the_same_state_dict_to_the_byte(quant_type, double_quant, dtype):
    """Down to the JSON of the quant_state, but for double quantized scales beside a midpoint."""
    layer, plain = theirs(quant_type, double_quant, dtype=dtype)
    mine = bytes_of(ours(plain, quant_type, double_quant).state_dict())
    expected = bytes_of(layer.state_dict())
    for key in [k for k in mine if k.startswith("weight.absmax") and double_quant]:
        a, b = (torch.tensor(d.pop(key)[2]) for d in (mine, expected))
        assert (a.int() - b.int()).abs().max() <= 1
    assert mine == expected


@KINDS
def test_ours_loads_theirs(quant_type, double_quant, dtype):
    layer, plain = theirs(quant_type, double_quant, dtype=dtype)
    target = ours(nn.Linear(128, 16).to(dtype), quant_type, double_quant)
    assert target.load_state_dict(layer.state_dict()) == ([], [])
    assert torch.equal(target.dequantize(), bf.dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    assert torch.equal(target.bias, layer.bias)
    assert bytes_of(target.state_dict()) == bytes_of(layer.state_dict())
    x = torch.randn(5, 128, dtype=dtype)
    torch.testing.assert_close(target(x), layer(x), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


@KINDS
def test_theirs_loads_ours(quant_type, double_quant, dtype):
    plain = nn.Linear(128, 16).to(dtype)
    mine = ours(plain, quant_type, double_quant)
    state = mine.state_dict()
    stats = {k: t for k, t in state.items() if k.startswith("weight.")}
    weight = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cpu")
    assert torch.equal(bf.dequantize_4bit(weight.data, weight.quant_state), mine.dequantize())
    again = bf.QuantState.from_dict(
        {k.removeprefix("weight."): t for k, t in stats.items()}, device=torch.device("cpu")
    )
    assert torch.equal(bf.dequantize_4bit(state["weight"], again), mine.dequantize())


def test_a_layer_of_another_setting_loads_either():
    """The state says what it is: blocks, double quantization and dtype follow it."""
    layer, _ = theirs("nf4", False, dtype=torch.bfloat16)
    target = ours(nn.Linear(128, 16), double_quant=True)
    target.load_state_dict(layer.state_dict())
    assert not target.double_quant and target.dense_dtype == torch.bfloat16
    assert torch.equal(target.dequantize(), bf.dequantize_4bit(layer.weight.data, layer.weight.quant_state))


def test_bytes_stored_as_another_dtype():
    """For FSDP bitsandbytes may keep the bytes as bfloat16."""
    w = torch.randn(16, 128)
    packed, state = bf.quantize_4bit(w, quant_type="nf4", quant_storage=torch.bfloat16)
    assert packed.dtype == torch.bfloat16
    weight = bnb.nn.Params4bit(packed, requires_grad=False, quant_state=state, bnb_quantized=True)
    found = QuantizedWeight.from_bitsandbytes(weight)
    assert torch.equal(found.packed, quantize_weight(w).packed)
    assert torch.equal(found.dequantize(), bf.dequantize_4bit(packed, state))
    assert torch.equal(unpack(found.packed, 16 * 128), unpack(quantize_weight(w).packed, 16 * 128))


@KINDS
def test_gradients_of_the_input(quant_type, double_quant, dtype):
    layer, _ = theirs(quant_type, double_quant, dtype=dtype)
    mine = QuantizedLinear(QuantizedWeight.from_bitsandbytes(layer.weight), layer.bias)
    x = torch.randn(5, 128).to(dtype)
    grads = []
    for module in (mine, layer):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5)
