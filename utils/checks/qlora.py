"""Chapter 03, QLoRA: the code book and its nearest number. The other exercises are in qlora_*.py."""

from statistics import NormalDist

import torch

from utils.checks import (
    qlora_adam,
    qlora_base,
    qlora_bits,
    qlora_blocks,
    qlora_fields,
    qlora_lloyd,
    qlora_merge,
    qlora_names,
    qlora_pack,
    qlora_product,
    qlora_scales,
)
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import near, pick, spaced_code
from utils.quantization.blocks import nearest_code
from utils.quantization.codebooks import NF4_OFFSET, dynamic_codebook, fp4_codebook, nf4_codebook

# ------------------------------------------------------------------------------------------------- nf4_codebook


quantile = NormalDist().inv_cdf


def codebook_cases(rng):
    offsets = (pick(rng, 0.9, 0.92), pick(rng, 0.98, 0.99))
    return [Case({}), *(Case({"offset": offset}, numbers={"offset": offset}) for offset in offsets)]


def probabilities(offset, count):
    return torch.linspace(offset, 0.5, count).tolist()


def made_of(numbers):
    """A code book of some numbers, in rising order, divided by the largest."""
    code = torch.tensor(sorted(numbers))
    return code / code.max()


def codebook(positive=9, negative=8, zeros=1, keep=slice(0, -1), keep_negative=slice(0, -1), value=quantile,
             done=made_of):  # fmt: skip
    """An nf4_codebook with something else in it.

    positive, negative: probabilities on each side, before `keep` takes some   value: a number from a probability
    zeros: how many are put in   done: what is made of the numbers, the negative ones first
    """

    def nf4_codebook(offset=NF4_OFFSET):
        above = [value(p) for p in probabilities(offset, positive)[keep]]
        below = [-value(p) for p in probabilities(offset, negative)[keep_negative]]
        return done([*below, *[0.0] * zeros, *above])

    return nf4_codebook


def even_probabilities(count):
    def nf4_codebook(offset=NF4_OFFSET):
        return made_of([quantile(p) for p in torch.linspace(1 - offset, offset, count).tolist()])

    return nf4_codebook


def from_one(offset=NF4_OFFSET):
    """The quantiles from probability 1 on, the first of which is infinite."""
    sides = [torch.special.ndtri(torch.linspace(1, 0.5, count)[:-1]) for count in (9, 8)]
    code = torch.cat([sides[0], torch.zeros(1), -sides[1]]).sort().values
    return code / code.max()


def in_order_of_making(numbers):
    return torch.tensor(numbers) / max(numbers)


def positive_first(offset=NF4_OFFSET):
    code = nf4_codebook(offset)
    return torch.cat([code[8:].flip(0), code[7:8], code[:7]])


def by_erfinv(offset=NF4_OFFSET):
    above, below = (2**0.5 * torch.erfinv(2 * torch.linspace(offset, 0.5, n)[:-1] - 1) for n in (9, 8))
    code = torch.cat([-below, torch.zeros(1), above.flip(0)])
    return code / code[-1]


def by_normal_of_torch(offset=NF4_OFFSET):
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(0.5, offset, 9, dtype=torch.float64))  # zero is the quantile of 1/2
    below = normal.icdf(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64))[:-1]
    return (torch.cat([below, above]) / above.max()).float()


def by_steps(offset=NF4_OFFSET):
    largest = quantile(offset)
    code = [-quantile(0.5 + (offset - 0.5) * k / 7) / largest for k in range(7, 0, -1)]
    code += [0.0] + [quantile(0.5 + (offset - 0.5) * k / 8) / largest for k in range(1, 9)]
    return torch.tensor(code)


UNSORTED = "The 16 numbers are right, but they do not rise. Sort them: index 0 stands for -1, and index 15 for 1."
TWO_ZEROS = "Zero is in it more than once: the quantile at 1/2 is zero too. Leave that one out on both sides."
NO_ZERO = (
    "There is no zero in it. A weight that is exactly zero must stay zero: 7 negative numbers, 0, and 8 positive ones."
)

