"""Chapter 03, encoding blocks of weights. Decoding and packing are in qlora_pack.py."""

import torch
import torch.nn.functional as F

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import near, normal, pick, spaced_code
from utils.quantization.blocks import TINY, nearest_code, quantize_blockwise
from utils.quantization.codebooks import nf4_codebook

SHORT = "Right for whole blocks, and wrong where the last block is shorter than block_size."


def block_of(rng, code, count):
    """Numbers of one block, divided by their absmax: the first is 1 or -1, and the second has the other sign."""
    top = len(code) - 1
    places = torch.randint(1, top, (count,), generator=rng)
    negative, positive = (code < -0.1).sum().item(), (code <= 0.1).sum().item()
    if pick(rng, True, False):
        places[0], places[1] = 0, torch.randint(positive, top, (), generator=rng)
    else:
        places[0], places[1] = top, torch.randint(1, negative, (), generator=rng)
    values = near(rng, code, places)
    values[0] = code[places[0]]
    return values


def quantize_cases(rng):
    """In every block some numbers have either sign, so that only the case of zeros meets a zero to divide by.

    The first block, which is the largest, has its largest number first, all others have theirs anywhere.
    """
    nf4, small = nf4_codebook(), pick(rng, 8, 10)
    found = []
    for shape, code, block_size, kinds in (
        ((4, 96), nf4, None, ()),
        ((6, 8), nf4, 16, ()),
        ((4 * small,), spaced_code(rng, 9), small, ()),
        ((3 * small + pick(rng, 3, 5),), nf4, small, ("short",)),
        ((5, pick(rng, 7, 11)), nf4, 64, ("short",)),
        ((4, 8), nf4, 8, ("zeros",)),
        ((6, 4), nf4, 8, ("transposed",)),
        ((3, 32), nf4, 16, ("small",)),
    ):
        n, size = torch.Size(shape).numel(), block_size or 64
        counts = [min(size, n - start) for start in range(0, n, size)]
        scales = 10 ** (torch.rand(len(counts), generator=rng) - 1.2)
        if len(scales) > 1:
            scales[:2], scales[-1] = torch.tensor([0.9, 0.2]), 0.1 + 0.1 * torch.rand((), generator=rng)
        blocks = [scale * block_of(rng, code, count) for scale, count in zip(scales, counts, strict=True)]
        others = [block[torch.randperm(len(block), generator=rng)] for block in blocks[1:]]
        x = torch.cat([blocks[0], *others]).view(shape)
        if "zeros" in kinds:
            x[pick(rng, 1, 2)] = 0
        elif "transposed" in kinds:
            x = x.T.contiguous().T
        elif "small" in kinds:
            x = 1e-12 * x
        inputs = {"x": x, "code": code} | ({"block_size": block_size} if block_size else {})
        later = bool({"zeros", "transposed", "small"} & set(kinds))
        found.append(Case(inputs, kinds, {"block_size": size, "blocks": len(counts)}, later=later))
    half = {"x": in_bfloat16(rng, nf4), "code": nf4}
    return [*found, Case(half, ("bf16",), {"block_size": 64, "blocks": 40}, later=True)]


def in_bfloat16(rng, code):
    """Numbers that fall to the wrong side of a midpoint now and then if they are divided in bfloat16, and never if they
    are in float32."""
    x = normal(rng, 40, 64).bfloat16()
    scaled = x.float() / x.float().abs().amax(1, keepdim=True)
    close = (scaled[..., None] - (code[:-1] + code[1:]) / 2).abs().amin(-1) < 1e-4
    return x.masked_fill(close, 0)


def largest(block):
    return block.abs().max()


def divided(block, scale):
    return block / (scale if scale else TINY)


def quantizer(scale=largest, scaled=divided, order=lambda x: x.reshape(-1), blocks=torch.split,
              done=lambda index, absmax: (index, absmax), of_all=False):  # fmt: skip
    """A quantize_blockwise with something else in it.

    scale: of a block, or of_all numbers   scaled: (block, scale) -> what is looked up
    order: how x is laid out   blocks: (numbers, block_size) -> list of them   done: what is returned
    """

    def quantize_blockwise(x, code, block_size=64):
        numbers = order(x).float()
        parts = blocks(numbers, block_size)
        absmax = torch.stack([scale(numbers if of_all else part) for part in parts])
        values = torch.cat([scaled(part, s) for part, s in zip(parts, absmax, strict=True)])
        return done(nearest_code(values, code), absmax)

    return quantize_blockwise


