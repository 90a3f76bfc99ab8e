"""LoRA+: Efficient Low Rank Adaptation of Large Models (Hayou, Ghosh, Yu 2024, https://arxiv.org/abs/2402.12354).

    A <- A - lr * step(A)        B <- B - ratio * lr * step(B)        ratio about 16

LoRA as it is, B's learning rate apart. A starts random and B at zero, so the two are unlike: for the layer's output to
move by the same amount whatever its width n, steps of A must shrink as 1 / n, and steps of B must not. One learning
rate for both is then too small for B, the more so the wider the model.

Worked example: lr 1e-4 and ratio 16 train A at 1e-4 and B at 1.6e-3. The authors advise an lr about half of LoRA's.

    optimizer = torch.optim.AdamW(lora_plus_groups(adapter, lr=1e-4))
"""

import math

from utils.attach import Adapter
from utils.methods import settings


def lora_plus_group(key, ndim):
    """Which of LoRA+'s groups a trained tensor belongs to, by the authors' rule: what is one-dimensional goes with B.

    key: its name, say "lora_A.weight"   ndim: how many dimensions it has
    returns "A", "B", "embedding", "vectors" (biases, norms) or "magnitude"
    DoRA's magnitudes have a group of their own. Their start is no zero but the length of W's rows, and LoRA+'s argument
    says nothing about them; as mere vectors they would get B's large rate.
    """
    if "lora_embedding" in key:
        return "embedding"
    if "lora_B" in key:
        return "B"
    if "magnitude" in key:
        return "magnitude"
    return "vectors" if ndim == 1 else "A"


def lora_plus_groups(adapter, lr, ratio=16, weight_decay=0.0, embedding_lr=1e-6):
    """An adapter's parameters as groups for any optimizer of torch: what it trains, each with its own rate.

    adapter: of LoRA, DoRA or AdaLoRA   lr: A's, and that of heads trained whole   ratio: B's rate is ratio * lr
    weight_decay: of matrices; vectors (biases, norms, magnitudes) get none
    embedding_lr: of LoRA on embeddings, both matrices
    returns [{"params", "lr", "weight_decay", "name"}, ...], empty groups left out
    raises ValueError for an adapter without B, TypeError for what is none
    """
    if not isinstance(adapter, Adapter):
        raise TypeError(f"the adapter is a {type(adapter).__name__}; lora_plus_groups needs what attach returns")
    settings.positive("lr", lr)
    settings.positive("ratio", ratio)
    settings.positive("embedding_lr", embedding_lr)
    if not settings.is_number(weight_decay) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay!r}; it must be zero or a positive number")
    rates = {"A": lr, "B": ratio * lr, "embedding": embedding_lr, "vectors": ratio * lr, "magnitude": lr}
    found = {name: [] for name in rates}
    for name, parameter in adapter.named_parameters():
        found[lora_plus_group(name, parameter.ndim)].append(parameter)
    if not found["B"] and not found["embedding"]:
        raise ValueError(f"{type(adapter.config).__name__} has no matrix B, whose rate LoRA+ would raise")
    return [
        {"params": found[name], "lr": rate, "name": name}
        | {"weight_decay": 0.0 if name in ("vectors", "magnitude") else weight_decay}
        for name, rate in rates.items()
        if found[name]
    ]
