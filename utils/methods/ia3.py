"""(IA)^3: Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
(Liu et al. 2022, https://arxiv.org/abs/2205.05638): learned vectors that stretch or shrink what a layer computes.

    k = l_k * (W_k x + b_k)        v = l_v * (W_v x + b_v)        ffn = W_2 (l_ff * act(W_1 x)) + b_2

    l_k (d_k,), l_v (d_v,)   scale the output of the key and value projections, their bias included
    l_ff (d_ff,)             scales the input of the feed-forward part's last layer (a `feedforward` module here)
    all start at one         so that the first forward pass is the base model's
    d_k + d_v + d_ff         numbers trained per layer

Worked example: a layer of Llama-2-7B has keys and values of 4096 and 11,008 inner activations: 19,200 numbers, and
614,400 in 32 layers, 0.009 % of the model. Rank-1 LoRA on the same three matrices trains 31,488 a layer.

The usual modules are PEFT's, and not everywhere the paper's:
- GPT-2 has q, k and v in one layer, c_attn. PEFT scales all three; here the usual targets leave q alone (`queries`).
- In BERT "output.dense" is also attention.output.dense, whose inputs are the mixed values. Scaling those and scaling
  the values is the same; exclude=("attention.output.dense",) trains the paper's vectors only.
- Qwen2, Gemma and OPT scale queries. Where no rotary positions come between, (l * q) . k = q . (l * k): the same again.
Two adapters on one model multiply their vectors in PEFT. Here one is active at a time.
"""

import re
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from utils.methods import settings
from utils.methods.layers import is_conv1d, linear_shape, mergeable_weight
from utils.methods.parts import Wrapper, core_of
from utils.targeting import match_targets, matches, used_names, wrap_targets

# ---------------------------------------------------------------------------------------------- the equations


def ia3_scale(y, l):
    """Every feature times its factor: l * y.

    y: (..., d), keys, values or inner activations   l: (d,)
    returns (..., d), in y's dtype: it is l that is rounded to half precision, never y that is made float32
    """
    return y * l.to(y.dtype)


def ia3_merge(W, bias, l, feedforward=False):
    """The weight and bias of a linear layer that scales by itself.

    W: (d_out, d_in), any float dtype   bias: (d_out,) or None
    l: (d_out,) for a scaled output: rows of W and the bias   (d_in,) with feedforward, a scaled input: columns of W
    returns new W and bias, in their dtypes; products are rounded once
    """
    if feedforward:
        return (W * l).to(W.dtype), bias
    return (W * l[:, None]).to(W.dtype), None if bias is None else (bias * l).to(bias.dtype)


def ia3_num_params(d_k, d_v, d_ff, layers):
    """How many numbers the paper's (IA)^3 trains in layers with one attention each.

    d_k, d_v: width of all keys and values (few heads make them narrow)   d_ff: of the inner activations
    """
    return layers * (d_k + d_v + d_ff)


# ------------------------------------------------------------------------------------------------- the module