def by_rows(numbers, block_size):
    return list(numbers)


def by_rows_of(x, code, block_size=64):
    """One block per row, whatever block_size says."""
    rows = x.float() if x.ndim > 1 else x.float()[None]
    absmax = rows.abs().amax(1)
    return nearest_code((rows / absmax[:, None]).reshape(-1), code), absmax


def by_columns(x):
    return x.mT.reshape(-1) if x.ndim > 1 else x


def anew_in_each_row(x, code, block_size=64):
    rows = x.float() if x.ndim > 1 else x.float()[None]
    found = [quantize_blockwise(row, code, block_size) for row in rows]
    return torch.cat([index for index, _ in found]), torch.cat([absmax for _, absmax in found])


def largest_of_columns(x, code, block_size=64):
    """One block per row, and the largest of each column."""
    n = x.numel()
    blocks = F.pad(x.reshape(-1).float(), (0, -n % block_size)).view(-1, block_size)
    absmax = blocks.abs().amax(0)
    return nearest_code((blocks / absmax.clamp(min=TINY)).reshape(-1), code)[:n], absmax


def rest_may_be_empty(x, code, block_size=64):
    numbers = x.reshape(-1).float()
    whole = len(numbers) // block_size * block_size
    absmax = numbers[whole:].abs().max()
    index, others = quantize_blockwise(numbers[:whole], code, block_size)
    return torch.cat([index, nearest_code(numbers[whole:] / absmax, code)]), torch.cat([others, absmax[None]])


def padded_in_front(x, code, block_size=64):
    numbers = x.reshape(-1).float()
    index, absmax = quantizer()(F.pad(numbers, (-len(numbers) % block_size, 0)), code, block_size)
    return index[-len(numbers) :], absmax


def std_with_padding(x, code, block_size=64):
    n = x.numel()
    blocks = F.pad(x.reshape(-1).float(), (0, -n % block_size)).view(-1, block_size)
    return nearest_code((blocks / blocks.std(1).clamp(min=TINY)[:, None]).reshape(-1), code)[:n], blocks.std(1)


def interleaved(x, code, block_size=64):
    """Block i holds every so-many-th number."""
    blocks = x.reshape(block_size, -1).float()
    absmax = blocks.abs().amax(0)
    return nearest_code((blocks / absmax).reshape(-1), code), absmax


def only_whole(numbers, block_size):
    whole = len(numbers) // block_size * block_size
    return torch.split(numbers[:whole], block_size) or (numbers,)


def last_joined(numbers, block_size):
    parts = list(torch.split(numbers, block_size))
    if len(parts) > 1 and len(parts[-1]) < block_size:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def padded_with(filler):
    """The last block is filled up by filler(numbers, count), and what was added is cut off again."""

    def quantize_blockwise(x, code, block_size=64):
        numbers = x.reshape(-1).float()
        longer = torch.cat([numbers, filler(numbers, -len(numbers) % block_size)])
        index, absmax = quantizer()(longer, code, block_size)
        return index[: len(numbers)], absmax

    return quantize_blockwise


def padding_left(x, code, block_size=64):
    numbers = x.reshape(-1).float()
    return quantizer()(F.pad(numbers, (0, -len(numbers) % block_size)), code, block_size)


def signed_largest(block):
    return block[block.abs().argmax()]


def affine(block, scale):
    low, high = block.min(), block.max()
    return 2 * (block - low) / (high - low) - 1


def no_guard(x, code, block_size=64):
    numbers = x.reshape(-1).float()
    parts = numbers.split(block_size)
    values = torch.cat([part / part.abs().max() for part in parts])
    return nearest_code(values, code), torch.stack([part.abs().max() for part in parts])


def divided_in_bfloat16(x, code, block_size=64):
    parts = x.reshape(-1).split(block_size)
    absmax = torch.stack([part.abs().max() for part in parts])
    values = torch.cat([divided(part, scale) for part, scale in zip(parts, absmax, strict=True)])
    return nearest_code(values.float(), code), absmax.float()


def one_for_zero(block):
    return block.abs().max() if block.any() else torch.tensor(1.0)


def in_place(x, code, block_size=64):
    found = quantize_blockwise(x.clone(), code, block_size)
    x /= x.abs().max()
    return found


