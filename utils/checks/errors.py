"""What an exception says about an attempt, with the reader's own line."""

import inspect
import traceback

from utils.checks.values import described


def wrong_kind(exercise, attempt):
    """A sentence when a class is expected and the attempt is a function, or the reverse."""
    ours, yours = ("class" if isinstance(f, type) else "function" for f in (exercise.reference, attempt))
    return f"A {ours} is expected, and yours is a {yours}." if ours != yours else None


def signature(attempt):
    return inspect.signature(attempt.forward if isinstance(attempt, type) else attempt)


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
    if isinstance(error, TypeError) and not frames and "argument" in message:  # the call itself failed
        method = with_self(attempt) if isinstance(attempt, type) else None
        if method:
            return f"Write @staticmethod above {method}, and let ctx be its first parameter: there is no self."
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
