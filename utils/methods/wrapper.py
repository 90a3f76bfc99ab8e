"""What every method puts in a model's place of a module: a wrapper that can be switched off.

A wrapper holds the module it replaced as `base`. Adapters stack: the base of one wrapper may be another one.
Inactive, or merged into the base, a wrapper is the base and nothing else.
"""

from copy import deepcopy

from torch import nn


class Wrapper(nn.Module):
    """A module around `base`. Subclasses say what they add in `adapted_forward` and name their tensors in `tensors`."""

    mergeable = False

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.active = True
        self.merged = False
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

    def tensors(self) -> dict:
        """The trained tensors by the name they have in an adapter file, without the module's path."""
        raise NotImplementedError

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


class TrainedCopy(Wrapper):
    """A module trained whole (`modules_to_save`: a classification head): the copy learns, the base stays as it was."""

    def __init__(self, base: nn.Module):
        super().__init__(base)
        self.copy = deepcopy(self.core).requires_grad_(True)

    def adapted_forward(self, *args, **kwargs):
        return self.copy(*args, **kwargs)

    def tensors(self) -> dict:
        return dict(self.copy.named_parameters())