NF4_CODEBOOK = Exercise(
    name="nf4_codebook",
    reference=nf4_codebook,
    cases=codebook_cases,
    mistakes=(
        Mistake("symmetric", codebook(negative=9, zeros=0), NO_ZERO),
        Mistake("even_probabilities", even_probabilities(16),
                "You took 16 evenly spaced probabilities from 1 - offset to offset. 1/2 is not among them, so zero is "
                "not in your code book. Do the two sides apart: 7 negative numbers, 0, and 8 positive ones."),
        Mistake("fifteen", even_probabilities(15),
                "Yours has 15 numbers, 7 on each side of zero. Four bits make 16: give the positive side 8, from 9 "
                "probabilities without the last."),
        Mistake("zero_three_times", codebook(keep=slice(None), keep_negative=slice(None)), TWO_ZEROS),
        Mistake("zero_from_both_sides", codebook(zeros=0, keep=slice(None), keep_negative=slice(None)), TWO_ZEROS),
        Mistake("two_zeros_of_16", codebook(8, 8, zeros=0, keep=slice(None), keep_negative=slice(None)), TWO_ZEROS),
        Mistake("no_cut", codebook(8, 7, keep=slice(None), keep_negative=slice(None)),
                "You spaced 8 and 7 probabilities down to 1/2, whose quantile is zero: zero is in it three times. "
                "Space 9 and 8, and leave out the last of each."),
        Mistake("seventeen", codebook(negative=9),
                "Yours has 17 numbers, 8 on each side of zero. Four bits make 16: the negative side has 7, from 8 "
                "probabilities without the last."),
        Mistake("positive_alone", codebook(negative=1, zeros=0),
                "Yours has the 8 positive numbers alone. 0 and 7 negative ones are missing."),
        Mistake("wrong_end", codebook(keep=slice(1, None), keep_negative=slice(1, None)),
                "You dropped the outermost probability and kept 1/2. It is the other way round: the quantile at 1/2 "
                "is zero, which you put in once by hand."),
        Mistake("no_division", codebook(done=lambda numbers: torch.tensor(sorted(numbers))),
                "Your numbers are right before the last step: divide by the largest, so that they run from -1 to 1. A "
                "block's weights will be divided by their largest magnitude."),
        Mistake("unsorted", codebook(done=in_order_of_making), UNSORTED),
        Mistake("positive_first", positive_first, UNSORTED),
        Mistake("falling", lambda offset=NF4_OFFSET: nf4_codebook(offset).flip(0),
                "Your numbers fall from 1 to -1. They should rise: index 0 stands for -1."),
        Mistake("levels_evenly_spaced", lambda offset=NF4_OFFSET: torch.linspace(-1, 1, 16),
                "Your numbers are evenly spaced. Then the codes at the ends are hardly ever used: it is the "
                "probabilities that are evenly spaced, and the numbers are their quantiles."),
        Mistake("uniform", codebook(value=lambda p: p - 0.5),
                "Your numbers are evenly spaced on each side, as the quantiles of a uniform distribution are. Take "
                "those of the normal distribution: NormalDist().inv_cdf(p)."),
        Mistake("probabilities", codebook(value=lambda p: p),
                "Those are the probabilities themselves. The code book holds their quantiles."),
        Mistake("cdf", codebook(value=NormalDist().cdf),
                "You used the distribution function, which gives the probability below a number. Its inverse is "
                "wanted: the number below which a probability lies."),
        Mistake("more_negative", codebook(8, 9),
                "Yours has 8 negative numbers and 7 positive ones. It is the other way round."),
        Mistake("same_steps", codebook(negative=9, keep_negative=slice(0, -2)),
                "You spaced the negative side as the positive one and left out its smallest magnitude. Its 7 numbers "
                "have their own spacing: the first 7 of 8 probabilities from offset to 1/2."),
        Mistake("no_minus_one", codebook(negative=9, keep_negative=slice(1, -1)),
                "Your smallest number is not -1. Both sides start at offset: a block's largest weight may be negative, "
                "and then only -1 can stand for it."),
        Mistake("no_minus", codebook(value=quantile, done=lambda numbers: made_of([abs(v) for v in numbers])),
                "None of yours is negative. The 7 numbers of the negative side need a minus."),
        Mistake("fixed_offset", lambda offset=NF4_OFFSET: nf4_codebook(),
                "Your numbers are right for the default and do not change with the argument offset."),
        Mistake("from_one", from_one,
                "You started at probability 1, whose quantile is infinite; divided by it, all others are zero. Start "
                "at offset."),
        Mistake("numbers_in_a_list", codebook(done=lambda numbers: made_of(numbers).tolist()), None,
                "a list of 16, and a Tensor is expected"),
        Mistake("in_float64", lambda offset=NF4_OFFSET: nf4_codebook(offset).double(), None,
                "wrong dtype: float32 is expected, you returned float64"),
        Mistake("infinite", lambda offset=NF4_OFFSET: torch.tensor([quantile(p) for p in probabilities(1, 9)]), None,
                "raises StatisticsError: p must be in the range 0.0 < p < 1.0. The quantile at 1 is infinite"),
    ),
    alternatives=(by_erfinv, by_normal_of_torch, by_steps),
    explain={"0.0 < p < 1.0": "The quantile at 1 is infinite, and at 0 too: start at offset."},
    fact=f"Next to zero its numbers are {nf4_codebook()[8]:.3f} apart, at the upper end "
    f"{1 - nf4_codebook()[14]:.3f}: fine steps where weights are many, wide ones where they are few.",
)

