"""What an exercise is, how an attempt is run, and what `check` prints and returns.

An exercise is a reference, a maker of random cases, and a list of mistakes: small wrong implementations, each with the
sentence a reader gets who computes the same. The tests run every mistake through the check, so the list that diagnoses
is also the list that proves the check.
"""

import contextlib
import copy
import difflib
import importlib
import io
import logging
import os
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

CHAPTERS = ("start_here", "memory", "lora", "qlora")  # modules of utils.checks, searched in this order
GRADING = "NBGRADER_EXECUTION"  # nbgrader sets it to "autograde" or "validate"


@dataclass(frozen=True)
class Case:
    """One call. inputs: argument name -> value, in the order of the call.

    kinds     what is special about it: "leading" (several leading axes), "rectangular", "bf16", ...
    numbers   quantities that a sentence may name: {"r": 8, "alpha": 16}
    mentions  words that the error message must hold, when the reference raises
    later     judged only when every other case is right, so that a finer point never hides a plain mistake
    """

    inputs: dict
    kinds: tuple = ()
    numbers: dict = field(default_factory=dict)
    mentions: tuple = ()
    later: bool = False


@dataclass(frozen=True)
class Mistake:
    """A wrong answer that people write. attempt: the function or class.

    says    the sentence for whoever computes the same; {r} and other numbers of the case are filled in, or a function
            of the dict of numbers. None: the general diagnosis finds it.
    expect  a part of the sentence that the tests look for, when says is None
    """

    name: str
    attempt: Callable
    says: str | Callable | None = None
    expect: str = ""

    def sentence(self, numbers):
        if callable(self.says):
            return self.says(numbers)
        shown = {k: f"{v:,g}" if isinstance(v, (int, float)) else v for k, v in numbers.items()}
        return self.says.format(**shown)


@dataclass(frozen=True)
class Remark:
    """Right, but: a pass with a remark, and a point of its own under `check(f, name)`.

    seen: attempt -> bool   fact: said when that point is won   attempts: right answers with the remark, for the tests
    """

    name: str
    says: str
    seen: Callable
    fact: str
    attempts: tuple = ()


@dataclass(frozen=True)
class Exercise:
    """Everything the check of one function knows.

    cases(rng)    fresh inputs, a list of Case; rng: torch.Generator
    alternatives  differently written right answers
    fact          what a reader learns on success: a string, or a function of the cases
    call          how a case is run: (attempt, *inputs) -> value. A dict of findings is compared key by key.
    first         as call, for what can be judged of a class whose backward is blank: its output
    grads         inputs whose gradient must be right, the most telling first
    base          (*inputs) -> the part of the output that is not the update; ratios are then taken of the update
    kinds         kind -> the sentence for an attempt that fails for that kind of case only
    explain       key of a findings dict, or words of an error message -> the sentence to add; "None" -> the one for a
                  None where it is no answer
    returns       the names of the returned values, where there are several
    tolerance     relative to the largest entry; None: by dtype      agrees: (want, got) -> bool, to replace it
    """

    name: str
    reference: Callable
    cases: Callable
    mistakes: tuple
    alternatives: tuple
    fact: str | Callable
    remarks: tuple = ()
    call: Callable = lambda attempt, *inputs: attempt(*inputs)
    first: Callable | None = None
    grads: tuple = ()
    base: Callable | None = None
    kinds: dict = field(default_factory=dict)
    explain: dict = field(default_factory=dict)
    returns: tuple = ()
    tolerance: float | None = None
    agrees: Callable | None = None

    def mistake(self, name):
        for mistake in self.mistakes:
            if mistake.name == name:
                return mistake
        raise ValueError(f"{self.name} has no mistake {name!r}; it has {', '.join(m.name for m in self.mistakes)}")

    def remark(self, name):
        for remark in self.remarks:
            if remark.name == name:
                return remark
        raise ValueError(f"{self.name} has no point {name!r}; it has {[r.name for r in self.remarks]}")


@dataclass
class Outcome:
    """What one call left behind. grads: name -> gradient or None, only where the exercise asks for gradients."""

    value: object = None
    error: BaseException | None = None
    inputs: dict = field(default_factory=dict)
    grads: dict = field(default_factory=dict)


# ------------------------------------------------------------------------------------------------- looking up


def chapters():
    for name in CHAPTERS:
        yield importlib.import_module(f"utils.checks.{name}")


