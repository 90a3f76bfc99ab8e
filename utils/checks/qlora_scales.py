"""Chapter 03, double quantization."""

import torch
import torch.nn.functional as F

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.quantization import blocks
from utils.quantization.blocks import quantize_blockwise
from utils.quantization.codebooks import dynamic_codebook, nf4_codebook


def draw_scales(rng, count, group, mirrored=False):
    """Scales, a few of them much larger than the rest, or mirrored, much smaller; no index hangs on the last bit."""
    code = dynamic_codebook()
    while True:
        absmax = 2 * normal(rng, count, std=0.3).exp()
        absmax = 8 - absmax if mirrored else absmax
        centred = absmax - absmax.mean()
        largest = F.pad(centred.abs(), (0, -count % group)).view(-1, group).amax(1).repeat_interleave(group)[:count]
        if ((centred / largest)[:, None] - (code[:-1] + code[1:]) / 2).abs().min() > 3e-6:
            return absmax


def scale_cases(rng):
    drawn = [(512, 256), (pick(rng, 97, 101, 110), 16), (pick(rng, 300, 330), 256), (128, 32)]
    return [
        Case({"absmax": draw_scales(rng, count, group, mirrored=count == 128), "group": group},
             ("short",) if count % group else (), {"count": count, "group": group})  # fmt: skip
        for count, group in drawn
    ]


def doubled(offset=torch.mean, times=1, code=dynamic_codebook, fixed=None):
    """A quantize_scales with another offset, code book or group."""

    def quantize_scales(absmax, group=256):
        index, absmax2 = quantize_blockwise(absmax - times * offset(absmax), code(), fixed or group)
        return index, offset(absmax), absmax2

    return quantize_scales


def returning(what):
    """A quantize_scales that returns something else of the right parts."""

    def quantize_scales(absmax, group=256):
        return what(*blocks.quantize_scales(absmax, group))

    return quantize_scales


def uncentred_scale(absmax, group=256):
    offset, code = absmax.mean(), dynamic_codebook()
    _, absmax2 = quantize_blockwise(absmax, code, group)
    scaled = (absmax - offset) / absmax2.repeat_interleave(group)[: len(absmax)]
    return blocks.nearest_code(scaled, code), offset, absmax2


def offset_per_group(absmax, group=256):
    offset = torch.stack([part.mean() for part in absmax.split(group)])
    centred = absmax - offset.repeat_interleave(group)[: len(absmax)]
    index, absmax2 = quantize_blockwise(centred, dynamic_codebook(), group)
    return index, offset, absmax2


def not_scaled(absmax, group=256):
    _, offset, absmax2 = blocks.quantize_scales(absmax, group)
    return blocks.nearest_code(absmax - offset, dynamic_codebook()), offset, absmax2


def signed_largest(absmax, group=256):
    """The largest number of a group instead of the largest magnitude."""
    offset = absmax.mean()
    absmax2 = torch.stack([part.max() for part in (absmax - offset).split(group)])
    scaled = (absmax - offset) / absmax2.repeat_interleave(group)[: len(absmax)]
    return blocks.nearest_code(scaled, dynamic_codebook()), offset, absmax2


def scales_in_place(absmax, group=256):
    offset = absmax.mean()
    absmax -= offset
    index, absmax2 = quantize_blockwise(absmax, dynamic_codebook(), group)
    return index, offset, absmax2


def whole_groups_only(absmax, group=256):
    """Fails where the last group is short."""
    offset, code = absmax.mean(), dynamic_codebook()
    centred = (absmax - offset).view(-1, group)
    absmax2 = centred.abs().amax(1)
    return blocks.nearest_code((centred / absmax2[:, None]).flatten(), code), offset, absmax2


def scales_by_groups(absmax, group=256):
    offset, code = absmax.sum() / absmax.numel(), dynamic_codebook()
    indices, largest = [], []
    for part in (absmax - offset).split(group):
        largest.append(part.abs().max())
        indices.append((part[:, None] / largest[-1] - code).abs().argmin(1).to(torch.uint8))
    return torch.cat(indices), offset, torch.stack(largest)


def scales_by_padding(absmax, group=256):
    offset = absmax.mean(dim=0)
    centred = F.pad(absmax - offset, (0, -len(absmax) % group)).view(-1, group)
    absmax2 = torch.maximum(centred.amax(1), -centred.amin(1))
    index = blocks.nearest_code((centred / absmax2[:, None]).flatten()[: len(absmax)], dynamic_codebook())
    return index, offset, absmax2


