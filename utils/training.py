"""One training loop, plain enough to read aloud, on accelerate.

The same call runs on a CPU, on one GPU, and in every process of `accelerate launch --num_processes 2 script.py`.
What a step sees depends only on the seed and the step's number, so a run that was interrupted continues to the very
losses it would have had.
"""

import math
import os
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, send_to_device

from utils.optimizers import AdamW8bit, paged_adamw, paged_adamw8bit
from utils.training_state import borrowed, load_state, save_state, writable

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "adamw8bit": AdamW8bit,
    "paged_adamw": paged_adamw,
    "paged_adamw8bit": paged_adamw8bit,
    "sgd": torch.optim.SGD,
}
SCHEDULES = {  # share of the peak lr; done runs from 0 (end of the warmup) to 1
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}


@dataclass(repr=False)
class History:
    """loss and lr of every step; seconds and tokens in all. The repr leaves the time out, which differs by machine."""

    loss: list = field(default_factory=list)
    lr: list = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    @property
    def steps(self):
        return len(self.loss)

    def __repr__(self):
        losses = f", loss {self.loss[0]:.2f} -> {self.loss[-1]:.2f}" if self.loss else ""
        return f"History({self.steps} steps{losses})"


def train(model, rows, collate, *, params=None, steps, batch_size=16, lr, optimizer="adamw", weight_decay=0.0,
          warmup=10, schedule="linear", clip=1.0, accumulate=1, seed=0, precision="no", log_every=50, save_to=None,
          resume=False, quiet=False):
    """Train `params` of `model` on `rows` for `steps` optimizer steps; returns the History.

    collate(list of rows) -> dict of tensors, labels among them; model(**batch) must have a .loss.
    params: parameters, or optimizer groups (dicts, each may have its own lr). None: all that require a gradient.
    optimizer: a name in OPTIMIZERS, or anything to be called as optimizer(params, lr=..., weight_decay=...).
    schedule: "linear", "cosine" or "constant", after `warmup` rising steps. clip: the gradient's largest norm, or None.
    batch_size is per process. `accumulate` batches make one step; their losses are averaged batch by batch, not
    weighted by their tokens. precision: "no", "bf16" or "fp16" (utils.hardware says which).
    save_to: a file that gets the state at every log line and at the end; resume=True continues from it. It holds what
    is trained, not the frozen rest. Only torch may draw random numbers, or resuming is not exact.
    Several processes keep the parameters inside the model equal, and no others.

    Raises ValueError, OSError for a request that cannot be met, before anything changed; FloatingPointError for a loss
    or gradient that is not finite, with the last good step left in the model. Modes (train, eval) are put back.
    """
    params, flat = _parameters(model, params)
    build = OPTIMIZERS.get(optimizer, optimizer) if isinstance(optimizer, str) else optimizer
    sizes = {"steps": steps, "batch_size": batch_size, "accumulate": accumulate, "log_every": log_every}
    _check(rows, flat, build, sizes, schedule, precision)
    path = writable(save_to, resume)

    with borrowed(model):
        # what does not train is equal everywhere from the start: the scales of a 4-bit base need not travel every step
        still = DistributedDataParallelKwargs(broadcast_buffers=False)
        # told that there is no GPU, accelerate joins CPU processes; left to find out, it would train each one alone
        cpu = not torch.accelerator.is_available()
        accelerator = Accelerator(mixed_precision=precision, cpu=cpu, kwargs_handlers=[still])
        _check_machine(accelerator, precision)
        wrapped = accelerator.prepare(model)  # first, as it moves the parameters to where the optimizer will see them
        optim = accelerator.prepare(build(params, lr=lr, weight_decay=weight_decay))
        rank, world = accelerator.process_index, accelerator.num_processes
        peaks = [group["lr"] for group in optim.param_groups]
        run = {"rows": len(rows), "batch_size": batch_size, "accumulate": accumulate, "seed": seed, "processes": world,
               "optimizer": type(optim.optimizer).__name__}
        history = History(**load_state(path, run, model, flat, optim, accelerator.scaler)) if resume else History()
        logged, started = history.steps, time.perf_counter() - history.seconds
        model.train()

        for step in range(history.steps, steps):
            torch.manual_seed(hash((seed, step, rank)))  # dropout
            for group, peak in zip(optim.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_factor(step, steps, warmup, schedule)

            total = torch.zeros(2, device=accelerator.device)  # loss, tokens
            with _memory_advice(step, batch_size, accumulate):
                for part in range(accumulate):
                    # processes take turns along one row order: together they see what one larger batch would hold
                    first = ((step * accumulate + part) * world + rank) * batch_size
                    batch = collate([rows[i] for i in row_order(first, batch_size, len(rows), seed)])
                    batch = send_to_device(batch, accelerator.device)
                    # processes average their gradients once per step, in its last part
                    with accelerator.no_sync(wrapped) if part + 1 < accumulate else nullcontext():
                        loss = _loss(wrapped(**batch)) / accumulate
                        accelerator.backward(loss)
                    total += torch.tensor([loss.item(), _tokens(batch)], device=total.device)
                loss, tokens = accelerator.reduce(total, "mean").tolist()
                norm = float(accelerator.clip_grad_norm_(flat, clip or math.inf))
                _check_finite(loss, norm, step, lr, precision)
                optim.step()
            optim.zero_grad()

            history.loss.append(loss)
            history.lr.append(optim.param_groups[0]["lr"])
            history.tokens += round(tokens * world)
            history.seconds = time.perf_counter() - started
            if history.steps % log_every == 0 or history.steps == steps:
                if accelerator.is_main_process:
                    if path:
                        save_state(path, run, model, flat, optim, accelerator.scaler, vars(history))
                    if not quiet:
                        print(_line(history, steps, logged), flush=True)
                logged = history.steps
        accelerator.wait_for_everyone()
    return history


def lr_factor(step, steps, warmup, schedule):
    """Share of the peak learning rate at a step (from 0): up in `warmup` equal stairs, then down by the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / (steps - warmup))


def row_order(first, count, n, seed):
    """Row numbers first ... first + count - 1 of an endless stream that shuffles the n rows anew each time round."""
    return [_epoch(n, seed, i // n)[i % n] for i in range(first, first + count)]


@lru_cache(maxsize=2)
def _epoch(n, seed, number):
    return torch.randperm(n, generator=torch.Generator().manual_seed(hash((seed, number)))).tolist()


@contextmanager
def _memory_advice(step, batch_size, accumulate):
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"batch_size={batch_size // 2} with accumulate={accumulate * 2}" if batch_size > 1 else "shorter rows"
        raise torch.OutOfMemoryError(
            f"Out of memory at step {step + 1} with batch_size={batch_size}: try {smaller}, then gradient "
            "checkpointing, then a 4-bit or smaller base."
        ) from error


def _parameters(model, params):
    """(what the optimizer gets, the same as a flat list of parameters)"""
    params = [p for p in model.parameters() if p.requires_grad] if params is None else list(params)
    params = [{**p, "params": list(p["params"])} if isinstance(p, dict) else p for p in params]
    return params, [p for item in params for p in (item["params"] if isinstance(item, dict) else [item])]


def _check(rows, flat, build, sizes, schedule, precision):
    if len(rows) == 0:
        raise ValueError("There are no rows to train on.")
    if not flat:
        raise ValueError("There is nothing to train: no parameter requires a gradient. Attach an adapter first.")
    if not all(p.requires_grad for p in flat):
        raise ValueError("Some of the parameters given do not require a gradient: they would never move.")
    for name, number in sizes.items():
        if number < 1:
            raise ValueError(f"{name} must be 1 or more, not {number}.")
    if not callable(build):
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, or callable, not {build!r}.")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, not {schedule!r}.")
    if precision == "fp16" and any(p.dtype == torch.float16 for p in flat):
        raise ValueError("precision 'fp16' needs trained weights in float32: small updates vanish in float16.")


def _check_machine(accelerator, precision):
    if precision == "fp16" and accelerator.device.type == "cpu":  # accelerate would train in float32, without a word
        raise ValueError("precision 'fp16' needs a GPU: on a CPU use 'no' or 'bf16'.")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world != accelerator.num_processes:
        raise RuntimeError(f"{world} processes were started, but this one works with {accelerator.num_processes}.")


def _check_finite(loss, norm, step, lr, precision):
    # Under fp16 the GradScaler tries scales that overflow, and skips those steps itself.
    if not math.isfinite(loss) or (precision != "fp16" and not math.isfinite(norm)):
        raise FloatingPointError(
            f"At step {step + 1} the loss is {loss:g} and the gradient's norm {norm:g}: try a smaller lr (now {lr:g}), "
            "more warmup, or another precision. This step was neither taken nor saved."
        )


def _loss(output):
    if getattr(output, "loss", None) is None:
        raise ValueError("The model returned no loss: collate must give labels.")
    return output.loss


def _tokens(batch):
    """Tokens of a batch without its padding; rows, when it has no tokens."""
    if "attention_mask" in batch:
        return batch["attention_mask"].sum().item()
    return batch["input_ids"].numel() if "input_ids" in batch else len(next(iter(batch.values())))


def _line(history, steps, logged):
    recent, pace = history.loss[logged:], history.seconds / history.steps
    return (f"step {history.steps}/{steps}  loss {sum(recent) / len(recent):.4f}  lr {history.lr[-1]:.1e}  "
            f"{history.tokens / history.seconds:,.0f} tokens/s  {(steps - history.steps) * pace:.0f} s left")
