"""Bottleneck adapters: what Houlsby's, Pfeiffer's and the parallel adapter share. They differ in where it is put.

    change(h) = W_up f(W_down h + b_down) + b_up

    W_down (m, d), b_down (m,)   from the model's width d down to the bottleneck's m = d / reduction
    f                            relu, gelu or swish
    W_up (d, m), b_up (d,)       back up; W_up starts at zero, so that the first forward pass is the base model's
    2 d m + d + m                numbers trained per adapter

The non-linearity makes it more than a change of weights: no adapter can be merged, and each costs time at inference.

W_up = 0 is He et al.'s start (2021). Houlsby et al. draw both matrices from a narrow normal distribution ("houlsby"),
AdapterHub from N(0, 0.02) ("bert"). With a standard deviation s of both, a relu adapter changes h by about
sqrt(m d / 2) s^2 of its length: for s = 0.02 that is 5 % at d = 768, m = 48, but 29 % at d = 4096, m = 256, in each
of the adapters one after the other. Near the identity in BERT is not near the identity in Llama.

Worked example: BERT-base has d = 768. With reduction 16, m = 48: 2 x 768 x 48 + 768 + 48 = 74,544 numbers.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils.methods import settings
from utils.methods.families import family_of
from utils.methods.parts import Guest, adapter_dtype, core_of, drop_hooks
from utils.targeting import inside, layer_number, whole_modules

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "swish": F.silu,
    "tanh": torch.tanh,
}
INITS = ("zero_up", "houlsby", "bert")

# ---------------------------------------------------------------------------------------------- the equations


def bottleneck(h, W_down, b_down, W_up, b_up, activation=F.relu):
    """What an adapter adds: W_up f(W_down h + b_down) + b_up.

    h: (..., d)   W_down: (m, d)   b_down: (m,)   W_up: (d, m)   b_up: (d,)   activation: f, on (..., m)
    returns (..., d)
    """
    narrow = activation(F.linear(h, W_down, b_down))  # (..., m); linear: h W_down^T + b_down in one step
    return F.linear(narrow, W_up, b_up)


def adapter_num_params(d, m):
    """How many numbers one adapter trains: 2 d m + d + m, an int. d: width of the model   m: of the bottleneck"""
    return 2 * d * m + d + m


def bottleneck_size(d, reduction):
    """The bottleneck's width for a reduction factor: d / reduction, rounded down.

    raises ValueError when nothing is left
    """
    m = int(d // reduction)
    if m < 1:
        raise ValueError(f"reduction={reduction:g} leaves nothing of a width of {d}: make it smaller, or give a size")
    return m


def adapter_init(d, m, init="zero_up", generator=None):
    """The starting values of the two matrices; the biases start at zero.

    init: "zero_up"  W_down uniform in +-1/sqrt(d), W_up zero: exactly the identity (He et al. 2021)
          "houlsby"  both normal, standard deviation 0.01, drawn again beyond two of them (Houlsby et al. 2019)
          "bert"     both normal, standard deviation 0.02 (AdapterHub): far from the identity in a wide model
    generator: a torch.Generator to draw from, or None for the global one
    returns W_down (m, d) and W_up (d, m), in float32
    raises ValueError for any other name; both zero is none, because then nothing but b_up would ever be trained
    """
    settings.one_of("init", init, INITS)
    W_down, W_up = torch.zeros(m, d), torch.zeros(d, m)
    if init == "zero_up":
        W_down.uniform_(-(d**-0.5), d**-0.5, generator=generator)
    for W in (W_down, W_up):
        if init == "houlsby":
            nn.init.trunc_normal_(W, std=0.01, a=-0.02, b=0.02, generator=generator)
        if init == "bert":
            W.normal_(std=0.02, generator=generator)
    return W_down, W_up


# ------------------------------------------------------------------------------------------------- the modules


class Bottleneck(Guest):
    """The four tensors of an adapter. Subclasses say where `change` is read and added."""

    why_not = "has a non-linearity between its two matrices"

    def __init__(self, d, m, activation="relu", dropout=0.0, init="zero_up", dtype=None, device=None):
        super().__init__()
        self.activation, self.dropout = activation, dropout
        like = {"dtype": dtype, "device": device}
        self.W_down, self.b_down = nn.Parameter(torch.empty(m, d, **like)), nn.Parameter(torch.zeros(m, **like))
        self.W_up, self.b_up = nn.Parameter(torch.empty(d, m, **like)), nn.Parameter(torch.zeros(d, **like))
        if not self.W_down.is_meta:
            with torch.no_grad():
                for own, start in zip((self.W_down, self.W_up), adapter_init(d, m, init), strict=True):
                    own.copy_(start)

    def change(self, h):
        """What is to be added for the input h (..., d), in h's dtype."""
        weights = (w.to(h.dtype) for w in (self.W_down, self.b_down, self.W_up, self.b_up))
        return bottleneck(h, *weights, self.squash)

    def squash(self, narrow):
        """The non-linearity, and dropout on the m numbers behind it, as He et al. have it."""
        return F.dropout(ACTIVATIONS[self.activation](narrow), self.dropout, self.training)

    def tensors(self):
        return {"down.weight": self.W_down, "down.bias": self.b_down, "up.weight": self.W_up, "up.bias": self.b_up}

    def load(self, tensors, state, trainable):
        if trainable and not tensors["down.weight"].any() and not tensors["up.weight"].any():
            raise ValueError("both matrices of an adapter are zero: nothing but b_up would ever be trained")
        super().load(tensors, state, trainable)

    def facts(self):
        m, d = self.W_down.shape
        return f"adapter {d} -> {m} -> {d}  {self.activation}"