class IA3Linear(Wrapper):
    """A linear layer with its output scaled by l, or its input with feedforward.

    base: nn.Linear, Conv1D, or anything with in_features and out_features
    skip: so many leading outputs stay as they are (the queries of GPT-2's c_attn)
    For the backward pass only the scaled tensor is kept, in its own dtype.
    """

    mergeable = True

    def __init__(self, base, feedforward=False, skip=0, dtype=None):
        super().__init__(base)
        self.feedforward, self.skip = feedforward, skip
        d_out, d_in = linear_shape(self.core)
        shape = (1, d_in) if feedforward else (d_out - skip, 1)  # a row or a column, as in PEFT's file
        self.l = nn.Parameter(torch.ones(shape, dtype=dtype, device=self.core.weight.device))

    def whole(self):
        """l with ones for what is skipped, (d_out, 1) or (1, d_in)."""
        return F.pad(self.l, (0, 0, self.skip, 0), value=1.0) if self.skip else self.l

    def adapted_forward(self, x):
        l = self.whole().flatten()
        return self.inner(ia3_scale(x, l)) if self.feedforward else ia3_scale(self.inner(x), l)

    def merged_tensors(self):
        weight = mergeable_weight(self.core)
        weight, bias = ia3_merge(weight, self.core.bias, self.whole().flatten(), self.feedforward)
        merged = {"weight": weight.T.contiguous() if is_conv1d(self.core) else weight}
        return merged if bias is None or self.feedforward else merged | {"bias": bias}

    def tensors(self):
        return {"ia3_l": self.l}

    def exported(self):
        return {"ia3_l": self.whole()}

    def load(self, tensors, state, trainable):
        if (tensors["ia3_l"][: self.skip] != 1).any():
            raise ValueError("the file scales queries, which its setting queries=false leaves alone")
        self.l.copy_(tensors["ia3_l"][self.skip :])

    def facts(self):
        of = "k and v of the output" if self.skip else "input" if self.feedforward else "output"
        return f"l {tuple(self.l.flatten().shape)} on the {of}"


# ---------------------------------------------------------------------------------------------- the configuration


# (modules with a scaled output, modules with a scaled input): the families that have them, as in PEFT.
# Left out are those with q, k and v of each head side by side in one layer (BLOOM, GPT-NeoX, Falcon).
USUAL = {
    (("k_proj", "v_proj"), ("down_proj",)): "llama mistral".split(),
    (("q_proj", "v_proj"), ("down_proj",)): "qwen2 qwen3 gemma gemma2 gemma3_text".split(),
    (("q_proj", "k_proj"), ("fc2",)): "opt".split(),
    (("q_proj", "v_proj"), ("fc2",)): "bart phi".split(),
    (("key", "value"), ("output.dense",)): "bert roberta".split(),
    (("k", "v"), ("wo",)): "t5".split(),
    (("k", "v", "wi_1"), ()): "mt5".split(),  # the gate's factor: its output scaled is wo's input scaled
    (("c_attn",), ("mlp.c_proj",)): "gpt2".split(),
}


def usual_modules(family):
    """(outputs, inputs) to scale in a model family (config.model_type), or None."""
    return next((modules for modules, families in USUAL.items() if family in families), None)