# ------------------------------------------------------------------------------------------------- nearest_code


def nearest_cases(rng):
    """Values well away from the midpoints, so that neither ties nor rounding decide; in the last case just beside them,
    so that float16 or fewer digits would."""
    found = []
    for code, count, kinds in (
        (nf4_codebook(), pick(rng, 30, 40), ()),
        (spaced_code(rng, pick(rng, 5, 7)), 20, ()),
        (dynamic_codebook(), 300, ("many",)),
        (fp4_codebook(), pick(rng, 30, 40), ("unsorted",)),
    ):
        places = torch.randint(len(code), (count,), generator=rng)
        if "unsorted" in kinds:
            places = places[places % 8 > 0]  # FP4 has zero twice, and either will do
        values = near(rng, code, places)
        found.append(Case({"values": values, "code": code}, kinds, {"k": len(code)}, later="unsorted" in kinds))
    code = nf4_codebook()
    beside = 3e-5 * (1 + 0.2 * torch.rand(15, generator=rng))
    values = torch.cat([midpoints_of(code) - beside, midpoints_of(code) + beside])
    return [*found, Case({"values": values, "code": code}, ("close",), {"k": 16}, later=True)]


def midpoints_of(code):
    return (code[:-1] + code[1:]) / 2


def by_distance(which, distance=torch.abs, dim=1):
    def nearest_code(values, code):
        return which(distance(values[:, None] - code), dim).to(torch.uint8)

    return nearest_code


def between(boundaries, shift=0, right=False):
    """A nearest_code that looks up between boundaries(code), and adds shift."""

    def nearest_code(values, code):
        return (torch.bucketize(values, boundaries(code), right=right) + shift).to(torch.uint8)

    return nearest_code


def round_evenly(values, code):
    return ((values + 1) / 2 * (len(code) - 1)).round().to(torch.uint8)


def place_in_order(values, code):
    code = code.sort().values
    return torch.bucketize(values, midpoints_of(code)).to(torch.uint8)


def by_inverse_order(values, code):
    code, order = code.sort()
    return order.argsort()[torch.bucketize(values, midpoints_of(code))].to(torch.uint8)


def by_loop(values, code):
    numbers = code.tolist()
    places = [min(range(len(numbers)), key=lambda i: abs(numbers[i] - v)) for v in values.tolist()]
    return torch.tensor(places, dtype=torch.uint8)


def in_float16(values, code):
    return (values.half()[:, None] - code.half()).abs().argmin(1).to(torch.uint8)


def the_upper_of_two(values, code):
    code, order = code.sort()
    return order[torch.searchsorted(midpoints_of(code), values, right=True)].byte()


def by_cdist(values, code):
    return torch.cdist(values[:, None].double(), code[:, None].double()).argmin(1).to(torch.uint8)


SAME_PLACE = (
    "The absolute value is missing: the smallest signed difference belongs to one end of the code book, whatever the "
    "value is."
)

