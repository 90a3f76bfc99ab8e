"""LoRA against PEFT's: CPU time of forward + backward, and bytes kept for the backward pass.

Without dropout, on the whole Llama, both are near their bound: the frozen model is 88 % of the time, and the rest is
narrow products. Ours makes seven a layer where PEFT makes six: x A^T is formed again, a hundredth of the time, because
keeping it would keep as many bytes as PEFT. Runs on a busy machine scatter around the target on both sides.
"""

from peft import LoraConfig

from bench import common
from utils import LoRA

TITLE = "LoRA r=16, forward + backward"
LAYERS = {(2048, 0.0): 0.97, (2048, 0.1): 0.95, (64, 0.0): None, (64, 0.1): None}  # (tokens, dropout): time target
LLAMAS = {0.0: (0.97, 0.99), 0.05: (0.92, 0.70)}  # dropout: targets of time and of saved bytes


def measure(repeats):
    """The rows of the table, as dicts."""
    rows = [
        common.layer(*configs(["proj"], dropout), tokens, repeats, time_target=target)
        for (tokens, dropout), target in LAYERS.items()
    ]
    return rows + [common.llama(*configs("all-linear", p), repeats, *targets) for p, targets in LLAMAS.items()]


def configs(targets, dropout):
    """Ours and PEFT's."""
    return (
        LoRA(r=16, alpha=32, targets=targets, dropout=dropout, init="random_b"),
        LoraConfig(r=16, lora_alpha=32, target_modules=targets, lora_dropout=dropout),
    )
