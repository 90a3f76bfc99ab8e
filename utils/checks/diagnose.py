"""From a wrong attempt to one sentence.

The order matters: what stops the code, then the named mistakes, then general properties from the most telling to the
least. Last comes what can be wrong although every value is right: changed inputs, dtype, gradients.
"""

import torch

from utils.checks.compare import TOLERANCE, agrees, changed_input, close, same_mistake, tensors
from utils.checks.core import run
from utils.checks.errors import about_error, about_missing_error
from utils.checks.values import about_factor, about_value, first_place, short

KINDS = {  # an attempt that fails for one kind of case only
    "leading": "Works for (n, d_in) and fails for (batch, length, d_in): ... means any number of leading axes.",
    "vector": "Works for (n, d_in) and fails for a single x of shape (d_in,): ... can also mean no leading axis.",
    "rectangular": "This is right only when the layer is square. Which axis of W is d_out, and which is d_in?",
    "bf16": "Works in float32 and fails in bfloat16. Which dtype does each step have?",
}


def diagnose(exercise, attempt, cases, got):
    """One sentence about what is wrong, or None when nothing is. got: the attempt's outcome for each case."""
    wanted = [run(exercise, exercise.reference, case, seed=i) for i, case in enumerate(cases)]
    trials = list(zip(cases, wanted, got, strict=True))
    failed = [not agrees(exercise, case, want, out) for case, want, out in trials]
    if not any(failed):
        return about_side_effects(trials) or about_dtype(exercise, trials) or about_gradients(exercise, attempt, trials)
    if any(wrong and not case.later for case, wrong in zip(cases, failed, strict=True)):
        kept = [i for i, case in enumerate(cases) if not case.later]
        cases, got, trials, failed = ([some[i] for i in kept] for some in (cases, got, trials, failed))
    bad = [trial for trial, wrong in zip(trials, failed, strict=True) if wrong]
    raised = [trial for trial in bad if trial[2].error is not None and trial[1].error is None]
    for mistake in exercise.mistakes:
        if mistake.says is not None:
            theirs = (run(exercise, mistake.attempt, case, seed=i) for i, case in enumerate(cases))
            if same_mistake(exercise, cases, got, theirs):
                case, want, out = (raised or bad)[0]
                return mistake.sentence({**case.numbers, "yours": out.value, "expected": want.value})
    kind = about_kind(exercise, cases, failed)
    if raised:
        return " ".join(filter(None, [kind, about_error(exercise, attempt, raised[0][2].error)]))
    case, want, out = bad[0]
    if want.error is not None:
        return about_missing_error(case, want, out)
    return about_side_effects(bad) or kind or about_value(exercise, bad)


def about_kind(exercise, cases, failed):
    """A sentence when the failing cases are exactly those of one kind, or of a few: then that of the most frequent."""
    kinds = {**KINDS, **exercise.kinds}
    bad = [case for case, wrong in zip(cases, failed, strict=True) if wrong]
    good = [case for case, wrong in zip(cases, failed, strict=True) if not wrong]
    count = {k: sum(k in case.kinds for case in bad) for k in kinds if not any(k in case.kinds for case in good)}
    if good and all(any(k in case.kinds for k in count) for case in bad):
        return kinds[max(count, key=count.get)]
    return None


def about_side_effects(trials):
    for case, _, out in trials:
        changed = changed_input(case.inputs, out.inputs)
        if changed:
            name, by = changed
            size = f" (max difference {by:.2g})" if by is not None else ""
            end = "The base is frozen: leave it as it was." if name == "W" else "Leave the inputs as they were."
            return f"Your function changed {name}{size}. {end}"
    return None


def about_dtype(exercise, trials):
    for case, want, out in trials:
        for i, (mine, ours) in enumerate(zip(tensors(out.value), tensors(want.value), strict=True)):
            if mine.dtype == ours.dtype:
                continue
            alike = [(k, v) for k, v in case.inputs.items() if follows(k, i, trials)]
            holds = "is" if alike and isinstance(alike[0][1], torch.Tensor) else "holds"
            reason = f"{alike[0][0]} {holds} {short(ours.dtype)}" if alike else f"{short(ours.dtype)} is expected"
            if exercise.returns and not alike:
                reason = f"{exercise.returns[i]} is to be {short(ours.dtype)}"
            return f"Right values, wrong dtype: {reason}, you returned {short(mine.dtype)}."
    return None


def follows(name, i, trials):
    """Whether the i-th wanted tensor has the dtype of this input in every case, and not the same one in all of them."""
    pairs = [(tensors(want.value)[i].dtype, tensors(case.inputs.get(name))) for case, want, _ in trials]
    return len({dtype for dtype, _ in pairs}) > 1 and all(any(t.dtype == dtype for t in held) for dtype, held in pairs)


def about_gradients(exercise, attempt, trials):
    for i, (case, _, _) in enumerate(trials if exercise.grads else ()):
        want = run(exercise, exercise.reference, case, seed=i, grads=True)
        out = run(exercise, attempt, case, seed=i, grads=True)
        if out.error is not None:
            return "Values are right until the inputs want gradients. " + about_error(exercise, attempt, out.error)
        for name, ours in want.grads.items():
            if out.grads[name] is None and name == "x":
                return "Values are right but no gradient reaches x. The layers before this one would learn nothing."
            if out.grads[name] is None:
                return f"Values are right but no gradient reaches {name}. Training would never move it."
            if not close(out.grads[name], ours, 3 * TOLERANCE[ours.dtype]):  # rounded more often than a value
                how = about_factor([(case, ours, out.grads[name])], "gradient") or first_place(ours, out.grads[name])
                return f"Values are right but the gradient of {name} is not. {how}"
    return None
