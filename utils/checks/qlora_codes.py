"""Chapter 03, code books and scales: Lloyd's algorithm, double quantization, bits per weight."""

import torch
import torch.nn.functional as F

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.quantization import blocks, codebooks
from utils.quantization.blocks import quantize_blockwise
from utils.quantization.codebooks import dynamic_codebook, nf4_codebook

# ------------------------------------------------------------------------------------------------- lloyd_step


def lloyd_cases(rng):
    """Values keep away from the midpoints, where rounding would decide; the last code book has idle numbers."""
    five = normal(rng, 5).sort().values
    idle = torch.tensor([-9, -8, -0.5, 0.3, 0.6, 9])
    drawn = [(nf4_codebook(), 900, 0.4, ()), (five, pick(rng, 150, 190), 1.0, ()), (idle, 300, 0.5, ("idle",))]
    cases = []
    for code, n, std, kinds in drawn:
        values = normal(rng, n, std=std).clamp(-3, 3)
        if kinds:  # nobody's nearest is 0.3
            values = values[(values < -0.15) | (values > 0.5)]
        middle = (code[:-1] + code[1:]) / 2
        values = values[(values[:, None] - middle).abs().amin(1) > 1e-4]
        cases.append(Case({"values": values, "code": code}, kinds, {"n": len(values), "k": len(code)}))
    return cases


def groups_of(values, code):
    """The values of each number of the code book, as a list."""
    nearest = (values[:, None] - code).abs().argmin(1)
    return [values[nearest == i] for i in range(len(code))]


def stepping(centre, idle=lambda number: number):
    """A lloyd_step that moves a number to another centre of its values, or does something else to an idle one."""

    def lloyd_step(values, code):
        mine = zip(groups_of(values, code), code, strict=True)
        return torch.stack([centre(group) if len(group) else idle(number) for group, number in mine])

    return lloyd_step


def cutting(cut):
    """A lloyd_step with another rule for which number a value belongs to."""

    def lloyd_step(values, code):
        nearest = cut(values, code).clamp(0, len(code) - 1)
        count = torch.bincount(nearest, minlength=len(code))
        total = torch.zeros_like(code).index_add_(0, nearest, values)
        return torch.where(count > 0, total / count, code)

    return lloyd_step


def holding(hold):
    """A lloyd_step after which some numbers are put back."""

    def lloyd_step(values, code):
        return hold(codebooks.lloyd_step(values, code), code)

    return lloyd_step


def with_ends(new, code):
    return torch.cat([code[:1], new[1:-1], code[-1:]])


def with_unit_ends(new, code):
    return torch.cat([torch.tensor([-1.0]), new[1:-1], torch.tensor([1.0])])


def lloyd_wrong_axis(values, code):
    return values[(values[:, None] - code).abs().argmin(0)]


def lloyd_no_mean(values, code):
    count = torch.bincount(torch.bucketize(values, (code[:-1] + code[1:]) / 2), minlength=len(code))
    return stepping(torch.sum)(values, code) / torch.where(count > 0, len(values), 1)


def lloyd_from_the_old(values, code):
    """The sum starts at the old number."""
    groups = groups_of(values, code)
    return torch.stack([(number + g.sum()) / max(len(g), 1) for g, number in zip(groups, code, strict=True)])


def lloyd_one_more(values, code):
    return stepping(lambda group: group.sum() / (len(group) + 1), torch.zeros_like)(values, code)


def lloyd_many_rounds(values, code):
    for _ in range(60):
        code = codebooks.lloyd_step(values, code)
    return code


def lloyd_drops_idle(values, code):
    return torch.stack([group.mean() for group in groups_of(values, code) if len(group)])


def lloyd_in_place(values, code):
    for i, group in enumerate(groups_of(values, code)):
        if len(group):
            code[i] = group.mean()
    return code


def lloyd_while_walking(values, code):
    """The assignment is made anew after each number has moved."""
    code = code.clone()
    for i in range(len(code)):
        mine = values[(values[:, None] - code).abs().argmin(1) == i]
        if len(mine):
            code[i] = mine.mean()
    return code


def lloyd_by_argmin(values, code):
    new = code.clone()
    nearest = (values[:, None] - code[None, :]).abs().argmin(dim=1)
    for i in range(len(code)):
        if (nearest == i).any():
            new[i] = values[nearest == i].mean()
    return new


def lloyd_by_scatter(values, code):
    nearest = torch.searchsorted((code[1:] + code[:-1]) / 2, values)
    return code.scatter_reduce(0, nearest, values, "mean", include_self=False)


