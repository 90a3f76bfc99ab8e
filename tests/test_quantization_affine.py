"""Affine 4 bits: a smallest number and a step per block."""

import pytest
import torch

from utils.quantization.blocks import affine_blockwise, dequantize_affine, dequantize_blockwise, quantize_blockwise
from utils.quantization.codebooks import int4_codebook


def test_by_hand():
    # the first block runs from -1 to 2 in steps of 0.2, the short last one from 3 to 6
    index, low, step = affine_blockwise(torch.tensor([[-1.0, 2, 0, 0.55], [0.25, 6, 3, 4.15]]), 5)
    assert index.tolist() == [0, 15, 5, 8, 6, 15, 0, 6] and index.dtype == torch.uint8
    assert low.tolist() == [-1, 3]
    torch.testing.assert_close(step, torch.tensor([0.2, 0.2]))
    back = dequantize_affine(index, low, step, 5)
    torch.testing.assert_close(back, torch.tensor([-1, 2, 0, 0.6, 0.2, 6, 3, 4.2]))


def test_whole_numbers_come_back():
    x = torch.arange(32.0).view(2, 16) - 7
    index, low, step = affine_blockwise(x, 16)
    assert index.tolist() == 2 * list(range(16)) and low.tolist() == [-7, 9] and step.tolist() == [1, 1]
    assert torch.equal(dequantize_affine(index, low, step, 16), x.flatten())


@pytest.mark.parametrize("n, block_size", [(64, 64), (1000, 64), (65, 64), (1, 64), (63, 7)])
def test_no_number_is_off_by_more_than_half_a_step(n, block_size):
    x = torch.randn(n)
    index, low, step = affine_blockwise(x, block_size)
    assert len(low) == len(step) == -(-n // block_size)
    back = dequantize_affine(index, low, step, block_size)
    half = step.repeat_interleave(block_size)[:n] / 2
    assert ((back - x).abs() <= half * 1.0001 + 1e-7).all()


def test_equal_numbers_stay_themselves():
    x = torch.tensor([0.0, 0, 0, 2.5, 2.5])
    assert torch.equal(dequantize_affine(*affine_blockwise(x, 3), 3), x)


def test_a_block_of_one_sign_loses_less_than_with_absmax():
    x = torch.rand(4096) + 1
    affine = dequantize_affine(*affine_blockwise(x))
    absmax = dequantize_blockwise(*quantize_blockwise(x, int4_codebook()), int4_codebook())
    assert (affine - x).norm() < 0.3 * (absmax - x).norm()


def test_half_precision_is_read_in_float32():
    x = torch.randn(100).bfloat16()
    for mine, wide in zip(affine_blockwise(x), affine_blockwise(x.float()), strict=True):
        assert torch.equal(mine, wide)