class ReadingBottleneck(Bottleneck):
    """An adapter that needs something from earlier in the layer than where it adds: it keeps the input of `source`."""

    def __init__(self, source, **form):
        super().__init__(**form)
        self.source = source  # the path of a module that is called before the host is
        self.waiting = None  # its input, between the two calls

    def enter(self, model, path):
        super().enter(model, path)
        core_of(model.get_submodule(self.source)).register_forward_pre_hook(self._read, with_kwargs=True)

    def leave(self, model, path):
        super().leave(model, path)
        drop_hooks(core_of(model.get_submodule(self.source)), self)

    def _read(self, host, args, kwargs):
        if self.on:
            self.waiting = first(args, kwargs)

    def take(self):
        """The input of `source` in this forward pass, which is then forgotten."""
        found, self.waiting = self.waiting, None
        return found


def first(args, kwargs):
    """A module's one input, however it was passed."""
    return (*args, *kwargs.values())[0]


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class BottleneckConfig:
    """The settings that the three kinds of adapters share; their own docstrings say what they mean."""

    reduction: float = 16
    size: int | None = None
    activation: str = "relu"
    dropout: float = 0.0
    init: str = "zero_up"
    layers: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None

    peft_type = None  # PEFT has no bottleneck adapters: the file is in a format of our own

    def __post_init__(self):
        settings.positive("reduction", self.reduction)
        if self.size is not None:
            settings.whole("size", self.size)
        settings.one_of("activation", self.activation, tuple(ACTIVATIONS))
        settings.probability("dropout", self.dropout)
        settings.one_of("init", self.init, INITS)
        settings.float_dtype("dtype", self.dtype)
        clean = {
            "layers": settings.layer_numbers(self.layers),
            "modules_to_save": settings.names("modules_to_save", self.modules_to_save, or_regex=False),
        }
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def form(self, model, layer):
        """What the Bottlenecks of one layer are made with. layer: its path"""
        module, d = model.get_submodule(layer), model.config.hidden_size
        return {
            "d": d,
            "m": self.size or bottleneck_size(d, self.reduction),
            "activation": self.activation,
            "dropout": self.dropout,
            "init": self.init,
            "dtype": self.dtype or adapter_dtype(module),
            "device": next(module.parameters()).device,
        }

    def chosen_layers(self, model):
        """(family, path) of the layers that get adapters, in the model's order. See families.py."""
        name = type(self).__name__
        found = [(family, path) for family in family_of(model, name) for path in family.layers(model)]
        if not found:
            raise ValueError(f"{name} found no layers in this {type(model).__name__}")
        numbers = {layer_number(path) for _, path in found}
        missing = sorted(set(self.layers or ()) - numbers)
        if missing:
            raise ValueError(f"layers {missing} do not exist; this model's layers are 0 to {max(numbers)}")
        chosen = [(family, path) for family, path in found if self.layers is None or layer_number(path) in self.layers]
        if not chosen:
            raise ValueError(f"layers is empty: {name} would adapt nothing")
        return chosen

    def checked(self, model, parts):
        """The parts, or ValueError where one lies in a module that is trained whole: there a copy runs in its place."""
        sources = [part.source for part in parts.values() if isinstance(part, ReadingBottleneck)]
        for whole in whole_modules(model, self):
            lost = [path for path in [*parts, *sources] if inside(path, whole)]
            if lost:
                raise ValueError(f"{whole} is trained whole (modules_to_save): an adapter at {lost[0]} would not run")
        return parts
