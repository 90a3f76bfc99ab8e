"""Four bits by hand: code books, blocks, nibbles, double quantization, the layer: numbers small enough to check."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from utils.kernels.four_bit import dequantize_reference, scales_reference
from utils.quantization.base import FP4, INT4, NF4
from utils.quantization.blocks import (
    bits_per_number,
    dequantize_blockwise,
    dequantize_scales,
    nearest_code,
    pack,
    quantize_blockwise,
    quantize_scales,
    unpack,
)
from utils.quantization.codebooks import (
    dynamic_codebook,
    fp4_codebook,
    int4_codebook,
    lloyd_codebook,
    lloyd_step,
    nf4_codebook,
)
from utils.quantization.linear import NF4Linear, QuantizedProduct
from utils.quantization.weights import CODEBOOKS, QuantizedWeight, quantize_weight, requantized_merge

# QLoRA, appendix E
PAPER = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
THREE = torch.tensor([-1.0, 0, 1])  # midpoints -0.5 and 0.5

# ------------------------------------------------------------------------------------------------ code books


def test_nf4_is_the_papers_table_to_the_float():
    assert torch.equal(nf4_codebook(), torch.tensor(PAPER))
    assert nf4_codebook()[7] == 0 and (nf4_codebook().diff() > 0).all()


def test_nf4_by_hand():
    """The smallest positive number is the quantile at 1/2 + (offset - 1/2) / 8, over the one at the offset."""
    quantile = NormalDist().inv_cdf
    offset = 0.9677083
    assert nf4_codebook()[8].item() == pytest.approx(quantile(0.5 + (offset - 0.5) / 8) / quantile(offset), abs=1e-7)
    assert nf4_codebook()[6].item() == pytest.approx(-quantile(0.5 + (offset - 0.5) / 7) / quantile(offset), abs=1e-7)
    assert offset == pytest.approx(1 - (1 / 32 + 1 / 30) / 2, abs=1e-7)


def test_fp4_by_its_bits():
    """The two bits of exponent stand for 8, 4 or 2 twelfths, and the bit of mantissa for half as much again."""
    code = fp4_codebook()
    assert (12 * code[:8]).tolist() == pytest.approx([0, 0.0625, 8, 12, 4, 6, 2, 3])
    assert torch.equal(code[8:], -code[:8])


def test_int4_is_even():
    code = int4_codebook()
    assert (7 * code).tolist() == pytest.approx([*range(-7, 8), 7])
    assert code[7] == 0


def test_dynamic_map_by_decades():
    code = dynamic_codebook()
    assert len(code) == 256 == len(code.unique()) and code[127] == 0 and code[-1] == 1
    assert (code.diff() > 0).all()
    top = code[(code > 0.1) & (code < 1)]
    assert len(top) == 64 and top[0].item() == pytest.approx(0.1 + 0.9 / 128)  # the middle of the first of 64 steps
    bottom = code[(code > 0) & (code < 1e-6)]
    assert bottom.tolist() == pytest.approx([5.5e-7])  # the middle of 1e-7 ... 1e-6
    unsigned = dynamic_codebook(signed=False)
    assert len(unsigned.unique()) == 256 and unsigned[0] == 0 and (unsigned[1:] > 0).all()


def test_lloyd_step_by_hand():
    values = torch.tensor([0.0, 0.2, 0.9, 1.1])
    assert lloyd_step(values, torch.tensor([-5.0, 0, 1])).tolist() == pytest.approx([-5, 0.1, 1.0])


def test_lloyd_never_gets_worse_and_beats_nf4_on_its_own_sample():
    values = torch.randn(64 * 500).view(-1, 64)
    values = (values / values.abs().amax(1, keepdim=True)).flatten()

    def error(code):
        return (code[nearest_code(values, code).long()] - values).square().mean().item()

    code, errors = nf4_codebook(), []
    for _ in range(20):
        errors.append(error(code))
        code = lloyd_step(values, code)
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False))
    fitted = lloyd_codebook(values)
    assert error(fitted) < errors[0] and fitted[0] == -1 and fitted[-1] == 1
    assert torch.equal(lloyd_codebook(values, rounds=0), nf4_codebook())


# ---------------------------------------------------------------------------------------- blocks and nibbles


def test_nearest_code_and_its_ties():
    values = torch.tensor([-1.0, -0.51, -0.5, -0.49, 0.5, 0.51, 1])
    assert nearest_code(values, THREE).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert nearest_code(values, torch.tensor([0.0, 1, -1])).tolist() == [2, 2, 2, 0, 0, 1, 1]  # in any order
    assert nearest_code(values, THREE).dtype == torch.uint8


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_nearest_code_is_nearest(kind):
    code = CODEBOOKS[kind]()
    values = torch.rand(5000) * 2 - 1
    found = (code[nearest_code(values, code).long()] - values).abs()
    assert torch.equal(found, (code[None] - values[:, None]).abs().amin(1))


def test_blocks_by_hand():
    x = torch.tensor([[1.0, -2, 0.5], [8, 3, -8]])  # blocks of 2 run over the rows: (1, -2), (0.5, 8), (3, -8)
    index, absmax = quantize_blockwise(x, THREE, 2)
    assert absmax.tolist() == [2, 8, 8]
    assert index.tolist() == [1, 0, 1, 2, 1, 0]  # 1/2 is a tie: the lower
    assert dequantize_blockwise(index, absmax, THREE, 2).tolist() == [0, -2, 0, 8, 0, -8]


def test_a_short_block_has_its_own_scale():
    index, absmax = quantize_blockwise(torch.tensor([1.0, 1, 1, 1, 0.25]), THREE, 4)
    assert absmax.tolist() == [1, 0.25] and index.tolist() == [2] * 5
    assert dequantize_blockwise(index, absmax, THREE, 4).tolist() == [1, 1, 1, 1, 0.25]


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("n", [1, 3, 64, 70])
def test_zeros_stay_zeros(kind, n):
    W = quantize_weight(torch.zeros(n), kind)
    assert torch.equal(W.dequantize(), torch.zeros(n)) and not W.absmax.any()


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_in_the_code_book_comes_back_exactly(kind, dtype):
    """Each block is its code book times a power of two, so that no step rounds: coding twice changes nothing."""
    code = CODEBOOKS[kind]().to(dtype)
    W = torch.cat([code.repeat(4) * 4, code.repeat(4) / 8])
    found = quantize_weight(W, kind, 64)
    assert found.absmax.tolist() == [4, 0.125]
    torch.testing.assert_close(found.dequantize(), W, rtol=1e-2 if dtype == torch.bfloat16 else 1e-3, atol=0)
    again = quantize_weight(found.dequantize(), kind, 64)
    assert torch.equal(again.packed, found.packed) and torch.equal(again.dequantize(), found.dequantize())


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_no_number_is_off_by_more_than_half_a_step(kind):
    W = torch.randn(1000)
    found = quantize_weight(W, kind, 64)
    widest = CODEBOOKS[kind]().unique().diff().max()
    bound = found.absmax.repeat_interleave(64)[:1000] * widest / 2
    assert ((found.dequantize() - W).abs() <= bound * (1 + 1e-6)).all()


def test_one_outlier_spoils_its_own_block_only():
    W = torch.full((192,), 0.01)
    W[70] = 100
    found = quantize_weight(W, "nf4", 64).dequantize()
    assert torch.equal(found[:64], W[:64]) and torch.equal(found[128:], W[128:])
    assert found[70] == 100 and not found[64:70].any() and not found[71:128].any()


def test_pack_by_hand():
    assert pack(torch.tensor([1, 2, 15, 0], dtype=torch.uint8)).tolist() == [[0x12], [0xF0]]
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8)).tolist() == [[0x12], [0x37]]  # 7 is NF4's zero
    assert pack(torch.tensor([5], dtype=torch.uint8), filler=0).tolist() == [[0x50]]


@pytest.mark.parametrize("n", [1, 2, 63, 64, 1001])
def test_unpack_undoes_pack(n):
    index = torch.randint(0, 16, (n,), dtype=torch.uint8)
    assert pack(index).shape == ((n + 1) // 2, 1)
    assert torch.equal(unpack(pack(index), n), index)


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 7, 64, 100, 4096])
@pytest.mark.parametrize("shape", [(1,), (5, 3), (7, 64), (33, 130)])
def test_the_table_of_pairs_is_the_plain_formula(kind, block_size, shape):
    W = torch.randn(shape)
    found = quantize_weight(W, kind, block_size)
    index = unpack(found.packed, W.numel())
    expected = dequantize_blockwise(index, found.absmax, found.code, block_size).view(shape)
    assert torch.equal(found.dequantize(), expected)
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(found.dequantize(dtype), expected.to(dtype))  # rounded once


def test_pieces_of_the_table_meet_without_a_seam():
    """`dequantize_reference` takes 65,536 numbers at a time: a weight of several such pieces, and a rest."""
    W = torch.randn(2, 70_001)
    found = quantize_weight(W, "nf4", 96)
    index = unpack(found.packed, W.numel())
    expected = dequantize_blockwise(index, found.absmax, found.code, 96).view(W.shape)
    W = dequantize_reference(found.packed, found.absmax, found.code, W.shape, 96, torch.float32)
    assert torch.equal(W, expected)


def test_a_block_larger_than_the_weight_is_one_block():
    found = quantize_weight(torch.tensor([[1.0, -4], [2.4, 0]]), "int4", 1024)  # in steps of 4/7: 1.75, -7, 4.2, 0
    assert found.absmax.tolist() == [4]
    torch.testing.assert_close(found.dequantize(), torch.tensor([[8 / 7, -4], [16 / 7, 0]]))


# ----------------------------------------------------------------------------------------- double quantization


def test_double_quantization_by_hand():
    """Scales 1, 2, 6: mean 3, left -2, -1, 3; over 3: -2/3, -1/3 and 1. The top decade's steps are 0.9/64 wide."""
    absmax = torch.tensor([1.0, 2, 6])
    index, offset, absmax2 = quantize_scales(absmax)
    assert offset == 3 and absmax2.tolist() == [3] and index.dtype == torch.uint8
    assert index[2] == 255
    found = dequantize_scales(index, offset, absmax2)
    assert found[2] == 6
    assert ((found - absmax).abs() <= 3 * 0.9 / 64 / 2 + 1e-6).all()