def by_view(x, code, block_size=64):
    blocks = x.reshape(-1).float().view(-1, block_size)
    absmax = blocks.abs().amax(1)
    return nearest_code((blocks / absmax.clamp(min=TINY)[:, None]).reshape(-1), code), absmax


def by_view_of_x(x, code, block_size=64):
    return quantize_blockwise(x.view(-1), code, block_size)


def by_padding(x, code, block_size=64):
    n = x.numel()
    blocks = F.pad(x.float().flatten(), (0, -n % block_size)).unflatten(0, (-1, block_size))
    absmax = blocks.abs().max(dim=1, keepdim=True).values
    values = torch.nan_to_num(blocks / absmax, nan=0.0).flatten()[:n]
    return nearest_code(values, code), absmax[:, 0]


def by_scatter(x, code, block_size=64):
    numbers = x.flatten().float()
    where = torch.arange(len(numbers)) // block_size
    absmax = torch.zeros(where[-1] + 1).scatter_reduce(0, where, numbers.abs(), "amax")
    scale = torch.where(absmax > 0, absmax, 1)
    values = numbers / scale[where]
    return (values[:, None] - code).abs().argmin(1).to(torch.uint8), absmax


ONE_SCALE = (
    "All weights share one absmax: your blocks are not apart. Then one huge weight spoils the whole tensor; each block "
    "of {block_size} needs its own."
)
STD = (
    "You divided by the standard deviation. The largest weight would lie far outside [-1, 1] and be cut off: divide by "
    "the largest magnitude."
)
PADDED = (
    "You filled up the last block with numbers that change its absmax. Fill it with zeros, or do that block by itself."
)

