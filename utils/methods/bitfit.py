"""BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
(Ben Zaken, Ravfogel, Goldberg 2021, https://arxiv.org/abs/2106.10199): train the biases, and nothing else.

    y = W x + b                      b (d_out,) is trained, W is not
    y = g * (x - mean) / std + b     of a LayerNorm too

    all biases start as they are     so that the first forward pass is the base model's
    sum of the biases' lengths       numbers trained; they add no work to a forward pass, merged or not

Worked example: a layer of GPT-2 with width d has biases in ln_1 (d), c_attn (3 d), c_proj (d), ln_2 (d), c_fc (4 d) and
c_proj (d), 11 d in all. With d = 768, 12 layers and ln_f that is 102,144 numbers, 0.08 % of the model.

Models without biases (Llama, Mistral, Gemma, T5) have nothing to train, and `attach` says so; PEFT's nearest relative,
LoraConfig(bias="all"), trains none of them without a word.

What is trained is a copy of each bias, in float32 over a half-precision base: near 1 bfloat16 has steps of 2^-7, so
that Adam's steps of a usual learning rate, 1e-4 to 1e-3, would be rounded away one by one. The copy adds them up. PEFT
has no such method, so the file is of our own format.
"""

from dataclasses import dataclass

import torch
from torch import nn

from utils.methods import settings
from utils.methods.parts import Guest, Wrapper, adapter_dtype, core_of
from utils.targeting import called, inside, matches, module_tree, narrow, near_names, whole_modules

# ---------------------------------------------------------------------------------------------- what is trained


def bias_names(names, targets=None):
    """The parameters that BitFit trains.

    names: of a model's parameters, in its order
    targets: names of modules, or a regular expression over whole paths (a str), or None for every module
    returns those called "bias", whole word: relative_attention_bias.weight of T5 is a matrix, not a bias
    """
    biases = [n for n in names if n.rsplit(".", 1)[-1] == "bias"]
    return [n for n in biases if targets is None or matches(n.removesuffix(".bias"), targets)]


def bitfit_num_params(model, targets=None):
    """How many numbers BitFit trains in a model without adapters. A bias in two places (a tied head's) counts once."""
    parameters = dict(model.named_parameters())
    return sum(parameters[name].numel() for name in bias_names(parameters, targets))


# ------------------------------------------------------------------------------------------------- the module


class TrainedBias(Wrapper):
    """A module that computes with a trained copy of its bias."""

    mergeable = True

    def __init__(self, base, dtype=None):
        super().__init__(base)
        self.b = nn.Parameter(self.core.bias.detach().to(dtype, copy=True))

    def adapted_forward(self, *args, **kwargs):
        return torch.func.functional_call(self.core, self.merged_tensors(), args, kwargs)

    def merged_tensors(self):
        return {"bias": self.b.to(self.core.bias.dtype)}

    def tensors(self):
        return {"bias": self.b}

    def facts(self):
        return f"bias of a {type(self.core).__name__}, {self.b.numel():,}"


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class BitFit:
    """What to attach. Trains the biases, d_out numbers per layer that has one (Ben Zaken et al. 2021,
    arXiv:2106.10199).

    targets          names of modules whose biases are trained, say ("query", "intermediate.dense"), the paper's
                     smaller variant; one regular expression over whole paths (a str); None for all
    layers           layer numbers to keep, or None for all     exclude: names or a regular expression to leave out
    modules_to_save  modules trained whole and saved; None: the classification head, if the model has one
    dtype            of the trained copies; None: float32 over a half-precision base, else the base's
    """

    targets: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    exclude: tuple[str, ...] | str = ()
    modules_to_save: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None

    peft_type = None

    def __post_init__(self):
        settings.float_dtype("dtype", self.dtype)
        clean = {
            "targets": settings.names("targets", self.targets),
            "layers": settings.layer_numbers(self.layers),
            "exclude": settings.names("exclude", self.exclude) or (),
            "modules_to_save": settings.names("modules_to_save", self.modules_to_save, or_regex=False),
        }
        if clean["targets"] == ():
            raise ValueError("targets is empty: name at least one module, or leave it out to train every bias")
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def parts(self, model):
        """{path: wrapper} for every module with a bias that is meant."""
        whole = whole_modules(model, self)
        modules = {path: core_of(m) for path, m in module_tree(model) if path}
        modules = {path: m for path, m in modules.items() if not any(inside(path, w) for w in whole)}
        # Only single layers: where a head holds its layer's bias as well (BERT's decoder), it is the layer's.
        # The parts of another adapter that live in a layer are no layers.
        single = [p for p, m in modules.items() if all(isinstance(child, Guest) for child in m.children())]
        biased = [p for p in single if modules[p]._parameters.get("bias") is not None]
        if not biased:
            raise ValueError(f"this {type(model).__name__} has no biases, so BitFit has nothing to train")
        found = [n.removesuffix(".bias") for n in bias_names([f"{p}.bias" for p in biased], self.targets)]
        lost = [t for t in self.targets or () if not any(matches(p, (t,)) for p in biased)]
        if isinstance(self.targets, tuple) and lost:
            raise ValueError(f"no module with a bias is called {', '.join(lost)}. {near_names(biased, lost)}")
        if not found:
            raise ValueError(f"targets={self.targets!r} matches no module with a bias")
        parts = {}
        for path in narrow(found, modules, self):
            if not called(model, path):
                raise ValueError(f"{path}: torch reads its bias without calling it, so a copy would do nothing")
            module = model.get_submodule(path)
            parts[path] = TrainedBias(module, self.dtype or adapter_dtype(modules[path]))
        return parts