def test_each_256_scales_share_one():
    absmax = torch.rand(600) + 0.5
    index, offset, absmax2 = quantize_scales(absmax)
    assert torch.equal(absmax2[1], (absmax - absmax.mean())[256:512].abs().max()) and absmax2.shape == (3,)
    nested = (offset, absmax2, dynamic_codebook())
    assert torch.equal(scales_reference(index, nested), dequantize_scales(index, offset, absmax2))
    assert torch.equal(scales_reference(index[:256], (offset, absmax2[:1], dynamic_codebook())),
                       dequantize_scales(index, offset, absmax2)[:256])  # fmt: skip


def test_unpacking_scales_leaves_them_as_they_were():
    found = quantize_weight(torch.randn(64, 320), "nf4", 64, double_quant=True)
    before = found.absmax.clone(), [t.clone() for t in found.nested]
    assert torch.equal(found.dequantize(), found.dequantize())
    assert torch.equal(found.absmax, before[0])
    assert all(torch.equal(a, b) for a, b in zip(found.nested, before[1], strict=True))


def test_equal_scales_cost_nothing():
    W = torch.tensor([1.0, -0.5]).repeat(640)
    once, twice = quantize_weight(W, "nf4", 64), quantize_weight(W, "nf4", 64, double_quant=True)
    assert torch.equal(once.dequantize(), twice.dequantize())


