"""utils/experiments.py and utils/recording.py, and the records that are committed."""

import json

import datasets
import pytest
import torch

from utils import experiments
from utils.experiments import FOLDER, captured, final, groups, load, run_one
from utils.recording import choose, fingerprints, more_rates, record
from utils.subspace import Subspace

INTENT = {"model": "encoder", "task": "intent"}
SETTINGS = {**INTENT, "method": "LoRA", "config": {"r": 1, "targets": ["query"]}, "steps": 1}
MADE = {"slice": {"arm": "a", "seed": 0}, "command": "python -m somewhere"}
RECORDED = sorted(path.stem for path in FOLDER.glob("*.json"))


def fake(best=0.1, calls=None):
    """A run that needs no model: validation is best at one rate, test at the highest one."""
    def run(settings, seed, lr):
        if calls is not None:
            calls.append((lr, seed))
        return {"seed": seed, "lr": lr, "cpu_seconds": 0, "test": {"loss": 1.0, "accuracy": lr},
                "validation": {"loss": 1.0, "accuracy": 0.9 if lr == best else 0.5}}
    return run


def arms(*rates, **more):
    return {"a": ({**SETTINGS, **more}, rates)}


def test_the_rate_is_chosen_on_validation_and_run_with_every_seed(tmp_path):
    made = record("x", arms(0.01, 0.1, 1.0), folder=tmp_path, run=fake(0.1), **MADE)
    assert made["arms"]["a"]["lr"] == 0.1
    assert made == load("x", tmp_path)
    assert [(r["lr"], r["seed"]) for r in made["runs"]] == [(0.01, 0), (0.1, 0), (1.0, 0), (0.1, 1), (0.1, 2)]
    assert [r["seed"] for r in final(made, "a")] == [0, 1, 2]
    assert made["complete"] and {"date", "versions", "machine", "inputs", "command", "slice", "seeds"} <= made.keys()


def test_equal_scores_are_decided_by_the_loss_and_a_diverged_run_never_wins():
    def scored(lr, **validation):
        return {"arm": "a", "seed": 0, "lr": lr, "validation": validation}

    runs = [scored(1, accuracy=1.0, loss=0.2), scored(2, accuracy=1.0, loss=0.1), scored(3, accuracy=0.9, loss=0.0),
            {"arm": "a", "seed": 0, "lr": 4, "diverged": True}, scored(5, accuracy=1.0, loss=None)]
    assert choose(runs, "a", 0, [1, 2, 3, 4, 5]) == 2
    assert choose(runs, "a", 0, [1, 3]) == 1


def test_a_best_rate_at_an_end_gives_every_arm_two_more(tmp_path):
    two = {"a": (SETTINGS, (0.01, 0.1, 1.0)), "b": ({**SETTINGS, "steps": 2}, (0.001, 0.01, 0.1))}
    made = record("x", two, folder=tmp_path, run=fake(0.1), **MADE)  # inside for a, at the end for b
    assert made["arms"]["a"]["tries"] == [0.01, 0.1, 1.0, 0.032, 0.32]
    assert made["arms"]["b"]["tries"] == [0.001, 0.01, 0.1, 1.0, 10.0]
    fixed = record("y", two, folder=tmp_path, run=fake(0.1), extend=False, **MADE)
    assert [len(arm["tries"]) for arm in fixed["arms"].values()] == [3, 3]
    assert record("x", two, folder=tmp_path, run=fake(0.1), **MADE)["arms"] == made["arms"]  # resumed: the same tries


def test_more_rates_go_where_the_best_may_be():
    assert more_rates([1e-3, 1e-2, 1e-1], 1e-3) == [1e-4, 1e-5]
    assert more_rates([1e-3, 1e-2, 1e-1], 1e-1) == [1.0, 10.0]
    assert more_rates([1e-3, 1e-2, 1e-1], 1e-2) == [0.0032, 0.032]


def test_an_arm_with_fewer_tries_is_refused(tmp_path):
    with pytest.raises(ValueError, match="same number of learning rates.*'b': 1"):
        record("x", {"a": (SETTINGS, (0.1, 1.0)), "b": (SETTINGS, (0.1,))}, folder=tmp_path, run=fake(), **MADE)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_record_goes_on_where_it_stopped(tmp_path):
    calls, whole = [], fake()

    def breaks(settings, seed, lr):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append((lr, seed))
        return whole(settings, seed, lr)

    with pytest.raises(KeyboardInterrupt):
        record("x", arms(0.01, 0.1, 1.0), folder=tmp_path, run=breaks, **MADE)
    assert not load("x", tmp_path)["complete"]
    record("x", arms(0.01, 0.1, 1.0), folder=tmp_path, run=fake(calls=calls), **MADE)
    assert calls == [(0.01, 0), (0.1, 0), (1.0, 0), (0.1, 1), (0.1, 2)]
    record("x", arms(0.01, 0.1, 1.0), folder=tmp_path, run=fake(calls=calls), **MADE)
    assert len(calls) == 5


