"""Attaching LoRA to every linear layer: a 7B model on the meta device, and a model of 1.2 billion real numbers."""

import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import ratios
from utils import LoRA, attach
from utils.architectures import architecture
from utils.attach import count_parameters

TARGET = 0.5  # ours / PEFT's, at most
ONE_BILLION = {  # the sizes of Llama-3.2-1B
    "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True,
}  # fmt: skip


def measure(repeats):
    """The rows of the table, as dicts."""
    return [row(name, build(), repeats) for name, build in MODELS.items()]


def one_billion():
    """In bfloat16 on the CPU. Its weights are whatever the memory held: nothing here reads them."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**ONE_BILLION)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    return model


MODELS = {"Llama-2-7B, meta device": lambda: architecture("Llama-2-7B"), "1.2B, bfloat16, CPU": one_billion}


def row(name, model, repeats):
    """Both libraries take turns on one model, which each leaves as it found it. Only the attaching is timed."""
    times = {"ours": [], "peft": []}
    numbers = count_parameters(model)[1]
    for turn in range(repeats + 1):
        start = time.thread_time()
        adapter = attach(model, LoRA(r=16, targets="all-linear"))
        ours = time.thread_time() - start
        trained = sum(p.numel() for p in adapter.parameters())
        adapter.detach()
        start = time.thread_time()
        theirs = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        peft = time.thread_time() - start
        assert theirs.get_nb_trainable_parameters()[0] == trained
        theirs.unload()
        if turn > 0:
            times["ours"].append(ours)
            times["peft"].append(peft)
    found = {"about": {"model": name, "numbers": numbers, "trained": trained}, "turns": repeats, "time_target": TARGET}
    return found | ratios(times, "peft")


def table(rows):
    """The rows as text."""
    lines = [
        "Attaching LoRA r=16 to all linear layers: least CPU ms, median ratio",
        f"{'model':<26}{'numbers':>16}{'trained':>14}{'ours':>9}{'peft':>9}{'ours/peft':>11}{'median':>8}{'target':>8}",
    ]
    for found in rows:
        about, ms = found["about"], found["least_ms"]
        lines.append(
            f"{about['model']:<26}{about['numbers']:>16,}{about['trained']:>14,}{ms['ours']:>9.2f}{ms['peft']:>9.2f}"
            f"{found['least_ratio']:>11.3f}{found['median_ratio']:>8.3f}{found['time_target']:>8}"
        )
    return "\n".join(lines)
