"""Chapter 03, Lloyd's step."""

import torch
import torch.nn.functional as F

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.quantization import codebooks
from utils.quantization.codebooks import nf4_codebook


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