def test_a_record_about_other_settings_or_weights_is_not_continued(tmp_path):
    record("x", arms(0.01, 0.1, 1.0), folder=tmp_path, run=fake(), **MADE)
    with pytest.raises(ValueError, match="another a: delete it"):
        record("x", arms(0.01, 0.1, 1.0, steps=9), folder=tmp_path, run=fake(), **MADE)
    text = (tmp_path / "x.json").read_text()
    digest = fingerprints([SETTINGS])["data/models/tiny-bert/model.safetensors"]
    (tmp_path / "x.json").write_text(text.replace(digest, "0" * 16))
    with pytest.raises(ValueError, match="tiny-bert/model.safetensors: delete it"):
        record("x", arms(0.01, 0.1, 1.0), folder=tmp_path, run=fake(), **MADE)


def test_names_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="no recorded experiment 'y'; recorded are: none yet"):
        load("y", tmp_path)
    made = record("x", arms(0.01, 0.1, 1.0), folder=tmp_path, run=fake(), **MADE)
    with pytest.raises(ValueError, match="recorded are: x"):
        load("y", tmp_path)
    with pytest.raises(ValueError, match="x has no arm 'b'; it has a"):
        final(made, "b")


def test_captured_by_hand():
    assert captured(torch.diag(torch.tensor([2.0, 1.0, 0.0, 1.0]))) == pytest.approx([4 / 6, 5 / 6, 1, 1], abs=1e-4)


def test_a_rate_for_the_head_and_one_for_the_rest():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 3)})
    assert [(len(part["params"]), part["lr"]) for part in groups(model, 1.0)] == [(4, 1.0)]
    assert [(len(part["params"]), part["lr"]) for part in groups(model, 1.0, 5.0)] == [(2, 5.0), (2, 1.0)]
    # 6 weights share 2 coordinates; one of 1/sqrt(3) length moves its weights by as much as the rate says
    assert groups(Subspace(model, 2, keep=("classifier",)), 1.0, 5.0)[1]["lr"] == pytest.approx(3**0.5)


@pytest.fixture
def few_rows(monkeypatch):
    """Sixteen rows of each split: enough to run everything once."""
    def load_few(name):
        return datasets.DatasetDict({split: rows.select(range(16)) for split, rows in whole(name).items()})

    whole = experiments.load_task
    monkeypatch.setattr(experiments, "load_task", load_few)


def test_one_run_is_repeatable_and_counts_what_it_trains(few_rows):
    torch.set_num_threads(1)
    settings = {**SETTINGS, "config": {"r": 1, "alpha": 2, "targets": ["query", "value"]}, "steps": 2, "batch_size": 4}
    one, again, other = (run_one(settings, seed, 1e-2) for seed in (0, 0, 1))
    assert one["trained"] == 4 * 2 * (128 + 128) + 8 * 128 + 8
    for run in (one, again, other):
        del run["cpu_seconds"]
    assert one == again
    assert one["test"] != other["test"]
    assert one["validation"].keys() == {"loss", "accuracy"}


@pytest.mark.parametrize("settings, trained", [
    ({"method": "frozen"}, 1032),
    ({"method": "subspace", "config": {"d": 7}}, 1032 + 7),
    ({"method": "full", "spectrum": True}, None),
    ({"method": "LoRA", "config": {"r": 1, "targets": ["query"]}, "quantize": "NF4"}, 4 * (128 + 128) + 1032),
])
def test_the_other_methods_run(few_rows, settings, trained):
    run = run_one({**INTENT, "steps": 1, "batch_size": 2, **settings}, 0, 1e-3)
    assert trained in (None, run["trained"])
    if "spectrum" in settings:
        shares = run["spectrum"]["bert.encoder.layer.0.attention.self.query.weight"]
        assert shares == sorted(shares) and len(shares) == 64 and 0 < shares[0] <= shares[-1] <= 1


# ------------------------------------------------------------------------------------------ the committed records


@pytest.mark.parametrize("name", RECORDED)
def test_a_committed_record_is_whole_fair_and_fresh(name):
    kept = load(name)
    assert kept["complete"] and kept["name"] == name
    tuned = {label: arm for label, arm in kept["arms"].items() if arm["tries"] != [0]}
    assert len({len(arm["tries"]) for arm in tuned.values()}) == 1
    for label, arm in kept["arms"].items():
        assert arm["lr"] == choose(kept["runs"], label, kept["seeds"][0], arm["tries"])
        assert [r["seed"] for r in final(kept, label)] == kept["seeds"]
        assert {r["lr"] for r in kept["runs"] if r["arm"] == label} == set(arm["tries"])
    assert kept["slice"]["arm"] in kept["arms"]
    assert kept["inputs"] == fingerprints([arm["settings"] for arm in kept["arms"].values()]), "other weights or data"


@pytest.mark.parametrize("name", RECORDED)
def test_a_committed_record_is_small_and_tells_nothing_of_the_machine_but_its_kind(name):
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert len(text) < 200_000
    assert not any(place in text for place in ("/home", "/root", "/tmp", "/work", "Users"))
    json.loads(text, parse_constant=lambda value: pytest.fail(f"{value} is no JSON"))