def lloyd_by_matrix(values, code):
    member = F.one_hot((values[:, None] - code).square().argmin(-1), len(code)).to(values.dtype)
    count = member.sum(0)
    return (values @ member + code * (count == 0)) / count.clamp(min=1)


ENDS = (
    "You held the two ends of the code book. Whoever needs -1 and 1 in it puts them back after each step; in the step "
    "itself every number that has values moves."
)
IDLE_TO_ZERO = (
    "A number that got no value became 0: its sum is 0, divided by something you put in place of a count of 0. It "
    "stays where it is."
)
MEDIAN = "You took the median of the values. The squared error is smallest at their mean."

LLOYD_STEP = Exercise(
    name="lloyd_step",
    reference=codebooks.lloyd_step,
    cases=lloyd_cases,
    mistakes=(
        Mistake("wrong_axis", lloyd_wrong_axis,
                "You moved each number of the code book to the one value that is nearest to it: argmin ran over the "
                "values. Let each value look for its number, then take the mean of all that chose it."),
        Mistake("sum", stepping(torch.sum),
                "You took the sum of the values that chose a number. Divide by how many they are."),
        Mistake("sum_of_all", stepping(torch.sum, torch.zeros_like),
                "You took the sum of the values that chose a number. Divide by how many they are."),
        Mistake("from_the_old", lloyd_from_the_old,
                "Your sum starts at the old number. It starts at 0: only the values count."),
        Mistake("half_way", holding(lambda new, code: (new + code) / 2),
                "You moved each number half of the way. It moves onto the mean of its values."),
        Mistake("magnitudes", stepping(lambda group: group.abs().mean()),
                "You took the mean of magnitudes. The mean of the values themselves is wanted, and it may be "
                "negative."),
        Mistake("mean_of_all", lloyd_no_mean,
                "You divided by n = {n}, all values. Divide by how many chose this number."),
        Mistake("idle_nan", stepping(torch.mean, lambda number: number * torch.nan),
                "A number that got no value became NaN: the mean of nothing is 0 / 0. It stays where it is."),
        Mistake("idle_zero", stepping(torch.mean, torch.zeros_like), IDLE_TO_ZERO),
        Mistake("idle_dropped", lloyd_drops_idle,
                "You left out the numbers that got no value. A code book of {k} stays one of {k}: they stay where they "
                "are."),
        Mistake("one_more", lloyd_one_more,
                "You divided by the count plus one. That pulls every number toward 0; treat a count of 0 by itself."),
        Mistake("median", stepping(torch.median), MEDIAN),
        Mistake("median_between", stepping(lambda group: group.quantile(0.5)), MEDIAN),
        Mistake("middle", stepping(lambda group: (group.min() + group.max()) / 2),
                "You took the middle between the smallest and the largest of the values. It is their mean that makes "
                "the squared error smallest."),
        Mistake("ends_held", holding(with_ends), ENDS),
        Mistake("ends_at_one", holding(with_unit_ends), ENDS),
        Mistake("zero_held", holding(lambda new, code: torch.where(code == 0, code, new)),
                "You held the number 0 where it was. NF4 wants a 0; Lloyd's step knows no such wish, and moves it to "
                "the mean of its values."),
        Mistake("first_held", holding(lambda new, code: torch.cat([code[:1], new[1:]])),
                "Your first number never moves. Does a loop start at 1?"),
        Mistake("last_held", holding(lambda new, code: torch.cat([new[:-1], code[-1:]])),
                "Your last number never moves. Does a loop end one early, or a count have k - 1 places?"),
        Mistake("cut_at_numbers", cutting(torch.bucketize),
                "You cut at the numbers of the code book, so that each value goes to the next one above. The nearest "
                "one changes halfway: cut at the {k} - 1 midpoints."),
        Mistake("cut_below", cutting(lambda values, code: torch.bucketize(values, code) - 1),
                "You cut at the numbers of the code book, so that each value goes to the next one below. The nearest "
                "one changes halfway: cut at the {k} - 1 midpoints."),
        Mistake("rounded_values", lambda values, code: torch.stack(
                    [code[i] for i in (values[:, None] - code).abs().argmin(1)]),
                "You returned the {n} values, each rounded to its nearest number. The new code book is asked for, {k} "
                "numbers."),
        Mistake("assignment", lambda values, code: (values[:, None] - code).abs().argmin(1),
                "You returned the place of each value's nearest number. The second half is missing: the mean of the "
                "values that chose each number."),
        Mistake("many_rounds", lloyd_many_rounds,
                "You went on until nothing moves any more. One round is asked for; the loop comes later."),
        Mistake("while_walking", lloyd_while_walking,
                "You moved a number and then chose anew, with the rest of the loop still to come. First choose for all "
                "values, then move all numbers."),
        Mistake("in_place", lloyd_in_place, None, "Your function changed code (max difference "),
    ),
    alternatives=(lloyd_by_argmin, lloyd_by_scatter, lloyd_by_matrix),
    kinds={"idle": "Right while every number of the code book is the nearest to some value, and wrong when one is not: "
                   "it stays where it is."},
    fact="Neither half can make the mean squared error larger: no number is nearer to a value than the nearest, and "
    "none is better for a set of values than their mean. So rounds go on until nothing moves.",
)

