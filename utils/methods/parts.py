"""What an adapter puts into a model: wrappers, which take a module's place, and guests, which live in one.

    Wrapper   stands where a module stood and calls it: the methods that change one weight (LoRA, DoRA, AdaLoRA, (IA)3)
    Guest     is added to a module, its host, and changes what goes in or comes out of it through hooks: the methods
              that add something between weights (adapters, prompts, prefixes)

Switched off, or merged into the base, either of them does nothing at all, so that the model is the base to the bit.
Parts stack: the base of one wrapper may be another one, and a module may have several guests.
"""

from copy import deepcopy

import torch
from torch import nn

from utils.hardware import tensor_bytes


class Part(nn.Module):
    """One piece of an adapter, at one path of a model."""

    mergeable = False
    why_not = "is no change of a weight"  # the reason, where mergeable is False

    def __init__(self):
        super().__init__()
        self.active = True
        self.merged = False

    @property
    def on(self):
        """Whether it takes part in the computation."""
        return self.active and not self.merged

    def enter(self, model, path):
        """Put this part into the model."""
        raise NotImplementedError

    def leave(self, model, path):
        """Take it out again."""
        raise NotImplementedError

    def tensors(self) -> dict:
        """The trained tensors by name, without the module's path."""
        raise NotImplementedError

    nameless = False  # True: its tensors carry no path in an adapter file (PEFT's prompt_embeddings)

    def exported(self) -> dict:
        """The tensors of an adapter file by name. Where they are not what is trained, `training_state` holds that."""
        return self.tensors()

    def training_state(self) -> dict:
        """What only further training needs, by name: kept in a file of its own."""
        return {}

    def load(self, tensors, state, trainable):
        """Take over tensors from files, names and shapes checked before, under no_grad.

        tensors: as `exported` names them   state: as `training_state` names them, or None if that file is missing
        trainable: whether training is to go on   raises ValueError if it cannot
        """
        for name, own in self.tensors().items():
            own.copy_(tensors[name])

    def progress(self) -> dict:
        """What training counts and averages beside the trained tensors, by name: a run that goes on needs it."""
        return {}

    def resume(self, progress):
        """Take over what `progress` gave in the interrupted run."""

    def facts(self) -> str:
        """What the report says about it, in one line, without counts."""
        return type(self).__name__


class Wrapper(Part):
    """A module around `base`. Subclasses say what they add in `adapted_forward` and name their tensors in `tensors`."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.training = base.training  # not self.train(...), which would reach into the base

    def __getattr__(self, name):
        # Models look at attributes of their layers (T5 reads wo.weight.dtype): what a wrapper lacks, the layer answers.
        # Not a wrapper in between: the A and B of another adapter are not this one's.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "core"):
                raise
            return getattr(self.core, name)

    def forward(self, *args, **kwargs):
        if not self.active or self.merged:
            return self.base(*args, **kwargs)
        return self.adapted_forward(*args, **kwargs)

    def adapted_forward(self, *args, **kwargs):
        raise NotImplementedError

    def merged_tensors(self) -> dict:
        """New values of the core's parameters with the update in them, by name: {"weight": ..., "bias": ...}."""
        raise NotImplementedError

    def enter(self, model, path):
        model.set_submodule(path, self)

    def leave(self, model, path):
        above = model.get_submodule(path)
        if above is self:
            model.set_submodule(path, self.base)
            return
        while above.base is not self:
            above = above.base
        above.base = self.base

    @property
    def core(self) -> nn.Module:
        """The model's own module, below every wrapper."""
        core = self.base
        while isinstance(core, Wrapper):
            core = core.base
        return core

    @property
    def inner(self) -> nn.Module:
        """What this wrapper really calls: the first thing below it that is not a switched-off wrapper."""
        inner = self.base
        while isinstance(inner, Wrapper) and (not inner.active or inner.merged):
            inner = inner.base
        return inner


class Guest(Part):
    """A part inside its host module. Subclasses write `before`, `after` or both, which are called while it is on."""

    def enter(self, model, path):
        host = core_of(model.get_submodule(path))
        number = 0
        while hasattr(host, f"guest{number}"):
            number += 1
        host.add_module(f"guest{number}", self)
        self.train(host.training)
        if type(self).before is not Guest.before:
            host.register_forward_pre_hook(self._before, with_kwargs=True)
        if type(self).after is not Guest.after:
            host.register_forward_hook(self._after, with_kwargs=True)

    def leave(self, model, path):
        host = core_of(model.get_submodule(path))
        drop_hooks(host, self)
        del host._modules[next(name for name, child in host.named_children() if child is self)]

    def before(self, host, args, kwargs):
        """Change the host's inputs. args: tuple   kwargs: dict   returns both"""
        return args, kwargs

    def after(self, host, args, kwargs, output):
        """Change the host's output, and return it. args, kwargs: the inputs as the host got them."""
        return output

    def _before(self, host, args, kwargs):
        return self.before(host, args, kwargs) if self.on else None

    def _after(self, host, args, kwargs, output):
        return self.after(host, args, kwargs, output) if self.on else None


class TrainedCopy(Wrapper):
    """A module trained whole (`modules_to_save`: a classification head): the copy learns, the base stays as it was."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.copy = deepcopy(self.core).requires_grad_(True)

    def adapted_forward(self, *args, **kwargs):
        return self.copy(*args, **kwargs)

    def tensors(self) -> dict:
        return dict(self.copy.named_parameters())

    def facts(self):
        return f"{type(self.copy).__name__}, trained whole"


def drop_hooks(module, owner):
    """Take out of a module every hook that is a method of `owner`."""
    for hooks, with_kwargs in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key in [k for k, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key], with_kwargs[key]


def core_of(module):
    """The model's own module: what a wrapper wraps, or the module itself."""
    return module.core if isinstance(module, Wrapper) else module


def adapter_dtype(module):
    """The base's dtype, but float32 over half-precision and quantized weights: their steps are too coarse.

    module: a layer with a weight, or any module with floating-point parameters
    """
    weight = getattr(module, "weight", None)
    if weight is None:
        weight = next((p for p in module.parameters() if p.is_floating_point()), None)
    dtype = getattr(weight, "dtype", None)
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def size_of(tensors):
    """(numbers, bytes) of some tensors."""
    tensors = list(tensors)
    return sum(t.numel() for t in tensors), sum(tensor_bytes(t.shape, t.dtype) for t in tensors)
