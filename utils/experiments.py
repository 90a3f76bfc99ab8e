"""Recorded experiments: how one run is made, and how the record of many is read.

    record = load("lora_vs_full")                      # data/experiments/lora_vs_full.json
    arm = record["arms"]["intent: LoRA r=8 q,v"]       # {"settings", "tries": learning rates, "lr": the best of them}
    run_one(arm["settings"], seed=0, lr=arm["lr"])     # the same run again, live
    final(record, "intent: LoRA r=8 q,v")              # its runs at the best learning rate, one per seed

utils/recording.py makes the records.
"""

import json
import math
import time

import torch

import utils

from .attach import attach, freeze
from .models import load_base, load_tokenizer
from .paths import DATA
from .quantization.base import quantize_base
from .subspace import Subspace
from .tasks import collate, evaluate, load_task
from .training import train

FOLDER = DATA / "experiments"


def load(name, folder=FOLDER):
    """The record of an experiment, a dict. Raises ValueError if there is none of that name."""
    path = folder / f"{name}.json"
    if not path.exists():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json"))) or "none yet"
        raise ValueError(f"there is no recorded experiment {name!r}; recorded are: {known}")
    return json.loads(path.read_text(encoding="utf-8"))


def final(record, arm):
    """The runs of an arm at its best learning rate, one per seed."""
    if arm not in record["arms"]:
        raise ValueError(f"{record['name']} has no arm {arm!r}; it has {', '.join(record['arms'])}")
    return [r for r in record["runs"] if r["arm"] == arm and r["lr"] == record["arms"][arm]["lr"]]


def build(settings, seed):
    """The model that `settings` describe, ready to train. The seed draws its head, its adapter or its subspace."""
    torch.manual_seed(seed)
    labels = getattr(load_task(settings["task"])["train"].features.get("label"), "num_classes", None)
    model = load_base(settings["model"], head="classify" if labels else "lm", num_labels=labels, seed=seed)
    if settings.get("base") == "random":
        model = type(model)(model.config)
    if settings.get("quantize"):
        quantize_base(model, getattr(utils, settings["quantize"])())
    method, config = settings["method"], settings.get("config", {})
    if method == "full":
        return model
    if method == "frozen":
        freeze(model, keep=("classifier",))
        return model
    if method == "subspace":
        return Subspace(model, config["d"], seed, keep=("classifier",))
    attach(model, getattr(utils, method)(**config))
    return model


def groups(model, lr, head_lr=None):
    """What an optimizer gets: everything trained at lr, or a classifier at head_lr and the rest at lr."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if isinstance(model, Subspace):
        lr = lr * math.sqrt(model.D / len(model.coordinates))  # so that lr is what one weight moves, as elsewhere
    is_head = {name: head_lr is not None and "classifier" in name.split(".") for name, _ in trained}
    parts = [{"params": [p for name, p in trained if is_head[name]], "lr": head_lr},
             {"params": [p for name, p in trained if not is_head[name]], "lr": lr}]
    return [part for part in parts if part["params"]]


def run_one(settings, seed, lr):
    """Trains and scores once -> dict of results. Settings, seed and machine the same: the numbers are the same.

    settings: {"model", "task", "steps", "method": "full", "frozen", "subspace" or a configuration of utils ("LoRA"),
    "config": its fields}, and if wanted "batch_size", "optimizer", "clip", "head_lr", "base": "random", "quantize":
    "NF4", "FP4" or "INT4" for the frozen base,
    "probes": {name: [task, split]} to score besides validation and test, and "spectrum": True.
    The scores of a run whose loss or gradient became infinite are missing, and it has "diverged": True.
    """
    model = build(settings, seed)
    tokenizer, task = load_tokenizer(settings["model"]), load_task(settings["task"])
    start = {name: p.detach().clone() for name, p in model.named_parameters()} if settings.get("spectrum") else None
    result = {"seed": seed, "lr": lr, "trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    options = {key: settings[key] for key in ("batch_size", "optimizer", "clip") if key in settings}
    began, losses = time.process_time(), []
    if settings["steps"]:
        try:
            losses = train(model, list(task["train"]), lambda rows: collate(rows, tokenizer), lr=lr, seed=seed,
                           params=groups(model, lr, settings.get("head_lr")), steps=settings["steps"], quiet=True,
                           **options).loss
        except FloatingPointError:
            return {**result, "diverged": True, "cpu_seconds": round(time.process_time() - began, 1)}
    result["cpu_seconds"] = round(time.process_time() - began, 1)
    n = max(1, len(losses) // 10)  # the mean loss of each tenth of the steps
    result["train_loss"] = [round(sum(losses[i:i + n]) / n, 5) for i in range(0, len(losses) - n + 1, n)]
    probes = {split: (settings["task"], split) for split in ("validation", "test")} | settings.get("probes", {})
    for name, (probe, split) in probes.items():
        scores = evaluate(model, load_task(probe)[split], tokenizer)
        result[name] = {key: round(value, 6) if math.isfinite(value) else None for key, value in scores.items()}
    if start:
        result["spectrum"] = {name: captured(p.detach() - start[name]) for name, p in model.named_parameters()
                              if p.ndim == 2 and not torch.equal(p, start[name])}
    return result


def captured(matrix, most=64):
    """[share of the matrix's squared norm that its k largest singular values hold, for k = 1 ... most]"""
    squares = torch.linalg.svdvals(matrix.double()) ** 2  # (min(d_out, d_in),), largest first
    return [round(share, 4) for share in (squares.cumsum(0) / squares.sum())[:most].tolist()]
