"""When two results are the same: up to rounding, and no further."""

import math
from numbers import Integral, Number, Real

import torch

# Relative to the largest entry. Wide enough for every order of the same products, far too narrow for another formula.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def close(got, want, tolerance=None):
    """Same structure and values, up to rounding. The dtype of floating tensors is not looked at here."""
    if isinstance(want, torch.Tensor):
        return isinstance(got, torch.Tensor) and close_tensors(got, want, tolerance)
    if isinstance(want, dict):
        same = isinstance(got, dict) and got.keys() == want.keys()
        return same and all(close(got[key], want[key], tolerance) for key in want)
    if isinstance(want, (list, tuple)):
        same = isinstance(got, (list, tuple)) and len(got) == len(want)
        return same and all(close(g, w, tolerance) for g, w in zip(got, want, strict=True))
    if isinstance(want, bool) or isinstance(got, bool) or not isinstance(want, Number):
        return type(got) is type(want) and got == want
    if isinstance(want, Integral):
        return isinstance(got, Integral) and got == want
    return isinstance(got, Number) and math.isclose(got, want, rel_tol=tolerance or 1e-6, abs_tol=1e-12)


def close_tensors(got, want, tolerance=None):
    if got.shape != want.shape or got.device != want.device or got.is_complex():
        return False
    rough = tolerance or max(TOLERANCE.get(t.dtype, 1e-6) for t in (got, want))
    got, want = got.detach().double(), want.detach().double()
    same = (got == want) | (got.isnan() & want.isnan())  # two attempts may divide by zero in the same places
    return largest((got - want).masked_fill(same, 0)) <= rough * max(largest(want[want.isfinite()]), 1e-6)


def largest(tensor):
    """The largest absolute entry, in double precision; infinite when one is NaN."""
    return tensor.detach().double().abs().nan_to_num(nan=math.inf).max().item() if tensor.numel() else 0.0


def agrees(exercise, case, want, got):
    """Whether an outcome is the wanted one; dtype, gradients and changed inputs are judged apart."""
    if want.error is not None:
        return isinstance(got.error, type(want.error)) and all(word in str(got.error) for word in case.mentions)
    if got.error is not None:
        return False
    if exercise.agrees is not None:
        return exercise.agrees(want.value, got.value)
    return close(got.value, want.value, exercise.tolerance)


def same_mistake(exercise, cases, got, theirs):
    """Whether two wrong attempts do the same in every case: the same values, and exceptions in the same places.

    theirs may be a generator: it is asked for no more outcomes than it takes to tell.
    """
    returned = False  # two attempts that never return anything need have nothing in common
    for case, mine, other in zip(cases, got, theirs, strict=False):
        if (mine.error is None) != (other.error is None):
            return False
        if mine.error is None and not agrees(exercise, case, other, mine):
            return False
        returned = returned or mine.error is None
    return returned


def floats(value):
    """The value with floats in place of ints, also inside: of bytes it does not matter which of the two they are."""
    if isinstance(value, dict):
        return {key: floats(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [floats(v) for v in value] if isinstance(value, list) else tuple(floats(v) for v in value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def in_bytes(attempt, *inputs):
    """The `call` of an exercise whose answer is a number of bytes."""
    return floats(attempt(*inputs))


def tensors(value):
    """The tensors in a value: itself, or those in a list or tuple."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [v for v in value if isinstance(v, torch.Tensor)] if isinstance(value, (list, tuple)) else []


def changed_input(before, after):
    """(name, largest difference) of the first input that a call changed, or None. Looks at tensors, lists and dicts."""
    for name, old in before.items():
        new = after[name]
        if isinstance(old, dict) or isinstance(old, (list, tuple)) and not tensors(old):
            if new != old:
                return name, None
            continue
        pairs = zip(tensors(old), tensors(new), strict=True)
        for o, n in pairs:
            if o.shape != n.shape or not torch.equal(o, n):
                return name, largest(n - o) if o.shape == n.shape else None
    return None


def nearly_all(got, want):
    """The same numbers but for one in fifty, which other roundings of the same sum may have sent to a neighbour."""
    if got.shape != want.shape:
        return False
    apart = (got.double() - want.double()).abs() > 1e-4 * want.double().abs().max().clamp_min(1e-9)
    return apart.sum().item() <= max(1, len(want.reshape(-1)) // 50)
