"""What utils.training keeps: the state of a run in one file, and other people's state as it was found."""

import os
import pickle
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from utils.methods.parts import Part

MARKS = ("_is_accelerate_prepared", "_original_forward", "forward")


@contextmanager
def borrowed(model):
    """Accelerate keeps its settings process-wide and leaves marks on a model, which would make the next call silently
    keep this one's precision. Start clean, and put everything back, train and eval modes too."""
    states = [(state, dict(state)) for state in (AcceleratorState._shared_state, GradientState._shared_state)]
    modes = [(module, module.training) for module in model.modules()]
    marks = {name: model.__dict__[name] for name in MARKS if name in model.__dict__}
    for state, _ in states:
        state.clear()
    for name in MARKS[:2]:
        model.__dict__.pop(name, None)
    try:
        yield
    finally:
        for name in MARKS:
            model.__dict__.pop(name, None)
        model.__dict__.update(marks)
        model.zero_grad()
        for module, mode in modes:
            module.training = mode
        for state, before in states:
            state.clear()
            state.update(before)


def writable(save_to, resume):
    """save_to as a Path that can be written, and read if resuming; None stays None."""
    if resume and (save_to is None or not Path(save_to).is_file()):
        raise FileNotFoundError(f"resume=True, but there is no checkpoint at {save_to}: start with resume=False.")
    if save_to is None:
        return None
    path = Path(save_to).absolute()
    probe = path.with_name(path.name + ".tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError("that is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"Cannot write a checkpoint to {path}: {error.strerror or error}.") from error
    return path


def counting_parts(model):
    """{path: part} of the parts of adapters that count or average while they are trained (AdaLoRA's allocator)."""
    return {path: part for path, part in model.named_modules() if isinstance(part, Part) and part.progress()}


def save_state(path, run, model, flat, optim, scaler, history):
    """Write what continues a run: the trained parameters, what adapters count beside them, the optimizer, the fp16
    scaler and the history (a dict)."""
    state = {"run": run, "params": [p.detach() for p in flat], "optimizer": optim.state_dict(),
             "progress": {spot: part.progress() for spot, part in counting_parts(model).items()},
             "scaler": scaler.state_dict() if scaler else {}, "history": history}
    draft = path.with_name(path.name + ".tmp")
    torch.save(state, draft)
    os.replace(draft, path)  # a reader finds the old file or the new one, never half of one


def load_state(path, run, model, flat, optim, scaler):
    """Put a checkpoint's state back, after checking that it belongs to this run; returns its history."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, params, history = state["run"], state["params"], state["history"]
    except (RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is not a checkpoint of this loop, or it is damaged.") from error
    differs = [f"{key} was {saved.get(key)}, is {run[key]}" for key in run if saved.get(key) != run[key]]
    if [p.shape for p in params] != [p.shape for p in flat]:
        differs.append(f"it trained {len(params)} tensors that do not match the {len(flat)} here in number or shape")
    parts, progress = counting_parts(model), state.get("progress", {})
    if parts.keys() != progress.keys():
        differs.append("it has the progress of another adapter")
    if differs:
        raise ValueError(f"{path} belongs to another run: {'; '.join(differs)}.")
    optim.load_state_dict(state["optimizer"])
    if scaler:
        scaler.load_state_dict(state["scaler"])
    with torch.no_grad():
        for here, there in zip(flat, params, strict=True):
            here.copy_(there)
    for spot, part in parts.items():
        part.resume(progress[spot])
    return history
