"""Code books: the 16 (or 256) numbers that a quantized weight may be, before it is multiplied by its block's scale.

NF4     quantiles of the normal distribution: QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314), appendix E
FP4     4-bit floating point: one sign bit, two of exponent, one of mantissa, with bitsandbytes' choice of the smallest
INT4    the whole numbers -7 ... 7, divided by 7: evenly spaced, zero among them, one of the 16 patterns unused
Lloyd   fitted to a sample, so that the mean squared error is as small as it can be (Lloyd 1957, Max 1960)
dynamic 256 numbers over seven decades, for scales and for the moments of 8-bit Adam (Dettmers 2015,
        https://arxiv.org/abs/1511.04561)

All lie in [-1, 1]. All but FP4 are in rising order; FP4's are in the order of their bit patterns. All are
float32, under whatever torch.set_default_dtype says: models are often built under bfloat16.
"""

from statistics import NormalDist

import torch

# The outermost probability that NF4 looks up: halfway between 1 - 1/32 and 1 - 1/30, the outermost of 16 and of 15
# equal bins with half a bin to spare. bitsandbytes rounds it to seven digits, and so do we, to get the same floats.
NF4_OFFSET = 0.9677083


def nf4_codebook(offset=NF4_OFFSET):
    """The 16 numbers of NF4: 7 negative, 0 and 8 positive quantiles of N(0, 1), divided by the largest.

    Positive: the quantiles at the first 8 of 9 evenly spaced probabilities from `offset` down to 1/2.
    Negative: minus the quantiles at the first 7 of 8 from `offset` down to 1/2.   Zero is in it exactly.
    offset: probability of the largest quantile, between 1/2 and 1
    returns (16,) float32, rising from -1 to 1; the probabilities are spaced in float32
    """
    quantile = NormalDist().inv_cdf
    positive = [quantile(p) for p in torch.linspace(offset, 0.5, 9, dtype=torch.float32)[:-1].tolist()]
    negative = [-quantile(p) for p in torch.linspace(offset, 0.5, 8, dtype=torch.float32)[:-1].tolist()]
    code = torch.tensor(sorted([*negative, 0.0, *positive]), dtype=torch.float32)
    return code / code.max()


def fp4_codebook():
    """The 16 numbers of bitsandbytes' FP4 by bit pattern: eight magnitudes, then the same with a minus.

    In units of 1/12: 0, 1/16, 8, 12, 4, 6, 2, 3. The second is a subnormal, so small that 0 and it are nearly one.
    returns (16,) float32
    """
    magnitudes = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float32)
    return torch.cat([magnitudes, 0 - magnitudes]) / 12  # 0 - 0 is 0, and -0 is not: the file has the former


def int4_codebook():
    """The whole numbers -7 ... 7 divided by 7, 15 of the 16 patterns.

    returns (16,) float32; the last number is a 1 again, which no weight ever needs
    """
    return torch.tensor([*range(-7, 8), 7], dtype=torch.float32) / 7


def lloyd_step(values, code):
    """One round of Lloyd's algorithm: give each value to its nearest code, move each code to the mean of its values.

    values: (n,)   code: (k,), rising   returns (k,); a code that got no value stays where it is
    No round makes the mean squared error larger.
    """
    midpoints = (code[:-1] + code[1:]) / 2
    nearest = torch.bucketize(values, midpoints)
    count = torch.bincount(nearest, minlength=len(code))
    total = torch.zeros_like(code).index_add_(0, nearest, values)
    return torch.where(count > 0, total / count, code)


def lloyd_codebook(values, rounds=200):
    """A code book of 16 fitted to values in [-1, 1], with -1 and 1 held: a block's largest weight must stay itself.

    values: (n,), weights already divided by the absmax of their blocks   returns (16,) float32, rising
    """
    code, values = nf4_codebook(), values.float()
    for _ in range(rounds):
        code = lloyd_step(values, code)
        code[0], code[-1] = -1, 1
    return code


def dynamic_codebook(signed=True):
    """bitsandbytes' dynamic map for 8 bits: seven decades, each with twice as many numbers as the one below it.

    In decade i = 0 ... 6, from 10^(i-7) to 10^(i-6), lie 2^i numbers (2^(i+1) if unsigned), each in the middle of one
    of so many equal steps; signed, their negatives too. To these come 0 and 1: 2 * 127 + 2 = 256.
    returns (256,) float32, rising: from -0.993 to 1 if signed, from 0 to 1 if not
    """
    numbers = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        numbers += middles.tolist() + ((-middles).tolist() if signed else [])
    return torch.tensor(sorted(numbers), dtype=torch.float32)