# ------------------------------------------------------------------------------------------------- quantize_scales


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

# ------------------------------------------------------------------------------------------------- bits_per_number


def bit_cases(rng):
    drawn = [(4, 64, True, 256), (4, 64, False, 256), (3, 32, True, 100), (8, pick(rng, 96, 160), True, 128),
             (5, pick(rng, 48, 80), False, 128)]  # fmt: skip
    return [
        Case({"bits": bits, "block_size": block, "double_quant": double, "group": group},
             ("double",) if double else ("single",), {"bits": bits, "block_size": block, "group": group})  # fmt: skip
        for bits, block, double, group in drawn
    ]


def counting(double, single=lambda bits, block, group: bits + 32 / block):
    """A bits_per_number with other formulas, of (bits, block_size, group)."""

    def bits_per_number(bits=4, block_size=64, double_quant=True, group=256):
        return (double if double_quant else single)(bits, block_size, group)

    return bits_per_number


def both(rule):
    """A bits_per_number that follows the right formula up to a last step, rule(bits per number, bits)."""

    def bits_per_number(bits=4, block_size=64, double_quant=True, group=256):
        return rule(blocks.bits_per_number(bits, block_size, double_quant, group), bits)

    return bits_per_number


def right(bits, block, group):
    return bits + (8 + 32 / group) / block


def bits_by_terms(bits=4, block_size=64, double_quant=True, group=256):
    if not double_quant:
        return bits + 32 / block_size
    return bits + 8 / block_size + 32 / (block_size * group)


def bits_of_a_group(bits=4, block_size=64, double_quant=True, group=256):
    """Count the bits of a whole group of blocks, then divide by its numbers."""
    numbers = block_size * group
    scales = 8 * group + 32 if double_quant else 32 * group
    return (bits * numbers + scales) / numbers


def bits_by_fractions(bits=4, block_size=64, double_quant=True, group=256):
    from fractions import Fraction

    per_scale = Fraction(8) + Fraction(32, group) if double_quant else Fraction(32)
    return float(bits + per_scale / block_size)


SAVED = blocks.bits_per_number(double_quant=False) - blocks.bits_per_number()

ROUNDED = "You rounded. Do not round here: keep all digits, and round where you print."

