"""What the benchmarks share: the models they run on, equal pairs of ours and PEFT's, one row, and the table.

A row compares the frozen model alone, ours and PEFT's, which take turns. Large temporaries cost twice on a CPU, to fill
and to get from the system (page faults), and the second share varies; so a row has the median beside the least.
"""

import copy
import statistics
from functools import partial

import torch
from peft import get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from utils import attach
from utils.measure import cpu_times, saved_bytes

VERSIONS = ("torch", "peft", "transformers", "bitsandbytes")
WIDTH = 2048


class Layer(nn.Module):
    """One projection, so that both libraries can find it by name."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.proj(x)


def tiny_llama():
    """A frozen Llama of four layers, width 512; its embedding's output needs a gradient, as below an adapted layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    model.enable_input_require_grads()
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def pair(base, ours, theirs):
    """{frozen, ours, peft}: the base, and copies of it with our configuration and PEFT's, equal, in training mode.

    Their trained tensors must come in the same order. PEFT's take over our values.
    """
    mine, other = copy.deepcopy(base), copy.deepcopy(base)
    attach(mine, ours)
    other = get_peft_model(other, theirs)
    with torch.no_grad():
        for a, b in zip(trained(mine), trained(other), strict=True):
            b.copy_(a)
    return {"frozen": base.train(), "ours": mine.train(), "peft": other.train()}


def same(models, output):
    """Stop if ours and PEFT's do not compute the same thing: their times would say nothing. output: model -> tensor"""
    for model in models.values():
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(output(models["ours"]), output(models["peft"]), rtol=1e-4, atol=1e-4)
    for model in models.values():
        model.train()


def compare(about, models, forward, step, repeats, inputs=(), time_target=None, saved_target=None):
    """One row of a table.

    about: what is measured, as a dict; the table prints its values   models: {"frozen", "ours", "peft": model}
    forward: model -> output, whose saved tensors are counted, beyond the model's own and `inputs`
    step: called with a model, it does what is timed   repeats: how often
    time_target, saved_target: ours / peft, at most, or None
    """
    times = cpu_times({name: partial(step, model) for name, model in models.items()}, repeats)
    saved = {n: saved_bytes(partial(forward, model), exclude=[model, *inputs]) for n, model in models.items()}
    row = {"about": about, "turns": repeats} | ratios(times, "peft")
    row |= {"time_target": time_target, "saved_bytes": saved}
    return row | {"saved_ratio": round(saved["ours"] / max(saved["peft"], 1), 4), "saved_target": saved_target}


def ratios(times, peer):
    """{"least_ms", "least_ratio", "median_ms", "median_ratio"}. times: {"ours", peer: seconds of every turn}"""
    found = {}
    for name, pick in (("least", min), ("median", statistics.median)):
        ms = {library: round(1000 * pick(seconds), 3) for library, seconds in times.items()}
        found |= {f"{name}_ms": ms, f"{name}_ratio": round(ms["ours"] / ms[peer], 4)}
    return found


def layer(ours, theirs, tokens, repeats, time_target=None, saved_target=None):
    """The row of one linear layer of WIDTH: forward and backward of `tokens` rows. ours, theirs: configurations"""
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    grad = torch.randn(tokens, WIDTH)
    models = pair(Layer().requires_grad_(False), ours, theirs)
    same(models, lambda model: model(x))

    def step(model):
        model.zero_grad()
        x.grad = None
        model(x).backward(grad)

    about = {"what": "layer", "tokens": tokens, "dropout": ours.dropout}
    turns = repeats * 2048 // tokens  # short calls need more turns until one of them is undisturbed
    return compare(about, models, lambda model: model(x), step, turns, [x], time_target, saved_target)


def llama(ours, theirs, repeats, time_target=None, saved_target=None):
    """The row of a whole tiny Llama: forward and backward of 4 sequences of 128 tokens."""
    models = pair(tiny_llama(), ours, theirs)
    ids = torch.randint(1024, (4, 128))
    same(models, lambda model: model(ids).logits)

    def loss(model):
        return model(ids, labels=ids).loss

    def step(model):
        model.zero_grad()
        loss(model).backward()

    about = {"what": "tiny Llama", "tokens": ids.numel(), "dropout": ours.dropout}
    return compare(about, models, loss, step, repeats, [], time_target, saved_target)


def table(title, rows):
    """The rows as text. Saved megabytes are those beyond the parameters and, for a layer, beyond its input."""
    names = list(rows[0]["about"])
    lines = [
        f"{title}: least CPU ms, median ratio, MB saved for the backward pass",
        "".join(f"{name:<12}" for name in names)
        + f"{'frozen':>9}{'ours':>9}{'peft':>9}{'ours/peft':>11}{'median':>8}{'target':>8}"
        + f"{'frozen':>9}{'ours':>9}{'peft':>9}{'ours/peft':>11}{'target':>8}",
    ]
    for row in rows:
        ms, saved = row["least_ms"], row["saved_bytes"]
        lines.append(
            "".join(f"{row['about'][name]!s:<12}" for name in names)
            + "".join(f"{ms[model]:>9.2f}" for model in ("frozen", "ours", "peft"))
            + f"{row['least_ratio']:>11.3f}{row['median_ratio']:>8.3f}{row['time_target'] or '':>8}"
            + "".join(f"{saved[model] / 1e6:>9.2f}" for model in ("frozen", "ours", "peft"))
            + f"{row['saved_ratio']:>11.3f}{row['saved_target'] or '':>8}"
        )
    return "\n".join(lines)
