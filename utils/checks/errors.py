"""What an exception says about an attempt, with the reader's own line."""

import inspect
import traceback

import torch

from utils.checks.values import described


def wrong_kind(exercise, attempt):
    """A sentence when a class is expected and the attempt is a function, or the reverse, or another kind of class."""
    ours, yours = ("class" if isinstance(f, type) else "function" for f in (exercise.reference, attempt))
    if ours != yours:
        return f"A {ours} is expected, and yours is a {yours}."
    if ours == "class" and issubclass(exercise.reference, torch.autograd.Function):
        return not_static(attempt)
    return None


def not_static(attempt):
    """A sentence for a class that is no torch.autograd.Function, or whose methods are not static; else None."""
    if not issubclass(attempt, torch.autograd.Function):
        return "Your class is not a torch.autograd.Function: write that in the parentheses after its name."
    plain = [name for name in ("forward", "setup_context", "backward") if inspect.isfunction(vars(attempt).get(name))]
    if not plain:
        return None
    if with_self(attempt):
        return f"Write @staticmethod above {with_self(attempt)}, and let ctx be its first parameter: there is no self."
    return f"Write @staticmethod above {' and '.join(plain)}: PyTorch calls them on the class, and there is no object."


def signature(attempt):
    return inspect.signature(attempt.forward if isinstance(attempt, type) else attempt)


def fits(attempt, reference):
    """Whether the attempt can be called with as many arguments as the reference, and with no more than it needs."""
    parameters = signature(reference).parameters.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    try:
        for count in (len(needed), len(parameters)):
            signature(attempt).bind(*range(count))
    except TypeError:
        return False
    return True


def with_self(attempt):
    """The name of the first method of a class that takes self where a static one is expected, or None."""
    functions = {name: member for name, member in vars(attempt).items() if inspect.isfunction(member)}
    return next((name for name, f in functions.items() if list(inspect.signature(f).parameters)[:1] == ["self"]), None)


def own_frames(error, attempt):
    """The lines of the reader's own code that an exception passed through, outermost first."""
    code = getattr(attempt, "__code__", None)
    if code is None:  # a class: any of its methods tells the file
        members = (getattr(member, "__func__", member) for member in vars(attempt).values())
        code = next((member.__code__ for member in members if hasattr(member, "__code__")), None)
    frames = traceback.extract_tb(error.__traceback__, limit=-100)  # an endless recursion has thousands
    return [f for f in frames if code is not None and f.filename == code.co_filename]


def blank_part(error, attempt):
    """The name of the function that still holds the stub's `raise NotImplementedError`, or None."""
    if not isinstance(error, NotImplementedError):
        return None
    frames = own_frames(error, attempt)
    from_stub = frames and (not str(error) or (frames[-1].line or "").startswith("raise"))
    return frames[-1].name if from_stub else None


def about_error(exercise, attempt, error):
    if isinstance(error, RecursionError):
        return "It calls itself without end."
    message = " ".join(str(error).split()).rstrip(".")
    message = message if len(message) <= 200 else message[:197] + "..."
    frames = own_frames(error, attempt)
    from_outside = isinstance(error, TypeError) and not frames
    if from_outside and ("keyword argument" in message or not fits(attempt, exercise.reference)):
        return f"It is called as {exercise.name}{signature(exercise.reference)}; yours takes {signature(attempt)}."
    where = f"Line {frames[-1].lineno}, `{frames[-1].line}`, raises" if frames else "It raises"
    hint = next((f" {says}" for words, says in exercise.explain.items() if words in message), "")
    return f"{where} {type(error).__name__}: {message}.{hint}"


def about_missing_error(case, want, out):
    kind = type(want.error).__name__
    if out.error is None:
        return f"With {described(case)}, {kind} is expected, and yours returned {out.value!r}."
    if not isinstance(out.error, type(want.error)):
        return f"With {described(case)}, {kind} is expected, and yours raised {type(out.error).__name__}: {out.error}."
    word = next(word for word in case.mentions if word not in str(out.error))
    return f"With {described(case)}, your {kind} does not name {word!r}. Whoever reads it should know what to mend."
