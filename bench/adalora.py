"""AdaLoRA against PEFT's on a whole tiny Llama: CPU time of a training step, and bytes kept for the backward pass.

A step is all of it: forward with the regulariser, backward, AdamW, and the allocator, which PEFT must be told to call.

Regulariser and allocator cost us some 10 ms and PEFT some 20, and that is all there is to win without dropout: the
frozen model alone takes about 0.8 of PEFT's time, and the products with A and B, which both have to form, most of the
rest. So it is with the bytes: A's gradient needs the layer's input, which both keep. With dropout PEFT keeps a dropped
copy of it for every layer and a mask of floats, and we a mask of bytes.
"""

import torch
from peft import AdaLoraConfig

from bench import common
from utils import AdaLoRA

TITLE = "AdaLoRA r=16, a training step"
TARGETS = {0.0: (0.85, 0.80), 0.05: (0.85, 0.80)}  # dropout: targets of time and of saved bytes
STEPS = 1000  # announced, far more than are measured: each of these prunes


def measure(repeats):
    """The rows of the table, as dicts."""
    return [row(dropout, repeats, *targets) for dropout, targets in TARGETS.items()]


def row(dropout, repeats, time_target, saved_target):
    models = common.pair(common.tiny_llama(), *configs(dropout))
    ids = torch.randint(1024, (4, 128))
    common.same(models, lambda model: model(ids).logits)
    optimizers = {models[n]: torch.optim.AdamW(common.trained(models[n]), lr=1e-4) for n in ("ours", "peft")}
    counts = dict.fromkeys(optimizers, 0)

    def loss(model):
        return model(ids, labels=ids).loss

    def step(model):
        loss(model).backward()
        if model in optimizers:
            optimizers[model].step()
            counts[model] += 1
            if model is models["peft"]:
                model.base_model.update_and_allocate(counts[model])
            optimizers[model].zero_grad()

    about = {"what": "tiny Llama", "tokens": ids.numel(), "dropout": dropout}
    return common.compare(about, models, loss, step, repeats, [], time_target, saved_target)


def configs(dropout):
    """Ours and PEFT's."""
    budget = {"init_r": 16, "target_r": 8}
    return (
        AdaLoRA(STEPS, alpha=32, targets="all-linear", dropout=dropout, init="random_e", **budget),
        AdaLoraConfig(
            total_step=STEPS, lora_alpha=32, target_modules="all-linear", lora_dropout=dropout, **budget
        ),
    )  # fmt: skip
