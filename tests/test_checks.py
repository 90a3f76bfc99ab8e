"""The graders: every mistake gets its own sentence, every right answer passes, nothing leaks out of a check."""

import itertools
import logging
import random
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from utils.checks import check, core, find
from utils.checks.compare import agrees, same_mistake
from utils.checks.core import GRADING, judge, run

EXERCISES = [exercise for chapter in core.chapters() for exercise in chapter.EXERCISES]
SEEDS = range(5)


def pairs(field):
    """(exercise, thing) for every thing in a field of every exercise, with readable ids."""
    return [
        pytest.param(exercise, thing, id=f"{exercise.name}-{i if field == 'alternatives' else thing.name}")
        for exercise in EXERCISES
        for i, thing in enumerate(getattr(exercise, field))
    ]


@pytest.fixture(autouse=True)
def learning(monkeypatch):
    monkeypatch.delenv(GRADING, raising=False)


def lines(capsys):
    out, err = capsys.readouterr()
    assert err == ""
    return out.strip()


# ------------------------------------------------------------------------------------------------- the registry


@pytest.mark.parametrize("exercise, mistake", pairs("mistakes"))
def test_every_mistake_gets_its_own_sentence(exercise, mistake):
    for seed in SEEDS:
        verdict, sentence = judge(exercise, mistake.attempt, seed)
        assert verdict == "wrong"
        if mistake.says is None:
            assert mistake.expect in sentence, sentence
        else:
            # the numbers differ from case to case, so compare the words between them
            words = [part.split("}", 1)[-1] for part in mistake.says.split("{")]
            assert all(word in sentence for word in words), sentence
        assert "{" not in sentence and sentence[-1] in ".?", sentence


@pytest.mark.parametrize("exercise, answer", pairs("alternatives"))
def test_every_right_answer_passes(exercise, answer):
    for seed in SEEDS:
        verdict, sentence = judge(exercise, answer, seed)
        assert verdict == "right", sentence


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_the_registry_itself(exercise):
    for seed in SEEDS:
        assert judge(exercise, exercise.reference, seed)[0] == "right"
    assert len(exercise.mistakes) >= 5 and len(exercise.alternatives) >= 2
    assert len({m.name for m in exercise.mistakes}) == len(exercise.mistakes)
    for mistake in exercise.mistakes:
        assert (mistake.says is None) == bool(mistake.expect), "a sentence of its own, or what the diagnosis says"
        assert exercise.mistake(mistake.name) is mistake
    assert find(exercise.name) is exercise


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.name)
def test_no_two_mistakes_look_alike(exercise):
    """Otherwise the sentence would depend on which comes first in the list."""
    named = [m for m in exercise.mistakes if m.says is not None]
    for seed in SEEDS[:2]:
        cases = exercise.cases(torch.Generator().manual_seed(seed))
        outcomes = {m.name: [run(exercise, m.attempt, c, seed=i) for i, c in enumerate(cases)] for m in named}
        for one, other in itertools.combinations(named, 2):
            if one.says != other.says:
                alike = same_mistake(exercise, cases, outcomes[one.name], outcomes[other.name])
                assert not alike, (one.name, other.name)


@pytest.mark.parametrize("exercise, remark", pairs("remarks"))
def test_a_remark_is_a_pass_and_a_point_of_its_own(exercise, remark, capsys, monkeypatch):
    for attempt in remark.attempts:
        attempt.__name__ = exercise.name
        assert check(attempt) is attempt
        second = f'(This point is yours; "{remark.name}" is a second one.)'
        assert lines(capsys) == f"{exercise.name}: {remark.says} {second}"
        assert check(attempt, remark.name) is exercise.reference
        assert remark.says in lines(capsys)
        monkeypatch.setenv(GRADING, "autograde")
        assert check(attempt) is attempt
        with pytest.raises(AssertionError, match=remark.says[:20]):
            check(attempt, remark.name)
        monkeypatch.delenv(GRADING)
        capsys.readouterr()
    for answer in (exercise.reference, *exercise.alternatives):
        assert not remark.seen(answer)