BITS_PER_NUMBER = Exercise(
    name="bits_per_number",
    reference=blocks.bits_per_number,
    cases=bit_cases,
    mistakes=(
        Mistake("no_second_scale", counting(lambda bits, block, group: bits + 8 / block),
                "The second scales are missing: 32 bits more for `group` scales, that is for group * block_size "
                "weights."),
        Mistake("thirty_two_for_eight", counting(lambda bits, block, group: bits + 32 / block + 32 / (block * group)),
                "You counted double quantized scales with 32 bits. They are 8 bits now; the 32 are those of the second "
                "scales."),
        Mistake("per_group_only", counting(lambda bits, block, group: bits + 8 / block + 32 / group),
                "You spread a second scale over `group` weights. It serves `group` scales, and each of those serves "
                "block_size weights: 32 / (block_size * group)."),
        Mistake("swapped", counting(lambda bits, block, group: bits + (8 + 32 / block) / group,
                                    lambda bits, block, group: bits + 32 / group),
                "block_size and group are swapped: block_size weights share a scale, group scales share a second one."),
        Mistake("swapped_in_double", counting(lambda bits, block, group: bits + (8 + 32 / block) / group),
                "block_size and group are swapped where scales are double quantized: block_size weights share a scale, "
                "group scales share a second one."),
        Mistake("always_double", counting(right, right),
                "You counted double quantized scales whatever double_quant says. Without it a scale is 32 bits."),
        Mistake("never_double", counting(lambda bits, block, group: bits + 32 / block),
                "You counted scales of 32 bits whatever double_quant says. With it a scale is 8 bits, and `group` of "
                "them share 32 more."),
        Mistake("flag_backward", counting(lambda bits, block, group: bits + 32 / block, right),
                "double_quant is taken the wrong way round: True means scales of 8 bits."),
        Mistake("bytes", both(lambda all_bits, bits: all_bits / 8),
                "Those are bytes. Bits are asked for: 8 times as many."),
        Mistake("scales_in_bytes", counting(lambda bits, block, group: bits + (1 + 4 / group) / block,
                                            lambda bits, block, group: bits + 4 / block),
                "You counted the code in bits and the scales in bytes. A float32 has 32 bits, a uint8 has 8."),
        Mistake("scales_alone", both(lambda all_bits, bits: all_bits - bits),
                "That is what the scales cost. Add the bits of the code itself."),
        Mistake("sixteen", counting(lambda bits, block, group: bits + (8 + 16 / group) / block,
                                    lambda bits, block, group: bits + 16 / block),
                "You counted float scales with 16 bits. They are kept in float32."),
        Mistake("second_in_eight", counting(lambda bits, block, group: bits + (8 + 8 / group) / block),
                "You counted the second scales with 8 bits. They are float32: 32."),
        Mistake("not_shared", counting(lambda bits, block, group: bits + 8 + 32 / group / block),
                "Your 8 bits are not shared. Division binds tighter than addition: (8 + 32 / group) / block_size."),
        Mistake("not_shared_twice", counting(lambda bits, block, group: bits + (8 + 32) / block),
                "You gave every scale a second scale of its own. `group` scales share one: 32 / group bits each."),
        Mistake("product", counting(lambda bits, block, group: bits + 8 * 32 / (block * group)),
                "You multiplied the 8 bits with the 32. They are added: each scale has its 8 bits and a share of 32."),
        Mistake("four", counting(lambda bits, block, group: right(4, block, group),
                                 lambda bits, block, group: 4 + 32 / block),
                "You wrote 4. Use the argument bits: it is {bits} here."),
        Mistake("sixty_four", counting(lambda bits, block, group: right(bits, 64, group),
                                       lambda bits, block, group: bits + 32 / 64),
                "You wrote 64. Use the argument block_size: it is {block_size} here."),
        Mistake("two_five_six", counting(lambda bits, block, group: right(bits, block, 256)),
                "You wrote 256. Use the argument group: it is {group} here."),
        Mistake("whole", counting(lambda bits, block, group: bits + (8 + 32 // group) // block,
                                  lambda bits, block, group: bits + 32 // block),
                "// drops the fraction, and the scales cost a fraction of a bit. Use /."),
        Mistake("rounded", both(lambda all_bits, bits: round(all_bits, 3)), ROUNDED),
        Mistake("rounded_if_double", counting(lambda bits, block, group: round(right(bits, block, group), 3)), ROUNDED),
        Mistake("table", counting(lambda *_: 4.127, lambda *_: 4.5),
                "You typed two numbers, which hold for 4 bits, blocks of 64 and groups of 256; and the first of them "
                "is rounded. Compute it from the arguments, and do not round."),
        Mistake("defaults", counting(lambda bits, block, group: right(bits, 64, 256),
                                     lambda bits, block, group: bits + 32 / 64),
                "You wrote 64 and 256. Use the arguments block_size and group: they are {block_size} and {group} "
                "here."),
        Mistake("precedence", counting(lambda bits, block, group: bits + 8 / block + 32 / block * group),
                "Python divides by block_size and then multiplies by group. 32 / (block_size * group) is meant."),
        Mistake("both_added", counting(lambda bits, block, group: right(bits, block, group) + 32 / block),
                "You counted the scales twice where they are double quantized, in 32 bits and in 8. The 8 bits take "
                "the place of the 32."),
        Mistake("a_pair", both(lambda all_bits, bits: (bits, all_bits - bits)), None,
                "Yours returned a tuple of 2, and a number is expected"),
    ),
    alternatives=(bits_by_terms, bits_of_a_group, bits_by_fractions),
    kinds={
        "double": "Right for scales in float32, and wrong where they are double quantized: 8 bits each, and 32 more "
        "for `group` of them.",
        "single": "Right where scales are double quantized, and wrong where they are not: 32 bits for block_size "
        "weights.",
    },
    fact=f"Double quantization saves {SAVED:.3f} bits a weight: of Llama-2-7B's 6.48 billion in linear layers "
    f"{6_476_005_376 * SAVED / 8e9:.2f} GB.",
)

EXERCISES = (LLOYD_STEP, QUANTIZE_SCALES, BITS_PER_NUMBER)