NEAREST_CODE = Exercise(
    name="nearest_code",
    reference=nearest_code,
    cases=nearest_cases,
    mistakes=(
        Mistake("below", between(lambda code: code, -1, right=True),
                "Yours is the largest code book number below the value, even where the one above is nearer. The "
                "borders lie at the midpoints between neighbours, not at the numbers themselves."),
        Mistake("above", between(lambda code: code),
                "You looked up the value between the code book numbers themselves: that gives the next number above. "
                "The borders lie at the midpoints between neighbours."),
        Mistake("farthest", by_distance(torch.argmax), "You found the number farthest away. The nearest is argmin."),
        Mistake("no_absolute_value", by_distance(torch.argmin, lambda gap: gap), SAME_PLACE),
        Mistake("no_absolute_value_reversed", by_distance(torch.argmin, lambda gap: -gap), SAME_PLACE),
        Mistake("wrong_axis", by_distance(torch.argmin, dim=0),
                "You searched along the wrong axis: yours says which value is nearest to each code book number. One "
                "place per value is wanted."),
        Mistake("numbers_instead_of_places", lambda values, code: code[nearest_code(values, code).long()],
                "You returned the code book's numbers. Return their places in it: those are what fits in 4 bits."),
        Mistake("one_too_high", between(midpoints_of, 1),
                "Yours is one place too high. bucketize counts the midpoints below a value, and with none below, the "
                "place is 0."),
        Mistake("one_too_low", between(midpoints_of, -1),
                "Yours is one place too low: with no midpoint below a value the place is 0, with one it is 1."),
        Mistake("not_halved", between(lambda code: code[:-1] + code[1:]),
                "The midpoint of two neighbours is half their sum; you took the whole sum."),
        Mistake("half_gaps", between(lambda code: ((code[1:] - code[:-1]) / 2).sort().values),
                "You took half the distance between neighbours. The midpoint is half their sum."),
        Mistake("round_evenly", round_evenly,
                "You rounded as if the numbers were evenly spaced. Look at the distances to the code book's own "
                "numbers."),
        Mistake("signed", lambda values, code: nearest_code(values, code).to(torch.int8),
                "Your places are int8, which ends at 127: with {k} numbers the upper half comes out negative. Use "
                "uint8."),
        Mistake("order_assumed", lambda values, code: torch.bucketize(values, midpoints_of(code)).to(torch.uint8),
                "Right for a code book that rises. FP4's does not: its numbers are in the order of their bit patterns, "
                "so sort the code book first and keep the order."),
        Mistake("place_in_order", place_in_order,
                "Right for a code book that rises. Of FP4's you return the place after sorting: the order that sort "
                "gives you leads back to the place before."),
        Mistake("inverse_order", by_inverse_order,
                "Right for a code book that rises. For FP4's you took the inverse of the order: order[i] itself is "
                "where the i-th smallest number stood."),
        Mistake("sixteen_only", lambda values, code: nearest_code(values, code[:16]), None, "look at 16 numbers only"),
        Mistake("in_float16", in_float16, None, "Right but close to the midpoint of two numbers"),
        Mistake("in_int64", lambda values, code: nearest_code(values, code).long(), None,
                "wrong dtype: uint8 is expected, you returned int64"),
        Mistake("as_a_column", lambda values, code: nearest_code(values, code)[:, None], None, "Wrong shape: yours ("),
    ),
    alternatives=(by_distance(torch.argmin), by_distance(torch.argmin, torch.square), by_loop, the_upper_of_two,
                  by_cdist),
    kinds={"many": "Right for small code books and wrong for one of 256. Which numbers does your dtype hold, or do "
           "you look at 16 numbers only?",
           "close": "Right but close to the midpoint of two numbers, where it takes the farther one. Do you round "
           "before you compare, to float16 or to a few digits? Compare in float32.",
           "unsorted": "Right for a code book that rises, and wrong for FP4's, whose numbers are in the order of their "
           "bit patterns."},
    fact="bucketize is a binary search: 4 comparisons find one of 16, and no table of all distances is made.",
)

EXERCISES = (
    NF4_CODEBOOK,
    NEAREST_CODE,
    *qlora_blocks.EXERCISES,
    *qlora_pack.EXERCISES,
    qlora_lloyd.LLOYD_STEP,
    qlora_scales.QUANTIZE_SCALES,
    qlora_bits.BITS_PER_NUMBER,
    qlora_product.PRODUCT,
    qlora_fields.FIELDS,
    qlora_base.QUANTIZED_BASE,
    qlora_names.LINEAR_NAMES,
    qlora_merge.REQUANTIZED_MERGE,
    qlora_adam.ADAMW8BIT_UPDATE,
)