def find(name):
    """The Exercise of that name; ValueError with the nearest names when there is none."""
    known = []
    for chapter in chapters():
        for exercise in chapter.EXERCISES:
            if exercise.name == name:
                return exercise
            known.append(exercise.name)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or known
    raise ValueError(
        f"no exercise is called {name!r}. check() goes by the name after def or class; near it: {', '.join(near)}"
    )


# ------------------------------------------------------------------------------------------------- running


@contextlib.contextmanager
def quiet():
    """No output, warning or log line escapes, and the notebook's own random numbers stay where they were."""
    disabled = logging.root.manager.disable
    sink = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(disabled)


def run(exercise, attempt, case, seed=0, grads=False):
    """Call the attempt on copies of the case's inputs, and with `grads` send a fixed random gradient back."""
    out = Outcome(inputs=copy.deepcopy(case.inputs))
    with quiet():
        torch.default_generator.manual_seed(seed)
        wanted = [out.inputs[name] for name in exercise.grads] if grads else []
        for tensor in wanted:
            tensor.requires_grad_(True)
        try:
            out.value = exercise.call(attempt, *out.inputs.values())
            if grads and out.value.requires_grad:
                ramp = torch.linspace(-1, 2, out.value.numel(), dtype=out.value.dtype)
                out.value.backward(ramp.view(out.value.shape))
        except (Exception, SystemExit) as error:  # a reader's exit() must not end the notebook
            out.error = error
        out.grads = {name: tensor.grad for name, tensor in zip(exercise.grads, wanted, strict=False)}
    return out


def judge(exercise, attempt, seed=None):
    """The verdict on an attempt: (kind, sentence); kind is "blank", "wrong" or "right". seed: for tests."""
    from utils.checks.diagnose import diagnose  # here, because it needs this module
    from utils.checks.errors import blank_part, wrong_kind

    problem = wrong_kind(exercise, attempt)
    if problem:
        return "wrong", problem
    rng = torch.Generator().manual_seed(secrets.randbits(48) if seed is None else seed)
    cases = exercise.cases(rng)
    got = [run(exercise, attempt, case, seed=i) for i, case in enumerate(cases)]
    blank = [part for part in (blank_part(out.error, attempt) for out in got) if part]
    if blank and (blank[0] != "backward" or exercise.first is None):
        return "blank", "not written yet."
    if blank:
        forward = replace(exercise, call=exercise.first)
        got = [run(forward, attempt, case, seed=i) for i, case in enumerate(cases)]
        problem = diagnose(forward, attempt, cases, got)
        return ("wrong", f"In forward: {problem}") if problem else ("blank", "its backward is not written yet.")
    problem = diagnose(exercise, attempt, cases, got)
    if problem:
        return "wrong", problem
    return "right", exercise.fact if isinstance(exercise.fact, str) else exercise.fact(cases)


def check(obj, point=None):
    """Check an exercise by the name of `obj`, print one line, and return what later cells should use.

    obj: the function or class of the reader       point: the name of a remark that must not apply, or None
    Learning: right -> obj; blank or wrong -> the reference, so that the chapter still runs.
    Grading (NBGRADER_EXECUTION is set): blank or wrong -> AssertionError with the same sentence.
    """
    if not hasattr(obj, "__name__"):
        raise TypeError(f"check() takes the function or class you wrote, and got a {type(obj).__name__}")
    exercise = find(obj.__name__)
    remarks = exercise.remarks if point is None else (exercise.remark(point),)
    with torch.random.fork_rng(devices=[]):  # what later cells draw must not depend on how often a check was run
        verdict, sentence = judge(exercise, obj)
        with quiet():
            seen = [remark for remark in remarks if verdict == "right" and remark.seen(obj)]
    if verdict == "right":
        if seen and point is not None:
            verdict, sentence = "wrong", seen[0].says
        elif seen:
            sentence = f'{seen[0].says} (This point is yours; "{seen[0].name}" is a second one.)'
        elif obj is exercise.reference:  # the check of a fallen-back exercise was run again
            sentence = "right, and it is ours. Run the cell that defines yours, then check again."
        else:
            sentence = f"right. {sentence if point is None else remarks[0].fact}"
    if verdict != "right" and os.environ.get(GRADING):
        raise AssertionError(f"{exercise.name}: {sentence}") from None
    ours = {"blank": " The rest of the chapter uses ours; come back any time.", "right": ""}
    print(f"{exercise.name}: {sentence}{ours.get(verdict, ' (The rest of the chapter uses ours.)')}")
    return obj if verdict == "right" else exercise.reference