QUANTIZE_BLOCKWISE = Exercise(
    name="quantize_blockwise",
    reference=quantize_blockwise,
    cases=quantize_cases,
    mistakes=(
        Mistake("one_scale", quantizer(of_all=True, done=lambda index, absmax: (index, absmax[:1])), ONE_SCALE),
        Mistake("one_scale_without_an_axis", quantizer(of_all=True, done=lambda index, absmax: (index, absmax[0])),
                ONE_SCALE),
        Mistake("one_scale_for_each_block", quantizer(of_all=True), ONE_SCALE),
        Mistake("largest_signed", quantizer(torch.max),
                "You took the largest number of a block, and a negative one may be larger in size. absmax is the "
                "largest magnitude: abs() before max()."),
        Mistake("signed_absmax", quantizer(signed_largest),
                "Your absmax has the sign of the largest weight. absmax is positive; the code book has -1 as well as "
                "1."),
        Mistake("std", quantizer(torch.std), STD),
        Mistake("std_with_padding", std_with_padding, STD),
        Mistake("mean", quantizer(lambda block: block.abs().mean()),
                "You divided by the mean magnitude. Weights above it would be cut off at 1: divide by the largest."),
        Mistake("norm", quantizer(torch.linalg.norm),
                "You divided by the block's norm. Then no weight reaches 1, and the outer codes are never used: divide "
                "by the largest magnitude."),
        Mistake("affine", quantizer(scaled=affine),
                "You mapped smallest to -1 and largest to 1. That moves zero; here zero stays zero, and a block is "
                "only divided by its absmax."),
        Mistake("columns", quantizer(order=by_columns),
                "Your blocks run down the columns. They follow the weight as it lies in memory: row after row."),
        Mistake("rows", by_rows_of,
                "You made one block of each row. Blocks hold block_size numbers, wherever a row ends."),
        Mistake("anew_in_each_row", anew_in_each_row,
                "Your blocks begin anew in each row. They run on through the whole weight: block_size neighbours, "
                "wherever a row ends."),
        Mistake("largest_of_columns", largest_of_columns,
                "With a block in each row you took the largest of each column. amax(1) goes along the rows, and gives "
                "one number per block."),
        Mistake("always_64", lambda x, code, block_size=64: quantize_blockwise(x, code),
                "You wrote 64. Use the argument block_size: it is {block_size} here."),
        Mistake("interleaved", interleaved,
                "Your blocks take every so-many-th number. A block is block_size neighbours: view(-1, block_size) puts "
                "one in each row."),
        Mistake("dropped", quantizer(blocks=only_whole),
                "What is left over after the last whole block is lost. It is a block of its own, with its own absmax."),
        Mistake("joined", quantizer(blocks=last_joined),
                "You added what is left over to the last whole block. It is a block of its own, with its own absmax."),
        Mistake("padded_with_ones", padded_with(lambda numbers, count: torch.ones(count)), PADDED),
        Mistake("padded_with_the_first", padded_with(lambda numbers, count: numbers[:1].expand(count)), PADDED),
        Mistake("padded_cyclically", padded_with(lambda numbers, count: numbers.repeat(count + 1)[:count]), PADDED),
        Mistake("padded_in_front", padded_in_front,
                "You put the zeros before the first number, so that every block begins elsewhere. They come after the "
                "last number."),
        Mistake("padding_left", padding_left,
                "Your index still holds the zeros that filled up the last block. Cut it to x.numel() numbers."),
        Mistake("not_scaled", quantizer(scaled=lambda block, scale: block),
                "You looked up the weights themselves. Divide each block by its absmax first, so that it fills "
                "[-1, 1]."),
        Mistake("multiplied", quantizer(scaled=lambda block, scale: block * scale),
                "You multiplied by absmax where you should divide: scaled to [-1, 1], the largest weight is 1 or -1."),
        Mistake("reciprocal", quantizer(done=lambda index, absmax: (index, 1 / absmax)),
                "Your second value is 1 / absmax. Return absmax itself: decoding multiplies by it."),
        Mistake("swapped", quantizer(done=lambda index, absmax: (absmax, index)),
                "The two are returned in the wrong order: index first, then absmax."),
        Mistake("one_for_zero", quantizer(one_for_zero),
                "A block of zeros has absmax 0, and you return 1 for it. Divide by something else than 0 there, and "
                "return what absmax is."),
        Mistake("at_least_1e-8", quantizer(scaled=lambda block, scale: block / scale.clamp(min=1e-8)), None,
                "all below 1e-8"),
        Mistake("plus_1e-8", quantizer(scaled=lambda block, scale: block / (scale + 1e-8)), None, "all below 1e-8"),
        Mistake("rest_may_be_empty", rest_may_be_empty, None, "there is no rest"),
        Mistake("no_guard", no_guard, None, "A block of zeros comes out wrong: 0 / 0 is NaN"),
        Mistake("divided_in_bfloat16", divided_in_bfloat16, None, "Right in float32 and wrong in bfloat16"),
        Mistake("whole_blocks_only", by_view, None, SHORT),
        Mistake("view", by_view_of_x, None, "fails where its rows do not lie one after the other"),
        Mistake("index_in_shape", lambda x, *rest: (quantize_blockwise(x, *rest)[0].view(x.shape),
                quantize_blockwise(x, *rest)[1]), None, "The first returned value, index: Wrong shape"),
        Mistake("absmax_as_a_column", quantizer(done=lambda index, absmax: (index, absmax[:, None])), None,
                "The second returned value, absmax: Wrong shape"),
        Mistake("absmax_in_bfloat16", lambda x, *rest: (quantize_blockwise(x, *rest)[0],
                quantize_blockwise(x, *rest)[1].to(x.dtype)), None, "absmax is to be float32, you returned bfloat16"),
        Mistake("in_place", in_place, None, "Your function changed x"),
        Mistake("index_alone", quantizer(done=lambda index, absmax: index), None, "a Tensor, and a tuple of 2"),
    ),
    alternatives=(quantizer(), by_padding, by_scatter, padded_with(lambda numbers, count: torch.zeros(count))),
    returns=("index", "absmax"),
    explain={
        "Expected reduction dim": "Where the blocks are whole there is no rest, and of no numbers none is the largest.",
    },
    kinds={
        "short": SHORT,
        "small": "Blocks of small numbers (all below 1e-8) come out wrong: what stands in for an absmax of 0 must be "
        "smaller than any absmax. Use TINY.",
        "zeros": "A block of zeros comes out wrong: 0 / 0 is NaN, and NaN is near to nothing. Divide by a tiny number "
        "instead of an absmax of 0.",
        "bf16": "Right in float32 and wrong in bfloat16. Divide in float32: a quotient in bfloat16 has 8 significant "
        "bits and may land on the wrong side of a midpoint.",
        "transposed": "Works for a matrix and fails where its rows do not lie one after the other in memory, as in a "
        "transposed one. reshape copies where view cannot.",
    },
    fact="A float32 scale for every 64 weights is half a bit per weight. You will halve that and halve it again.",
)

EXERCISES = (QUANTIZE_BLOCKWISE,)