def test_cases_are_fresh_and_of_several_shapes():
    cases = [find("lora_forward").cases(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert not torch.equal(cases[0][0].inputs["x"], cases[1][0].inputs["x"])
    assert len({tuple(case.inputs["W"].shape) for case in cases[0]}) >= 4


# ------------------------------------------------------------------------------------------------- check()


def lora_forward(x, W, A, B, alpha):
    raise NotImplementedError


def test_blank_falls_back_in_one_line(capsys):
    assert check(lora_forward) is find("lora_forward").reference
    assert lines(capsys) == "lora_forward: not written yet. The rest of the chapter uses ours; come back any time."


def test_right_returns_the_readers_own(capsys):
    def lora_forward(x, W, A, B, alpha):
        return F.linear(x, W) + alpha / len(A) * F.linear(F.linear(x, A), B)

    assert check(lora_forward) is lora_forward
    # 8 (4096 + 4096) / 4096^2 = 0.0039
    assert lines(capsys).startswith("lora_forward: right. At d = 4096 and r = 8 you touched 0.39 %")
    assert check(lora_forward, "grouping") is lora_forward
    assert lines(capsys).startswith("lora_forward: right. No (d_out, d_in) matrix is formed")


def test_checking_again_after_falling_back_says_whose_it_is(capsys):
    ours = check(lora_forward)
    capsys.readouterr()
    assert check(ours) is ours
    assert "it is ours. Run the cell that defines yours" in lines(capsys)


def test_the_table_of_the_first_exercise(capsys):
    """The first case has r = 8 and alpha = 16, so these sentences are known to the letter."""
    exercise = find("lora_forward")
    said = {
        "no_rank": "Your update is exactly 8 times the expected one, and r is 8: the 1/r is missing.",
        "no_alpha": "Your update is 1/16 of the expected one, and alpha is 16: alpha is missing.",
        "root": "You scaled by alpha / sqrt(r). That is rsLoRA (chapter 4); eq. 3 uses alpha / r.",
        "W_not_transposed": "on (7, 5) it fails. PyTorch stores W as (d_out, d_in): which axis does x meet?",
        "A_and_B_swapped": "on (7, 5) it fails. PyTorch stores W as (d_out, d_in): which axis does x meet?",
        "update_alone": "You returned the update alone. The frozen path x W^T is missing.",
    }
    for name, sentence in said.items():
        attempt = exercise.mistake(name).attempt
        attempt.__name__ = "lora_forward"
        assert check(attempt) is exercise.reference
        line = lines(capsys)
        assert sentence in line and line.startswith("lora_forward: ") and "uses ours" in line


def test_grading_raises_the_same_sentence_and_is_silent(capsys, monkeypatch):
    monkeypatch.setenv(GRADING, "autograde")
    with pytest.raises(AssertionError, match="^lora_forward: not written yet"):
        check(lora_forward)
    wrong = find("lora_forward").mistake("no_rank").attempt
    wrong.__name__ = "lora_forward"
    with pytest.raises(AssertionError, match="^lora_forward: Your update is exactly 8 times") as caught:
        check(wrong)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert lines(capsys) == ""
    right = find("lora_forward").alternatives[0]
    right.__name__ = "lora_forward"
    assert check(right) is right


@pytest.mark.parametrize("grading", (False, True))
def test_noise_of_the_attempt_stays_inside(grading, capsys, monkeypatch):
    if grading:
        monkeypatch.setenv(GRADING, "autograde")

    def lora_scale(alpha, r, scaling="standard"):
        print("hello")
        print("hello", file=sys.stderr)
        warnings.warn("careful", stacklevel=1)
        logging.getLogger("reader").error("alarm")
        if scaling not in ("standard", "rslora"):
            raise ValueError(scaling)
        return alpha / (r if scaling == "standard" else r**0.5)

    assert check(lora_scale) is lora_scale
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and "hello" not in out
    assert logging.root.manager.disable == logging.NOTSET


def test_random_numbers_and_gradient_mode_of_the_notebook_are_left_alone(capsys):
    def lora_delta(A, B, alpha):
        torch.manual_seed(3)
        torch.set_grad_enabled(False)
        return torch.randn(B.shape[0], A.shape[1])

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check(lora_delta)
    assert torch.equal(torch.rand(3), expected) and torch.is_grad_enabled()
    with torch.no_grad():  # an attempt is judged with gradients on, wherever the cell stands
        check(find("lora_delta").reference)
        assert not torch.is_grad_enabled()
    assert "right" in lines(capsys)


def test_a_name_that_no_exercise_has():
    def lora_forwrd(x):
        return x

    with pytest.raises(ValueError, match="no exercise is called 'lora_forwrd'.*lora_forward"):
        check(lora_forwrd)
    with pytest.raises(ValueError, match="'<lambda>'"):
        check(lambda x: x)
    with pytest.raises(TypeError, match="got a int"):
        check(3)
    with pytest.raises(ValueError, match="has no point 'speed'"):
        check(lora_forward, "speed")
    with pytest.raises(ValueError, match="has no mistake 'typo'.*no_rank"):
        find("lora_forward").mistake("typo")


# ------------------------------------------------------------------------------- what no registry holds


def test_lucky_attempts_do_not_pass():
    """Random answers, a remembered answer, and an answer that is right in all cases but one."""
    exercise = find("lora_delta")
    remembered = []

    def same_again(A, B, alpha):
        remembered.append(B @ A * (alpha / len(A)))
        return remembered[0]

    def nearly(A, B, alpha):
        return B @ A * (alpha / len(A)) * (1.01 if A.shape[1] == 5 else 1)

    for wrong in (lambda A, B, alpha: torch.randn(len(B), A.shape[1]) * random.random(), same_again, nearly):
        assert all(judge(exercise, wrong, seed)[0] == "wrong" for seed in SEEDS)


def test_the_bugs_to_find_run_as_a_readers_cell():
    """The chapters show the source of these as the stub of an exercise: it must stand alone."""
    import inspect

    bugs = (("shard", "gradients_whole"), ("freeze", "linear_layers"), ("count_parameters", "by_module"))
    for exercise, mistake in bugs:
        function = find(exercise).mistake(mistake).attempt
        cell = {"nn": torch.nn}
        exec(inspect.getsource(function), cell)
        verdict, sentence = judge(find(exercise), cell[function.__name__], 0)
        assert verdict == "wrong" and "The bug is still there" in sentence


def test_the_bug_of_sharding_is_not_given_away():
    """The chapter asks for a check of the function as it stands: finding the stage and the term is the exercise."""
    exercise = find("shard")
    for seed in SEEDS:
        sentence = judge(exercise, exercise.mistake("gradients_whole").attempt, seed)[1]
        assert "gradient" not in sentence and "stage 2" not in sentence


def test_agreement_needs_the_named_words():
    exercise = find("match_targets")
    case = next(c for c in exercise.cases(torch.Generator().manual_seed(0)) if c.mentions)
    want = run(exercise, exercise.reference, case)
    assert agrees(exercise, case, want, want)
    assert not agrees(exercise, case, want, run(exercise, exercise.mistake("nameless").attempt, case))


def test_a_check_leaves_the_random_numbers_of_later_cells_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    for name in ("lora_init", "lora_forward", "LoRAFunction", "freeze"):
        check(find(name).reference)
    assert torch.equal(torch.rand(3), expected)