def test_bits_by_hand():
    assert bits_per_number(double_quant=False) == 4.5
    assert bits_per_number() == 4 + 8 / 64 + 32 / (64 * 256) == pytest.approx(4.126953)
    assert bits_per_number(block_size=128, double_quant=False) == 4.25
    assert bits_per_number(8, 2048, False) == 8 + 1 / 64
    assert NF4().bits == pytest.approx(4.127, abs=1e-3) and FP4().bits == 4.5 == INT4().bits


def test_the_bytes_are_those_of_the_formula():
    """256 x 4096 numbers in blocks of 64: 524,288 bytes of codes, 16,384 scales; or one byte each and 64 of 4."""
    W = torch.randn(256, 4096)
    assert quantize_weight(W).nbytes() == 524_288 + 4 * 16_384 == W.numel() * 4.5 / 8
    assert quantize_weight(W, double_quant=True).nbytes() == 524_288 + 16_384 + 4 * 64 == W.numel() * NF4().bits / 8


# ------------------------------------------------------------------------------------------------- the errors


def gaussian_error(kind, block_size, double_quant=False):
    """Mean squared error on Gaussian weights of variance 1."""
    W = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    return (quantize_weight(W, kind, block_size, double_quant).dequantize() - W).square().mean().item()


def test_the_order_of_the_code_books_on_gaussian_weights():
    nf4, fp4, int4 = (gaussian_error(kind, 64) for kind in ("nf4", "fp4", "int4"))
    assert nf4 < int4 < fp4
    assert nf4 == pytest.approx(0.0085, rel=0.1)


def test_larger_blocks_are_worse_and_double_quantization_costs_next_to_nothing():
    errors = [gaussian_error("nf4", size) for size in (32, 64, 256, 1024)]
    assert errors == sorted(errors)
    assert 1 < gaussian_error("nf4", 64, True) / errors[1] < 1.01


