"""What is different about a wrong value: type, shape, a factor and what it equals, a sign, an offset, a place."""

import math
from numbers import Number, Real

import torch

from utils.checks.compare import close, largest, tensors

ORDINAL = ("first", "second", "third")


def about_value(exercise, bad):
    """bad: (case, wanted outcome, outcome) of the cases that failed, neither of them an exception."""
    pairs = [(c, w.value, o.value) for c, w, o in bad if w.error is None]
    case, want, out = pairs[0]
    if out is None:
        return exercise.explain.get("None", "It returned None. Is there a return statement on every path?")
    if isinstance(want, dict):  # the findings of an exercise's own call
        if not isinstance(out, dict):
            return about_one(pairs)
        key = next((k for k in want if k not in out or not close(out[k], want[k], exercise.tolerance)), None)
        if key is None:
            return f"Yours holds {next(k for k in out if k not in want)!r} as well, which is not asked for."
        if key in exercise.explain:
            return exercise.explain[key].format(yours=out.get(key), expected=want[key])
        if key not in out:
            return f"Yours lacks {key!r}; it holds {', '.join(map(repr, out)) or 'nothing'}."
        return f"{key}: {about_one([(c, w[key], o[key]) for c, w, o in pairs if key in o])}"
    if isinstance(want, (list, tuple)) and tensors(want):
        if not isinstance(out, (list, tuple)) or len(out) != len(want):
            return f"Yours returned {kind_of(out)}, and {kind_of(want)} is expected."
        i = next(i for i, w in enumerate(want) if not close(out[i], w, exercise.tolerance))
        pairs = [(c, w[i], o[i]) for c, w, o in pairs if isinstance(o, (list, tuple)) and not close(o[i], w[i])]
        name = f", {exercise.returns[i]}" if exercise.returns else ""
        return f"The {ORDINAL[i]} returned value{name}: {about_one(pairs)}"
    return about_one(pairs, exercise.base)


def about_one(pairs, base=None):
    """pairs: (case, wanted, got). base: see Exercise."""
    case, want, out = pairs[0]
    if not isinstance(out, type(want)) and not (isinstance(want, float) and isinstance(out, Number)):
        what = "a number" if isinstance(want, float) else kind_of(want)
        return f"Yours returned {kind_of(out)}, and {what} is expected."
    if not isinstance(want, torch.Tensor):
        if isinstance(want, tuple) and len(want) == len(out) <= 3 and all(isinstance(v, Real) for v in (*want, *out)):
            i = next(i for i, (w, o) in enumerate(zip(want, out, strict=True)) if not close(o, w, 1e-9))
            mine, ours = both_shown(out[i], want[i])
            return f"With {described(case)}: your {ORDINAL[i]} value is {mine}, expected {ours}."
        if isinstance(want, (list, tuple)) and isinstance(out, (list, tuple)) and len(want) + len(out) > 3:
            return f"With {described(case)}: {about_list(want, out)}"
        ratio = about_factor(pairs, "answer") if isinstance(want, Number) and len(pairs) > 1 else None
        mine, ours = both_shown(out, want)
        return ratio or f"With {described(case)}: yours {mine}, expected {ours}{gap(want, out)}."
    if out.device != want.device:
        return f"Wrong device: the inputs are on {want.device}, you returned a tensor on {out.device}."
    if out.is_complex():
        return f"Wrong dtype: {short(want.dtype)} is expected, you returned {short(out.dtype)}."
    if out.shape != want.shape:
        turned = " It is transposed." if out.ndim == want.ndim == 2 and out.shape == want.mT.shape else ""
        return f"Wrong shape: yours {tuple(out.shape)}, expected {tuple(want.shape)}, with {described(case)}.{turned}"
    if not torch.isfinite(out).all():
        return f"Your output holds NaN or infinite values, with {described(case)}."
    if out.ndim == 2 and all(o.shape == w.mT.shape and close(o.mT, w) for _, w, o in pairs):
        return "Your output is the transpose of the expected one."
    about = about_factor(pairs, "output")
    if about is None and base is not None:
        bases = [base(*c.inputs.values()) for c, _, _ in pairs]
        about = about_factor([(c, w - b, o - b) for (c, w, o), b in zip(pairs, bases, strict=True)], "update")
    return about or f"{first_place(want, out)} The case: {described(case)}."


def about_list(want, out):
    """The first thing that a list has or lacks; the whole of it would fill the screen."""
    more, less = [v for v in out if v not in want], [v for v in want if v not in out]
    if more or less:
        return f"yours {'has' if more else 'lacks'} {(more or less)[0]!r}, and should{' not' if more else ' have it'}."
    return "yours has the right entries, but in another order, or some of them twice."


