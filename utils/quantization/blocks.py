"""Block-wise absmax quantization: a code book number per weight, and one scale per block of weights.

    index_i = the code nearest to w_i / absmax        w_i' = code[index_i] absmax        absmax = max |w| over the block

Blocks run over the weight as it lies in memory, row after row; the last one may be shorter. A short block confines
what one huge weight can spoil, and costs a scale. Bytes and scales are those of bitsandbytes (tests compare them).
"""

import torch

from utils.quantization.codebooks import dynamic_codebook

TINY = 1e-38  # instead of a zero absmax: an all-zero block becomes zeros, not NaN


def nearest_code(values, code):
    """The place of the nearest code book number for each value; of two equally near, the lower one.

    values: (n,), in [-1, 1]   code: (k,), k <= 256, in any order   returns (n,) uint8
    """
    code, order = code.sort(stable=True)
    midpoints = (code[:-1] + code[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(values, midpoints, out_int32=True)]


def quantize_blockwise(x, code, block_size=64):
    """Encode numbers in blocks, each divided by its largest magnitude. The last block may be shorter.

    x: any shape, floating point   code: (k,), k <= 256, in [-1, 1]   block_size: numbers per block, 1 or more
    returns (index, absmax): (n,) uint8 in row-major order, and (blocks,) float32
    """
    x = x.reshape(-1).float()
    whole = len(x) - len(x) % block_size
    blocks = x[:whole].view(-1, block_size)
    absmax = blocks.abs().amax(1)
    # Multiplied by the reciprocal and not divided, as in bitsandbytes: the two round differently now and then.
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).reshape(-1)
    if whole < len(x):
        last = x[whole:].abs().max()
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, x[whole:] / last.clamp(min=TINY)])  # here bitsandbytes divides
    return nearest_code(scaled, code), absmax


def dequantize_blockwise(index, absmax, code, block_size=64):
    """Decode what `quantize_blockwise` made.

    index: (n,), any integer dtype   absmax: (blocks,) float32   code: (k,) float32   returns (n,) float32
    """
    values = code[index.long()]
    return values * absmax.repeat_interleave(block_size)[: len(values)]


def affine_blockwise(x, block_size=64):
    """Encode numbers in 16 even steps from a block's smallest to its largest, instead of a code book times absmax.

    Two scales per block, `low` and `step`: a block of one sign wastes no pattern on the other. Zero is no longer exact.
    x: any shape, floating point   block_size: numbers per block, the last block may be shorter
    returns (index, low, step): (n,) uint8 below 16, (blocks,) float32, (blocks,) float32
    """
    x = x.reshape(-1).float()
    filler = x[-1:].expand(-len(x) % block_size)  # of a short last block: neither its smallest nor its largest changes
    blocks = torch.cat([x, filler]).view(-1, block_size)
    low, high = blocks.aminmax(dim=1)
    step = (high - low) / 15
    index = ((blocks - low[:, None]) / step.clamp(min=TINY)[:, None]).round()
    return index.to(torch.uint8).reshape(-1)[: len(x)], low, step


def dequantize_affine(index, low, step, block_size=64):
    """Decode what `affine_blockwise` made: low + index step.

    index: (n,), any integer dtype   low, step: (blocks,) float32   returns (n,) float32
    """
    low, step = (t.repeat_interleave(block_size)[: len(index)] for t in (low, step))
    return low + index * step


def pack(index, filler=7):
    """Two 4-bit numbers per byte, the first of each pair in the high four bits.

    index: (n,) uint8, each below 16   filler: partner of an odd last one; 7 is NF4's zero
    returns (ceil(n / 2), 1) uint8
    """
    if len(index) % 2:
        index = torch.cat([index, index.new_full((1,), filler)])
    return (index[0::2] << 4 | index[1::2])[:, None]


def unpack(packed, n):
    """The n 4-bit numbers in these bytes.

    packed: (ceil(n / 2), 1) uint8   returns (n,) uint8
    """
    packed = packed.reshape(-1)
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:n]


def quantize_scales(absmax, group=256):
    """Double quantization: the scales' mean in float32, and what is left of each in 8 bits (QLoRA, section 3).

    Scales are positive and much alike; with their mean subtracted, both signs of the dynamic code book are in use.
    absmax: (blocks,) float32   group: scales that share a second scale
    returns (index, offset, absmax2): (blocks,) uint8, a float32 number as a tensor, (groups,) float32
    """
    offset = absmax.mean()
    index, absmax2 = quantize_blockwise(absmax - offset, dynamic_codebook().to(absmax.device), group)
    return index, offset, absmax2


def dequantize_scales(index, offset, absmax2, code=None, group=256):
    """The scales that `quantize_scales` kept.

    index: (blocks,) uint8   offset: a number   absmax2: (groups,) float32   code: (256,), None: the dynamic one
    returns (blocks,) float32
    """
    code = dynamic_codebook().to(absmax2.device) if code is None else code
    return dequantize_blockwise(index, absmax2, code, group) + offset


def bits_per_number(bits=4, block_size=64, double_quant=True, group=256):
    """Bits that one weight costs, scales included.

    A scale is 32 bits for `block_size` weights. Double quantized it is 8 bits, and 32 more for `group` scales. (The
    scales' mean, once per tensor, is not counted.)
    bits: of the code   returns a float, not rounded
    """
    scale = 8 + 32 / group if double_quant else 32
    return bits + scale / block_size
