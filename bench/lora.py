"""Our LoRA layer against peft's: CPU time of forward + backward, and bytes kept for the backward pass.

Each case holds the frozen layer alone, ours and peft's, with equal weights (checked), measured in turns. A turn is what
a training step does: clear the gradients, forward, backward. Large temporaries cost twice here, to fill and to get from
the system (page faults), and the second share varies from turn to turn; so the table gives the median beside the least.
"""

import copy
import statistics

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from utils import LoRA, attach
from utils.measure import cpu_times, saved_bytes

VERSIONS = ("torch", "peft", "transformers")
R, WIDTH = 16, 2048
TIME_TARGETS = {("layer", 2048, 0.0): 0.97, ("layer", 2048, 0.1): 0.95}  # ours / peft, at most


class Layer(nn.Module):
    """One projection, so that both libraries can find it by name."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return self.proj(x)


def measure(repeats):
    """The rows of the table, as dicts."""
    rows = [_layer(tokens, dropout, repeats) for tokens in (2048, 64) for dropout in (0.0, 0.1)]
    return rows + [_llama(dropout, repeats) for dropout in (0.0, 0.1)]


def _layer(tokens, dropout, repeats):
    torch.manual_seed(0)
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    grad = torch.randn(tokens, WIDTH)
    models = _three(Layer().requires_grad_(False), ("proj",), dropout)
    _same(models, lambda model: model(x))
    runs, saved = {}, {}
    for name, model in models.items():
        runs[name] = lambda model=model: _step(model, lambda: model(x).backward(grad), x)
        saved[name] = saved_bytes(lambda model=model: model(x), exclude=[model, x])
    # short calls need more turns until one of them is undisturbed
    return _row("layer", tokens, dropout, cpu_times(runs, repeats * 2048 // tokens), saved, x.numel())


def _llama(dropout, repeats):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, hidden_size=512, intermediate_size=1376, num_hidden_layers=4,
                         num_attention_heads=8, num_key_value_heads=8, use_cache=False)
    base = LlamaForCausalLM(config).requires_grad_(False)
    base.enable_input_require_grads()
    ids = torch.randint(1024, (4, 128))
    models = _three(base, "all-linear", dropout)
    _same(models, lambda model: model(ids).logits)
    runs, saved = {}, {}
    for name, model in models.items():
        runs[name] = lambda model=model: _step(model, lambda: model(ids, labels=ids).loss.backward())
        saved[name] = saved_bytes(lambda model=model: model(ids, labels=ids).loss, exclude=[model])
    return _row("tiny Llama", ids.numel(), dropout, cpu_times(runs, repeats), saved, None)


def _step(model, forward_backward, x=None):
    model.zero_grad()
    if x is not None:
        x.grad = None
    forward_backward()


def _three(base, targets, dropout):
    """{frozen, ours, peft}: the base alone, and both adapters on copies of it, in training mode, with equal weights."""
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    attach(ours, LoRA(r=R, alpha=2 * R, targets=targets, dropout=dropout, init="random_b"))
    targets = targets if isinstance(targets, str) else list(targets)
    theirs = get_peft_model(theirs, LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, target_modules=targets))
    pairs = zip(_trained(ours), _trained(theirs), strict=True)
    with torch.no_grad():
        for mine, other in pairs:
            other.copy_(mine)
    return {"frozen": base.train(), "ours": ours.train(), "peft": theirs.train()}


def _trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def _same(models, forward):
    """Stop if the two do not compute the same thing: their times would say nothing."""
    for model in models.values():
        model.eval()
    with torch.no_grad():
        torch.testing.assert_close(forward(models["ours"]), forward(models["peft"]), rtol=1e-4, atol=1e-4)
    for model in models.values():
        model.train()


def _row(what, tokens, dropout, times, saved, x_numbers):
    row = {"what": what, "tokens": tokens, "dropout": dropout, "r": R, "turns": len(times["ours"])}
    for name, pick in (("least", min), ("median", statistics.median)):
        ms = {model: round(1000 * pick(seconds), 3) for model, seconds in times.items()}
        row |= {f"{name}_ms": ms, f"{name}_ratio": round(ms["ours"] / ms["peft"], 4)}
    row |= {"target": TIME_TARGETS.get((what, tokens, dropout)), "saved_bytes": saved}
    return row | {"ours_saved_per_number_of_x": saved["ours"] / x_numbers if x_numbers else None}


def table(rows):
    """The rows as text. Saved megabytes are those beyond the parameters (and beyond x, for a layer)."""
    lines = [f"{'LoRA r=16, forward + backward':<34}{'least ms':<22}{'ours / peft':<24}{'saved MB':<20}",
             f"{'':12}{'tokens':>7}{'dropout':>8}{'frozen':>9}{'ours':>9}{'peft':>9}{'least':>9}{'median':>8}"
             f"{'target':>8}{'frozen':>9}{'ours':>8}{'peft':>8}"]
    for row in rows:
        ms, saved = row["least_ms"], row["saved_bytes"]
        lines.append(
            f"{row['what']:<12}{row['tokens']:>7}{row['dropout']:>8}"
            + "".join(f"{ms[model]:>9.2f}" for model in ("frozen", "ours", "peft"))
            + f"{row['least_ratio']:>9.3f}{row['median_ratio']:>8.3f}{row['target'] or '':>8}"
            + f"{saved['frozen'] / 1e6:>9.2f}{saved['ours'] / 1e6:>8.2f}{saved['peft'] / 1e6:>8.2f}"
        )
    return "\n".join(lines)