def about_factor(pairs, what):
    """A sentence when each output is the expected one times a constant, or plus one; None when neither."""
    rough = 1e-6 if all(isinstance(w, Number) for _, w, _ in pairs) else 2e-3  # counts are exact, tensors are rounded
    pairs = [(c, torch.as_tensor(w).detach(), torch.as_tensor(o).detach()) for c, w, o in pairs]
    pairs = [p for p in pairs if p[1].dtype not in (torch.float16, torch.bfloat16)] or pairs  # too coarse to divide
    pairs = [(c, w.double(), o.double()) for c, w, o in pairs]
    if any(w.shape != o.shape for _, w, o in pairs):
        return None
    gaps = [o - w for _, w, o in pairs]
    if all(gap.numel() > 1 and largest(gap - gap.mean()) < 1e-3 * largest(gap) for gap in gaps):
        return f"Your {what} is off by the same {gaps[0].mean().item():.4g} everywhere."
    ratios = [((o * w).sum() / (w * w).sum().clamp_min(1e-30)).item() for _, w, o in pairs]
    if not all(abs(f) > 1e-6 and close(o, f * w, 1e-3) for f, (_, w, o) in zip(ratios, pairs, strict=True)):
        return None
    if all(math.isclose(f, 1, rel_tol=2e-3) for f in ratios):
        return None
    if all(math.isclose(f, -1, rel_tol=rough) for f in ratios):
        return f"Your {what} has the wrong sign; its size is right."
    known = [factors(case.numbers) for case, _, _ in pairs]
    for name in known[0]:
        if all(math.isclose(f, k.get(name, 0), rel_tol=rough) for f, k in zip(ratios, known, strict=True)):
            numbers = [f"{k} is {v:g}" for k, v in pairs[0][0].numbers.items() if k in name]
            which = "" if name in pairs[0][0].numbers else f", which is {name}"
            return f"Your {what} is {times(ratios[0])} the expected one{which}, and {' and '.join(numbers)}."
    if all(math.isclose(f, ratios[0], rel_tol=rough) for f in ratios):
        return f"Your {what} is {times(ratios[0])} the expected one."
    return None


def factors(numbers):
    """What a ratio may be, in terms of the numbers of a case: {"r": 8, "1/r": 0.125, "sqrt(r)": 2.83, "alpha/r": 2}."""
    numbers = {k: v for k, v in numbers.items() if isinstance(v, (int, float)) and v > 0}
    found = dict(numbers)
    for k, v in numbers.items():
        found |= {f"1/{k}": 1 / v, f"sqrt({k})": v**0.5, f"1/sqrt({k})": v**-0.5, f"{k}^2": v**2}
    return found | {f"{k}/{m}": v / w for k, v in numbers.items() for m, w in numbers.items() if k != m}


def first_place(want, out):
    """Which rows differ, and the first place that does."""
    wrong = ~torch.isclose(out.double(), want.double(), rtol=1e-3, atol=1e-4 * max(largest(want), 1e-6))
    if wrong.any():
        which, at = "First", tuple(wrong.nonzero()[0].tolist())
    else:  # each number is close, and together they are not close enough
        which, at = "Largest", tuple(torch.unravel_index((out.double() - want.double()).abs().argmax(), want.shape))
    at = tuple(int(i) for i in at)
    mine, ours = out[at].item(), want[at].item()
    error = f" (relative error {abs(mine - ours) / abs(ours):.2g})" if ours and want.is_floating_point() else ""
    mine, ours = both_shown(mine, ours)
    where = f"{which} difference at {list(at)}: yours {mine}, expected {ours}{error}."
    rows = wrong.reshape(-1, wrong.shape[-1]).any(-1) if wrong.ndim > 1 else wrong.any()[None]
    if rows.all() or not rows.any():
        return where
    numbers = rows.nonzero().flatten().tolist()
    some = ", ".join(map(str, numbers[:6])) + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")
    return f"Rows {some} of {len(rows)} are wrong, the others right. {where}"


# ------------------------------------------------------------------------------------------------- words


def short(dtype):
    return str(dtype).removeprefix("torch.")


def shown(value, digits=12):
    """A number with commas in it and without a .0, anything else as Python writes it. digits: of a fraction"""
    if not isinstance(value, Real) or isinstance(value, bool):
        return repr(value)
    return f"{value:,.{digits if abs(value) < 1000 and value % 1 else 12}g}"


def both_shown(mine, ours):
    """Two values in as many digits as tell them apart, four at least."""
    return next(
        ((shown(mine, d), shown(ours, d)) for d in (4, 6, 9) if shown(mine, d) != shown(ours, d)),
        (shown(mine), shown(ours)),
    )


def gap(want, out):
    """How far off a large number is: often the very term that is missing."""
    if not isinstance(want, Number) or not isinstance(out, Number) or abs(want) < 1000:
        return ""
    return f"; {shown(abs(out - want))} too {'much' if out > want else 'little'}"


def kind_of(value):
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def times(ratio):
    whole, part = round(ratio), round(1 / ratio)
    if whole and abs(ratio - whole) < 2e-3 * abs(ratio):
        return f"exactly {whole} times"
    return f"1/{part} of" if part and abs(1 / ratio - part) < 2e-3 / abs(ratio) else f"{ratio:.4g} times"


def described(case):
    """The inputs of a case in a few words, "the defaults" if there are none: x (4, 5), W (7, 5), r 8."""
    parts = []
    for name, value in case.inputs.items():
        if isinstance(value, torch.Tensor):
            parts.append(f"{name} {tuple(value.shape)}")
        elif isinstance(value, (list, tuple)) and len(value) > 8:
            parts.append(f"{len(value)} {name}")
        elif isinstance(value, dict):
            parts.append(f"{name} ({'; '.join(f'{key} {v!r}' for key, v in value.items())})")
        else:
            written = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
            text = f"{name}={written}" if not tensors(value) else f"{name} {[tuple(t.shape) for t in tensors(value)]}"
            text = " ".join(text.split())
            parts.append(text if len(text) <= 160 else text[:157] + "...")
    return ", ".join(parts) or "the defaults"