@dataclass(frozen=True)
class IA3:
    """What to attach. Trains d_out numbers per matched layer, or d_in per feedforward layer (Liu et al. 2022,
    arXiv:2205.05638): d_k + d_v + d_ff in a layer of the paper's.

    targets          names ("k_proj", "v_proj", "down_proj"), one regular expression over whole paths (a str),
                     "all-linear", or None for the usual ones of the model's family
    feedforward      those of the targets whose input is scaled, as names or a regular expression; () for none;
                     None: the usual ones of the family
    layers           layer numbers to keep, or None for all     exclude: names or a regular expression to leave out
    queries          whether GPT-2's c_attn, which holds q, k and v, has q scaled too, as PEFT does and the paper does
                     not; None: only if `targets` says which modules
    modules_to_save  modules trained whole and saved; None: the classification head, if the model has one
    dtype            of l; None: float32 over a half-precision base, else the base's
    """

    targets: tuple[str, ...] | str | None = None
    feedforward: tuple[str, ...] | str | None = None
    layers: tuple[int, ...] | None = None
    exclude: tuple[str, ...] | str = ()
    queries: bool | None = None
    modules_to_save: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None

    peft_type = "IA3"

    def __post_init__(self):
        settings.float_dtype("dtype", self.dtype)
        settings.one_of("queries", self.queries, (None, False, True))
        clean = {
            "targets": settings.names("targets", self.targets),
            "feedforward": settings.names("feedforward", self.feedforward),
            "layers": settings.layer_numbers(self.layers),
            "exclude": settings.names("exclude", self.exclude) or (),
            "modules_to_save": settings.names("modules_to_save", self.modules_to_save, or_regex=False),
        }
        if clean["targets"] == ():
            raise ValueError("targets is empty: name at least one module, or say 'all-linear'")
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @staticmethod
    def default_targets(family):
        """The usual targets of a model family (config.model_type), as PEFT has them, or None."""
        usual = usual_modules(family)
        return usual and usual[0] + usual[1]

    def parts(self, model):
        """{path: wrapper} for every matched module."""
        wrappers = wrap_targets(model, self.decided(model))
        if isinstance(self.feedforward, str) and not any(w.feedforward for w in wrappers.values()):
            raise ValueError(f"feedforward={self.feedforward!r} matches none of the targets")
        if isinstance(self.feedforward, tuple):
            try:
                match_targets(wrappers, self.feedforward)
            except ValueError as error:
                raise ValueError(f"feedforward: {error} among the targets") from None
        return wrappers

    def decided(self, model):
        """This configuration with what is None by default decided for a model."""
        feedforward, queries = self.feedforward, self.queries
        family = getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__
        if feedforward is None:
            if usual_modules(family) is None:
                raise ValueError(
                    f"no usual modules are known for the model family {family!r}: name them with targets=, and those "
                    "of them whose input is scaled with feedforward= (() for none)"
                )
            feedforward = usual_modules(family)[1]
        if queries is None:
            queries = self.targets is not None
        return replace(self, feedforward=feedforward, queries=queries)

    def wrap(self, module, path, dtype):
        """The wrapper for one matched module, or ValueError when (IA)^3 has no form for it."""
        core = core_of(module)
        if not isinstance(core, nn.Linear) and not is_conv1d(core):
            raise ValueError(f"(IA)^3 adapts nn.Linear and Conv1D, not {type(core).__name__}")
        d_out, d_in = linear_shape(core)
        fused = is_conv1d(core) and matches(path, ("c_attn",)) and d_out == 3 * d_in
        feedforward = matches(path, self.feedforward)
        return IA3Linear(module, feedforward, d_in if fused and not (self.queries or feedforward) else 0, dtype)

    # ---- PEFT's file

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are (IA)^3's own."""
        parts = {path: part for path, part in adapter.parts.items() if isinstance(part, IA3Linear)}
        names = self.decided(adapter.model).feedforward
        if isinstance(names, tuple):
            names = used_names(parts, names)
            # PEFT wants these names among the targets', which the file may spell out, and lets them begin in the
            # middle of a word. A regular expression means the same to everyone.
            spelled_out = not isinstance(self.targets, tuple | None) or self.exclude or self.layers is not None
            loose = [path for path, part in parts.items() if path.endswith(names) and not part.feedforward]
            unnamed = isinstance(self.targets, tuple) and not set(names) <= set(self.targets)
            if names and (spelled_out or loose or unnamed):
                names = rf"(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"
        fields = {"feedforward_modules": names if isinstance(names, str) else sorted(names)}
        # PEFT warns of a field that is not its own and ignores it: its queries are then scaled by one.
        return fields | ({"queries": False} if any(part.skip for part in parts.values()) else {})

    @classmethod
    def from_peft(cls, fields):
        """The configuration that such a file describes."""
        return cls(
            feedforward=fields.get("feedforward_modules"),
            queries=fields.get("queries", True),
            **settings.peft_targets(fields),
        )

    def in_peft_terms(self, paths):
        """`feedforward` read as PEFT reads it: a name may begin in the middle of a word, and may be no target's.

        paths: of all modules of the model
        """
        names = self.feedforward
        if names is None:
            return self
        adapted = [p for p in paths if self.targets is None or matches(p, self.targets)]
        if isinstance(names, tuple) and any(p.endswith(names) and not matches(p, names) for p in adapted):
            names = f".*(?:{'|'.join(map(re.escape, names))})"
        return replace(self, feedforward=used_names(adapted, names))