def test_requantized_merge_by_hand():
    """Steps of 1/7: an update of 0.2 steps is gone, one of a whole step is kept."""
    W = torch.arange(-7, 8).repeat(1, 5)[:, :64] / 7
    W[0, 0] = 1
    delta = torch.zeros(1, 64)
    delta[0, 20] = 0.2 / 7
    merged, lost = requantized_merge(W, delta, "int4", 64)
    torch.testing.assert_close(merged.dequantize(), W)
    assert lost == pytest.approx(1)
    merged, lost = requantized_merge(W, delta * 5, "int4", 64)
    torch.testing.assert_close(merged.dequantize(), W + delta * 5)
    assert lost == pytest.approx(0, abs=1e-5)


# -------------------------------------------------------------------------------------------------- the layer


def nf4_linear(d_out=6, d_in=64, bias=True, dtype=torch.float32, double_quant=True, **options):
    bias = nn.Parameter(torch.randn(d_out, dtype=dtype), requires_grad=False) if bias else None
    return NF4Linear(quantize_weight(torch.randn(d_out, d_in, dtype=dtype), double_quant=double_quant), bias, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)])
def test_the_layer_is_a_product_with_the_unpacked_weight(bias, shape):
    layer = nf4_linear(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    y = layer(x)
    plain = nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert torch.equal(y, plain)
    grad = torch.randn(y.shape)
    (ours,), (expected,) = torch.autograd.grad(y, x, grad), torch.autograd.grad(plain, x, grad)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_gradcheck_with_a_trained_bias():
    """In float64: x and the bias get exact gradients."""
    weight = quantize_weight(torch.randn(3, 8), "nf4", 4)
    x, b = torch.randn(2, 8, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x.requires_grad_(), b.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, b: QuantizedProduct.apply(x, b, weight), (x, b))


def test_compute_dtype_is_of_the_products_and_not_of_the_result():
    layer = nf4_linear(compute_dtype=torch.bfloat16)
    x = torch.randn(5, 64)
    y = layer(x)
    assert y.dtype == torch.float32
    expected = nn.functional.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
    assert torch.equal(y, expected.float())


@pytest.mark.parametrize("compute_dtype", [None, torch.float32])
def test_autocast_says_what_is_not_said_otherwise(compute_dtype):
    layer = nf4_linear(compute_dtype=compute_dtype)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    if compute_dtype is None:
        expected = nn.functional.linear(x.bfloat16(), layer.dequantize(torch.bfloat16), layer.bias.bfloat16())
        assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    else:
        assert y.dtype == torch.float32 and torch.equal(y, layer(x))


def test_the_report_of_a_layer():
    text = repr(nf4_linear())
    assert text == "NF4Linear(64, 6, bias=True, nf4, blocks of 64, 8-bit scales)"


def test_a_weight_of_a_conv_and_of_any_shape():
    W = torch.randn(3, 5, 7)
    assert quantize_weight(W, "int4", 10).dequantize().shape == W.shape
    assert isinstance(quantize_weight(W), QuantizedWeight)
    assert math.isclose(quantize_weight(W, "int4", 1).dequantize().sub(W).abs().max().item(), 0, abs_tol=1e-6)


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "W, options, sentence",
    [
        (torch.randn(4).double(), {}, "float32, float16 or bfloat16, not torch.float64"),
        (torch.ones(4, dtype=torch.int8), {}, "float32, float16 or bfloat16, not torch.int8"),
        (torch.empty(0), {}, "the weight is empty"),
        (torch.tensor([1.0, math.inf]), {}, "not finite"),
        (torch.tensor([1.0, math.nan]), {}, "not finite"),
        (torch.ones(4), {"kind": "nf3"}, "kind is 'nf3'"),
        (torch.ones(4), {"block_size": 0}, "block_size is 0"),
        (torch.ones(4), {"block_size": 64.0}, "block_size is 64.0"),
    ],
)
def test_bad_weights_get_a_sentence(W, options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        quantize_weight(W, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"block_size": -1}, "block_size"),
        ({"block_size": True}, "block_size"),
        ({"compute_dtype": torch.int8}, "compute_dtype"),
        ({"compute_dtype": "bfloat16"}, "compute_dtype"),
        ({"double_quant": 1}, "double_quant is 1"),
        ({"targets": ()}, "targets is empty"),
        ({"targets": 5}, "targets"),
    ],
)
def test_bad_settings_get_a_sentence(options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        NF4(**options)
    assert "\n" not in str(error.value)


def test_only_what_bitsandbytes_has_is_translated():
    assert NF4(compute_dtype=torch.bfloat16).to_bitsandbytes() == {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    assert FP4().to_bitsandbytes()["bnb_4bit_quant_type"] == "fp4"
    for setting in (INT4(), NF4(block_size=128)):
        with pytest.raises(ValueError, match="bitsandbytes has no"):
            setting.to_bitsandbytes()
