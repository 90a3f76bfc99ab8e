"""Recording an experiment: every arm gets the same number of learning rates, and the file says all of it.

The rates of an arm are tried with the first seed and compared on the validation split; the best one is run with the
other seeds too. The test split is scored in every run and never used for a choice.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform

import torch

from .experiments import FOLDER, run_one
from .paths import ROOT

PACKAGES = ("torch", "transformers", "accelerate", "datasets")
SCORES = ("accuracy", "exact_match", "f1")
MODEL_FOLDERS = {"decoder": "tiny-llama", "encoder": "tiny-bert"}


def record(name, arms, *, slice, command, seeds=(0, 1, 2), extend=True, folder=FOLDER, run=run_one):
    """Runs an experiment, or what is still missing of it, and writes folder/NAME.json after every run.

    arms: {label: (settings, learning rates)}; see utils.experiments.run_one for the settings
    slice: {"arm", "seed"}, a short run that the notebook repeats live   command: what records it again
    extend: if the best rate of any arm is the first or last of its list, every arm gets two more tries (`more_rates`)
    Raises ValueError for unequal numbers of rates, or if the file is about other weights, data or settings.
    """
    counts = {label: len(rates) for label, (_, rates) in arms.items() if list(rates) != [0]}
    if len(set(counts.values())) > 1:
        raise ValueError(f"every arm must get the same number of learning rates, not {counts}")
    path = folder / f"{name}.json"
    state = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    inputs = fingerprints([settings for settings, _ in arms.values()])
    differs = [file for file, digest in state.get("inputs", {}).items() if inputs.get(file) != digest]
    differs += [label for label, arm in state.get("arms", {}).items() if arms.get(label, [None])[0] != arm["settings"]]
    if differs:
        raise ValueError(f"{path.name} was recorded with another {', '.join(differs)}: delete it to record anew")

    runs = state.get("runs", [])
    tries = {label: list(rates) for label, (_, rates) in arms.items()}
    state = {
        "name": name, "command": command, "date": datetime.date.today().isoformat(), "complete": False,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads(),
                    "vector": torch.backends.cpu.get_cpu_capability()},
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
        "inputs": inputs, "seeds": list(seeds), "slice": slice,
        "arms": {label: {"settings": arm[0], "tries": tries[label], "lr": None} for label, arm in arms.items()},
        "runs": runs,
    }

    def do(label, lr, seed):
        if not any((r["arm"], r["lr"], r["seed"]) == (label, lr, seed) for r in runs):
            runs.append({"arm": label, **run(arms[label][0], seed, lr)})
            print(f"{name} | {label} | lr {lr:g} seed {seed} | {line(runs[-1])}", flush=True)
            write(path, state)

    for label, rates in tries.items():
        for lr in rates:
            do(label, lr, seeds[0])
    best = {label: choose(runs, label, seeds[0], tries[label]) for label in arms}
    if extend and any(best[label] in (min(rates), max(rates)) for label, rates in tries.items() if rates != [0]):
        for label, rates in tries.items():
            if rates != [0]:
                for lr in more_rates(rates, best[label]):
                    rates.append(lr)
                    do(label, lr, seeds[0])
        best = {label: choose(runs, label, seeds[0], tries[label]) for label in arms}
    for label in arms:
        state["arms"][label]["lr"] = best[label]
        for seed in seeds[1:]:
            do(label, best[label], seed)
    state["complete"] = True
    write(path, state)
    return state


def choose(runs, label, seed, rates):
    """The one of the rates with an arm's best validation score; the lower validation loss decides between equals."""
    def quality(r):
        scores = r.get("validation", {})
        if scores.get("loss") is None:  # diverged
            return (-1.0, 0.0)
        return next((scores[key] for key in SCORES if key in scores), 0.0), -scores["loss"]

    tried = [r for r in runs if r["arm"] == label and r["seed"] == seed and r["lr"] in rates]
    return max(tried, key=quality)["lr"]


def more_rates(rates, best):
    """Two more learning rates: beyond the best if it is at an end of the list, else half a step to either side."""
    rates = sorted(rates)
    step = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1))
    powers = {rates[0]: (-1, -2), rates[-1]: (1, 2)}.get(best, (-0.5, 0.5))
    return [float(f"{best * step**power:.2g}") for power in powers]


def fingerprints(all_settings):
    """{file: the first 16 digits of its sha256} of the weights and task files that an experiment reads."""
    files = {f"data/models/{MODEL_FOLDERS[settings['model']]}/model.safetensors" for settings in all_settings}
    tasks = {settings["task"] for settings in all_settings}
    tasks |= {task for settings in all_settings for task, _ in settings.get("probes", {}).values()}
    found = [path for task in tasks for path in (ROOT / "data/tasks" / task).glob("*.jsonl")]
    files |= {path.relative_to(ROOT).as_posix() for path in found}
    return {file: hashlib.sha256((ROOT / file).read_bytes()).hexdigest()[:16] for file in sorted(files)}


def line(run):
    """A run in a few words, for the terminal."""
    scores = run.get("test", {})
    return ", ".join([*(f"test {key} {value:.4g}" for key, value in scores.items() if value is not None),
                      f"{run['cpu_seconds']} s"]) if scores else "diverged"


def write(path, state):
    """The state as JSON with one line per arm and per run, put in place whole."""
    head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in state.items() if key not in ("arms", "runs")]
    arms = ",\n".join(f"  {json.dumps(label)}: {json.dumps(arm)}" for label, arm in state["arms"].items())
    runs = ",\n".join(f"  {json.dumps(r)}" for r in state["runs"])
    draft = path.with_suffix(".tmp")
    draft.write_text("{\n" + ",\n".join([*head, f'"arms": {{\n{arms}\n}}', f'"runs": [\n{runs}\n]']) + "\n}\n",
                     encoding="utf-8")
    os.replace(draft, path)
