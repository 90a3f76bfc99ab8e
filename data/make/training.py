"""What both pretrainings share: schedule, optimizer, progress lines, and how a model is stored."""

import json
import math
import platform
import time

import torch
import transformers


def make_optimizer(model, lr, beta2):
    """AdamW without weight decay on vectors (norms and biases)."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=True)


def learning_rate(step, steps, peak, warmup=200):
    """Linear warm-up, then a cosine down to 1 % of the peak."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    return peak * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * cosine)


def train_step(model, optimizer, loss, lr):
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def save(model, tokenizer, folder):
    """Weights rounded to fp16, which halves the files; the stored config says float32, so loading gives fp32.

    -> the model with the rounded weights, in fp32, as every reader will get it
    """
    folder.mkdir(parents=True, exist_ok=True)
    rounded = type(model)(model.config)
    rounded.load_state_dict({name: tensor.half().float() for name, tensor in model.state_dict().items()})
    half = type(model)(model.config).half()
    half.load_state_dict(rounded.state_dict())
    half.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tokenizer.save_pretrained(folder)
    return rounded.eval()


class Progress:
    """Prints a line now and then and keeps it for the record."""

    def __init__(self, label):
        self.label, self.lines, self.start = label, [], time.perf_counter()

    def report(self, step, **values):
        line = {"step": step, **{k: round(v, 4) for k, v in values.items()}, "seconds": round(self.seconds())}
        self.lines.append(line)
        print(self.label, " ".join(f"{k}={v}" for k, v in line.items()), flush=True)

    def seconds(self):
        return time.perf_counter() - self.start


def write_record(folder, record):
    """The measured facts of a run, beside its weights."""
    versions = {"python": platform.python_version()}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({**record, "threads": torch.get_num_threads(), "versions": versions}, indent=1)
    (folder / "training.json").write_text(text + "\n")
