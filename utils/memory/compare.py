"""What others' estimators say of the same training step, beside what is predicted here and what is counted.

    python -m utils.memory.compare               prints the table, from data/published/estimators.json
    python -m utils.memory.compare record FILE   writes it anew; FILE: DeepSpeed's sources, or "-" to keep its numbers

accelerate estimate-memory    4 copies of the weights in float32 for Adam; in half precision the largest of its parts,
                              though they are there at the same time. No activations.
DeepSpeed, ZeRO 2 and 3       18 bytes per parameter spread over the GPUs, and 2 on each (stage 2) or 4 for each
                              number of the largest layer (stage 3): the fp16 gradients beside the fp32 ones
                              included; no activations
here                          the peak of a step, activations, loss and optimizer's temporaries included
counted                       live bytes, operation by operation, of a step on the meta device: every tensor is made
                              and freed as it would be, and none has numbers in it
"""

import ast
import datetime
import importlib.metadata
import json
import re
import sys
from pathlib import Path

import torch

from utils.architectures import architecture
from utils.memory.estimate import estimate
from utils.memory.instruments import LiveBytes
from utils.paths import DATA

RECORD = DATA / "published" / "estimators.json"
STEPS = (  # model, recipe, batch, length, devices, stage
    ("GPT-2", "fp32", 1, 128, 1, 0),
    ("GPT-2", "fp32", 8, 1024, 1, 0),
    ("Llama-2-7B", "fp32", 1, 512, 1, 0),
    ("Llama-2-7B", "fp32", 8, 2048, 1, 0),
    ("Llama-2-7B", "bf16 + master, fp32 gradients", 1, 512, 8, 2),
    ("Llama-2-7B", "bf16 + master, fp32 gradients", 1, 512, 8, 3),
)
NO_DROPOUT = {"GPT-2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}}


def count_step(name, batch, length):
    """Bytes at the peak of a float32 step with AdamW and eager attention, counted on the meta device."""
    model = architecture(name, attn_implementation="eager", use_cache=False, **NO_DROPOUT.get(name, {})).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    mask = torch.zeros(batch, 1, length, length, device="meta")  # given, as numbers that are not there make none

    def step():
        model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the moments
    moments = [t for state in optimizer.state.values() for t in state.values()]
    there = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *moments)}
    with LiveBytes([*model.parameters(), *model.buffers(), *moments, ids, mask]) as live:
        step()
    return sum(there.values()) + live.peak


def accelerate_says(name, dtype):
    """Bytes for training with Adam, as `accelerate estimate-memory` prints them. dtype: "float32" or "float16" """
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    size, _ = calculate_maximum_sizes(architecture(name))
    return max(estimate_training_usage(size, dtype).values())


def deepspeed_says(folder, name, devices, stage):
    """Bytes per GPU without offloading, from the functions in DeepSpeed's sources, which need nothing else of it."""
    file, function = {2: ("stage_1_and_2", "estimate_zero2_model_states_mem_needs"),
                      3: ("stage3", "estimate_zero3_model_states_mem_needs")}[stage]  # fmt: skip
    tree = ast.parse((Path(folder) / f"deepspeed/runtime/zero/{file}.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    names = {}
    exec(compile(tree, file, "exec"), names)
    model = architecture(name)
    total = sum(p.numel() for p in model.parameters())
    if stage == 2:
        return names[function](total, devices, 1, cpu_offload=False)[1]
    largest = max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
    return names[function](total, largest, devices, 1, cpu_offload=False, cpu_offload_params=False)[1]


def record(folder):
    """Write RECORD. folder: of DeepSpeed's sources, or "-": its numbers stay as they are."""
    old = json.loads(RECORD.read_text()) if RECORD.exists() else {"rows": [], "versions": {}}
    said = {tuple(row[k] for k in KEYS): row["DeepSpeed"] for row in old["rows"]}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    versions["deepspeed"] = old["versions"].get("deepspeed")
    if folder != "-":
        versions["deepspeed"] = re.search(r"\d+\.\d+\.\d+", (Path(folder) / "version.txt").read_text())[0]
    rows = []
    for step in STEPS:
        name, recipe, batch, length, devices, stage = step
        row = dict(zip(KEYS, step, strict=True))
        row["accelerate"] = accelerate_says(name, "float32" if recipe == "fp32" else "float16") if stage == 0 else None
        row["DeepSpeed"] = said.get(step)
        if folder != "-" and stage:
            row["DeepSpeed"] = deepspeed_says(folder, name, devices, stage)
        row["counted"] = count_step(name, batch, length) if stage == 0 else None
        rows.append(row)
    about = "What estimators of training memory say, in bytes per GPU. Ours is not in here: it is computed."
    state = {"about": about, "command": "python -m utils.memory.compare record DEEPSPEED_SOURCES",
             "date": datetime.date.today().isoformat(), "versions": versions, "rows": rows}  # fmt: skip
    RECORD.parent.mkdir(exist_ok=True)
    RECORD.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


KEYS = ("model", "recipe", "batch", "length", "devices", "stage")


def predicted(row):
    """The Estimate for one row of the record, with eager attention as it was counted."""
    return estimate(
        row["model"], recipe=row["recipe"], batch=row["batch"], length=row["length"], devices=row["devices"],
        stage=row["stage"], attention="eager", device="cpu",
    )  # fmt: skip


def table():
    """The comparison as text, in GB."""
    lines = [f"{'model':<12}{'recipe':<31}{'batch':>6}{'length':>7}{'GPUs':>5}{'ZeRO':>5}"
             f"{'accelerate':>12}{'DeepSpeed':>11}{'states':>9}{'peak':>9}{'counted':>9}"]  # fmt: skip
    for row in json.loads(RECORD.read_text())["rows"]:
        own = predicted(row)
        states = sum(own.states.values()) + own.gradients
        sizes = (row["accelerate"], row["DeepSpeed"], states, own.peak, row["counted"])
        cells = ["-" if size is None else f"{size / 1e9:.2f}" for size in sizes]
        lines.append(
            f"{row['model']:<12}{row['recipe']:<31}{row['batch']:>6}{row['length']:>7}{row['devices']:>5}"
            f"{row['stage']:>5}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (12, 11, 9, 9, 9), strict=True))
        )
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"]:
        record(sys.argv[2])
    print(table())