def scales_as_a_list(absmax, group=256):
    offset = torch.mean(absmax)
    quantized = quantize_blockwise(torch.sub(absmax, offset), dynamic_codebook(True), block_size=group)
    return [quantized[0], offset, quantized[1]]


QUANTIZE_SCALES = Exercise(
    name="quantize_scales",
    reference=blocks.quantize_scales,
    cases=scale_cases,
    mistakes=(
        Mistake("offset_min", doubled(torch.min),
                "Your offset is the smallest scale. It is the mean: then the differences lie on both sides of 0, and "
                "the signed code book uses both."),
        Mistake("offset_max", doubled(torch.max), "Your offset is the largest scale. It is the mean."),
        Mistake("offset_median", doubled(torch.median),
                "Your offset is the median of the scales. bitsandbytes, and this exercise, take the mean."),
        Mistake("no_offset", doubled(lambda absmax: torch.zeros(())),
                "There is no offset. Scales are all positive: without their mean taken off, the negative half of the "
                "code book is idle."),
        Mistake("offset_unused", doubled(times=0),
                "You return the mean, and it was not subtracted. Encode absmax - offset; decoding adds it again."),
        Mistake("offset_twice", doubled(times=2), "The offset was subtracted twice."),
        Mistake("offset_added", doubled(times=-1), "You added the offset. Decoding adds it, so encoding subtracts it."),
        Mistake("offset_per_group", offset_per_group,
                "You took a mean for each group. There is one offset, the mean of all scales: a number, not a row of "
                "them."),
        Mistake("unsigned", doubled(code=lambda: dynamic_codebook(signed=False)),
                "You took the unsigned code book, 0 to 1. Half of the differences from the mean are negative: "
                "dynamic_codebook() is signed."),
        Mistake("four_bits", doubled(code=nf4_codebook),
                "You encoded the scales with NF4's 16 numbers. Scales get 8 bits: the 256 of dynamic_codebook()."),
        Mistake("even_codes", doubled(code=lambda: torch.linspace(-1, 1, 256)),
                "You took 256 evenly spaced numbers. The format has the dynamic code book: dynamic_codebook()."),
        Mistake("one_group", doubled(fixed=10**9),
                "All scales share one second scale. There is one for every `group` scales."),
        Mistake("group_64", doubled(fixed=64),
                "Your groups are of 64: that is the default of quantize_blockwise, the block size of the weights. Hand "
                "`group` to it."),
        Mistake("group_256", doubled(fixed=256), "You wrote 256. Use the argument group; here it is {group} too."),
        Mistake("uncentred_scale", uncentred_scale,
                "Your second scales are the largest scales themselves. Take the offset off first: absmax2 is the "
                "largest |absmax - offset| of a group."),
        Mistake("signed_largest", signed_largest,
                "Your absmax2 is the largest difference of a group, not the largest magnitude: a negative one may be "
                "larger. quantize_blockwise does it right."),
        Mistake("not_scaled", not_scaled,
                "You looked up absmax - offset as it is. Divide by the largest magnitude of its group first, as "
                "quantize_blockwise does."),
        Mistake("order", returning(lambda index, offset, absmax2: (index, absmax2, offset)),
                "The order of what you return is index, offset, absmax2; your last two are swapped."),
        Mistake("offset_first", returning(lambda index, offset, absmax2: (offset, index, absmax2)),
                "The order of what you return is index, offset, absmax2; your first two are swapped."),
        Mistake("code_numbers", returning(lambda index, offset, absmax2: (
                    dynamic_codebook()[index.long()], offset, absmax2)),
                "Your first value holds the numbers of the code book. What is stored is their place in it, one byte "
                "each."),
        Mistake("two_values", returning(lambda index, offset, absmax2: (index, absmax2)), None,
                "a tuple of 2, and a tuple of 3 is expected"),
        Mistake("offset_a_float", returning(lambda index, offset, absmax2: (index, offset.item(), absmax2)), None,
                "The second returned value, offset: Yours returned a float, and a Tensor is expected"),
        Mistake("wide_index", returning(lambda index, offset, absmax2: (index.long(), offset, absmax2)), None,
                "wrong dtype: index is to be uint8, you returned int64"),
        Mistake("whole_groups_only", whole_groups_only, None, "the last group may be short"),
        Mistake("in_place", scales_in_place, None, "Your function changed absmax (max difference "),
    ),
    alternatives=(scales_by_groups, scales_by_padding, scales_as_a_list),
    returns=("index", "offset", "absmax2"),
    kinds={"short": "Right where the scales fill whole groups, and wrong where not: the last group may be short."},
    fact=f"256 scales were {256 * 32:,} bits and are {256 * 8 + 32:,} now: 256 indices and one float32.",
)
