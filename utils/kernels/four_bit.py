"""Weights of 4 bits: unpacking them, and multiplying with them.

    w_i = code[index_i] absmax_block(i)        two indices per byte, the first of a pair in the high four bits
    absmax_b = code2[absmax_b] absmax2_group(b) + offset        where the scales are double quantized

See utils.quantization for what the numbers mean and how they are made.
"""

import torch


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
    step = max(1, 2**16 // block_size) * block_size
    for start in range(0, whole, step):
        end = min(start + step, whole)
        values = pairs.index_select(0, packed[start // 2 : end // 2].int()).view(torch.float32)
        blocks = values.view(-1, block_size) * scales[start // block_size : end // block_size, None]
        out[start:end] = blocks.view(-1)
    if whole < n:
        values = pairs.index_select(0, packed[whole // 2 :].int()).view(torch.float32)[: n - whole]
        out[whole:] = values * scales[whole // block_size :].repeat_interleave(block_size)[: n - whole]
    return out.view(shape)


def dequantize(packed, absmax, code, shape, block_size, dtype, nested=None):
    """`dequantize_reference`, by a kernel where Triton runs."""
    return dequantize_reference(packed, absmax, code, shape, block_size, dtype, nested)
