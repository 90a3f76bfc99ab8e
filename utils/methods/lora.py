"""LoRA: Low-Rank Adaptation of Large Language Models (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

    y = W x + b + s B A dropout(x)        s = alpha / r   (rsLoRA, Kalajdzievski 2023: s = alpha / sqrt(r))

    W (d_out, d_in) and b (d_out,)   the layer, frozen
    A (r, d_in)                      starts uniform in +-1/sqrt(d_in)
    B (d_out, r)                     starts at zero, so that the first forward pass is the base model's
    r (d_in + d_out)                 numbers trained per layer

Worked example: Llama-2-7B's q_proj has W (4096, 4096), 16,777,216 numbers. With r = 8, A is (8, 4096) and B is
(4096, 8): 65,536 numbers, 0.39 % of W.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils.methods import settings
from utils.methods.layers import is_conv1d, linear_shape, mergeable_weight, plain_weight
from utils.methods.parts import Wrapper, core_of
from utils.targeting import all_used, chosen_biases, pattern_value, wrap_targets

# ---------------------------------------------------------------------------------------------- the equations


def lora_scale(alpha, r, scaling="standard"):
    """The factor s in front of B A.

    alpha: float   r: rank, int   scaling: "standard" (Hu et al. 2021) or "rslora" (Kalajdzievski 2023)
    returns alpha / r, or alpha / sqrt(r) under rsLoRA
    raises ValueError for any other name
    """
    if scaling == "standard":
        return alpha / r
    if scaling == "rslora":
        return alpha / math.sqrt(r)
    raise ValueError(f"scaling is {scaling!r}; it can be 'standard' (alpha / r) or 'rslora' (alpha / sqrt(r))")


def lora_init(d_in, d_out, r, generator=None):
    """The starting values of A and B.

    A is uniform in +-1/sqrt(d_in), as in the authors' code (their paper says Gaussian). B is zero.
    generator: a torch.Generator to draw from, or None for the global one
    returns A (r, d_in) and B (d_out, r), in float32
    """
    A = torch.empty(r, d_in).uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in), generator=generator)
    B = torch.zeros(d_out, r)
    return A, B


def lora_delta(A, B, alpha):
    """The update of the weight: (alpha / r) B A.

    A: (r, d_in)   B: (d_out, r)   alpha: float
    returns (d_out, d_in), the shape of nn.Linear.weight
    """
    r = A.shape[0]
    return (alpha / r) * (B @ A)


def lora_forward(x, W, A, B, alpha):
    """Output of a LoRA linear layer (Hu et al. 2021, eq. 3): x W^T plus the update, B A never formed.

    x: (..., d_in)   W: (d_out, d_in), frozen   A: (r, d_in)   B: (d_out, r)   alpha: float
    returns (..., d_out), in x's dtype
    """
    r = A.shape[0]
    narrow = x @ A.T  # (..., r)
    return x @ W.T + (alpha / r) * (narrow @ B.T)


def lora_num_params(shapes, r):
    """How many numbers LoRA trains.

    shapes: the (d_out, d_in) of each adapted weight   r: rank
    returns the sum of r (d_in + d_out), an int
    """
    return sum(r * (d_in + d_out) for d_out, d_in in shapes)


def lora_merge(W, A, B, alpha):
    """The weight with the update in it: W + (alpha / r) B A.

    W: (d_out, d_in), any float dtype   A: (r, d_in)   B: (d_out, r)
    returns a new (d_out, d_in) tensor in W's dtype; product and sum are taken in float32 and rounded once
    """
    r = A.shape[0]
    update = (alpha / r) * (B.float() @ A.float())
    return (W.float() + update).to(W.dtype)


def fuse_loras(As, Bs):
    """Several LoRAs of the parts of one fused weight (GPT-2's q, k and v), written as a single LoRA.

    As: k tensors (r_i, d_in)   Bs: k tensors (d_out_i, r_i); part i owns rows d_out_i of the fused weight
    returns A (sum r_i, d_in), the A's stacked, and B (sum d_out_i, sum r_i), block-diagonal
    The product is unscaled: give the fused LoRA an alpha k times as large, because its rank is k times as large.
    """
    return torch.cat(list(As)), torch.block_diag(*Bs)


def lora_backward(grad, x, W, A, B, scale, mask=None):
    """The gradients of y = x W^T + scale (mask * x) A^T B^T, from x alone.

    grad: (n, d_out), dloss/dy   x: (n, d_in)   W: (d_out, d_in), or None when x needs no gradient
    A: (r, d_in)   B: (d_out, r)   mask: (n, d_in) of the dropout, or None
    returns dx (n, d_in) or None, dA (r, d_in), dB (d_out, r)
    """
    # x * mask would convert the mask into one new tensor and write into another; a product in place needs one
    kept = x if mask is None else mask.to(x.dtype, copy=True).mul_(x)  # (n, d_in)
    grad_narrow = scale * (grad @ B)  # (n, r), dloss/d(kept A^T)
    dA = grad_narrow.T @ kept
    narrow = scale * (kept @ A.T)  # (n, r), formed again: r columns are cheaper to compute than to keep
    dB = (narrow.T @ grad).T  # grad^T (x A^T), in the order that is faster
    if W is None:
        return None, dA, dB
    dx = grad_narrow @ A  # the small product first: the large one then adds to it as it goes
    if mask is not None:
        dx.mul_(mask)
    return dx.addmm_(grad, W), dA, dB


class LoRAFunction(torch.autograd.Function):
    """A LoRA linear layer that keeps x for its backward pass, and nothing else of x's size.

    apply(x, W, bias, A, B, scale, mask) -> (..., d_out)
    x: (..., d_in)   bias: (d_out,) or None   mask: ones and zeros of x's shape, or None
    scale: alpha / r, and with a mask the 1 / (1 - p) of dropout as well
    """

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, mask):
        ctx.save_for_backward(x, W, A, B, mask)
        ctx.scale = scale
        W, A, B = W.to(x.dtype), A.to(x.dtype), B.to(x.dtype)
        kept = x if mask is None else mask.to(x.dtype, copy=True).mul_(x)  # (..., d_in)
        narrow = scale * F.linear(kept, A).view(-1, A.shape[0])  # (n, r)
        y = narrow @ B.T if bias is None else torch.addmm(bias.to(x.dtype), narrow, B.T)  # (n, d_out)
        y.addmm_(x.reshape(-1, x.shape[-1]), W.T)  # the large product last: it adds to y as it goes
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx, grad):
        x, W, A, B, mask = ctx.saved_tensors
        W = W.to(x.dtype) if ctx.needs_input_grad[0] else None
        rows = [None if t is None else t.reshape(-1, t.shape[-1]) for t in (grad, x, mask)]
        dx, dA, dB = lora_backward(rows[0], rows[1], W, A.to(x.dtype), B.to(x.dtype), ctx.scale, rows[2])
        dW = rows[0].T @ rows[1] if ctx.needs_input_grad[1] else None  # only if someone unfroze the base
        dbias = rows[0].sum(0) if ctx.needs_input_grad[2] else None
        return None if dx is None else dx.view_as(x), dW, dbias, dA, dB, None, None


# ------------------------------------------------------------------------------------------------- the modules


class LoRALinear(Wrapper):
    """A linear layer with a LoRA beside it. base: nn.Linear, Conv1D, or anything with in_features and out_features."""

    mergeable = True
    fast = True  # False: the plain formula `lora_forward` under autograd, to compare with and to differentiate twice

    def __init__(self, base, r, alpha, scaling="standard", dropout=0.0, init="uniform", dtype=None):
        super().__init__(base)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.scale = lora_scale(alpha, r, scaling)
        d_out, d_in = linear_shape(self.core)
        device = self.core.weight.device
        self.A = nn.Parameter(torch.empty(r, d_in, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(d_out, r, dtype=dtype, device=device))
        if device.type != "meta":
            self.reset(init)

    @torch.no_grad()
    def reset(self, init):
        (d_out, r), d_in = self.B.shape, self.A.shape[1]
        A, B = lora_init(d_in, d_out, r)
        if init == "gaussian":
            A.normal_(std=1 / r)
        if init == "random_b":  # not the identity at the start: for tests
            B.normal_(std=1 / r)
        self.A.copy_(A)
        self.B.copy_(B)

    def adapted_forward(self, x):
        return self.low_rank_output(x, self.A, self.B)

    def low_rank_output(self, x, A, B):
        """The layer's output with s B A dropout(x) added."""
        layer, scale, mask = self.inner, self.scale, None
        device = "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if self.dropout > 0 and self.training:
            # One byte per element is kept; nn.Dropout would keep a mask and the dropped copy of x.
            mask, scale = dropout_mask(x, self.dropout), scale / (1 - self.dropout)
        weight = plain_weight(layer)
        if weight is None:  # a quantized layer, a second adapter, a layer with hooks: only its output is ours to use
            kept = x if mask is None else x * mask
            return layer(x) + scale * F.linear(F.linear(kept, A.to(x.dtype)), B.to(x.dtype))
        if not self.fast and mask is None:
            y = lora_forward(x, weight, A.to(x.dtype), B.to(x.dtype), scale * self.r)
            return y if layer.bias is None else y + layer.bias.to(x.dtype)
        with torch.autocast(device, enabled=False):
            return LoRAFunction.apply(x, weight, layer.bias, A, B, scale, mask)

    def merged_tensors(self):
        """The core's weight with the update in it, stored as the core stores it."""
        weight = mergeable_weight(self.core)
        merged = lora_merge(weight, self.A, self.B, self.scale * self.r)
        return {"weight": merged.T.contiguous() if is_conv1d(self.core) else merged}

    def tensors(self):
        return {"lora_A.weight": self.A, "lora_B.weight": self.B}

    def facts(self):
        return lora_facts(self)


class LoRAEmbedding(Wrapper):
    """An embedding with a LoRA beside it: y = W[ids] + s B A[:, ids]. Here A (r, vocabulary) starts at zero, not B."""

    mergeable = True

    def __init__(self, base, r, alpha, scaling="standard", dropout=0.0, init="uniform", dtype=None):
        super().__init__(base)
        if type(self.core) is not nn.Embedding and not hasattr(self.core, "embed_scale"):
            raise ValueError(f"LoRA knows nn.Embedding; {type(self.core).__name__} does more than look rows up")
        self.r, self.alpha = r, alpha  # no dropout: the input is a list of token numbers
        self.scale = lora_scale(alpha, r, scaling)
        vocabulary, d = self.core.weight.shape
        like = {"dtype": dtype, "device": self.core.weight.device}
        self.A = nn.Parameter(torch.zeros(r, vocabulary, **like))
        self.B = nn.Parameter(torch.empty(d, r, **like).normal_())
        if init == "random_b":
            nn.init.normal_(self.A, std=1 / r)

    def adapted_forward(self, ids):
        # padding_idx: as in the base, the padding token's entry gets no gradient
        rows = F.embedding(ids, self.A.T, padding_idx=self.core.padding_idx)  # (..., r)
        factor = self.scale * getattr(self.core, "embed_scale", 1)  # Gemma multiplies what it looks up
        y = self.inner(ids)
        return y + (factor * F.linear(rows, self.B)).to(y.dtype)

    def merged_tensors(self):
        merged = lora_merge(self.core.weight.T, self.A, self.B, self.scale * self.r)
        return {"weight": merged.T.contiguous()}

    def tensors(self):
        return {"lora_embedding_A": self.A, "lora_embedding_B": self.B}

    def facts(self):
        return lora_facts(self)


def lora_facts(part):
    """One line of the report: the shape of W, rank and scale."""
    shape = (part.B.shape[0], part.A.shape[1])
    return f"{shape}  r={part.r}  alpha={part.alpha:g}  scale {part.scale:.4g}"


def dropout_mask(x, p):
    """Ones and zeros of x's shape, int8, a zero with probability p.

    Sixteen random bits decide each number (so p is met to 1 part in 65,536). That is four times faster than bernoulli_,
    whose draws nn.Dropout would use; the masks differ, their distribution does not.
    """
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    bits = bits.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -32768 ... 32767
    return (bits >= round(p * 2**16) - 2**15).view(torch.int8)


# ---------------------------------------------------------------------------------------------- the configuration


DEFAULT_TARGETS = {
    ("q_proj", "v_proj"): "llama mistral mixtral qwen2 qwen3 gemma gemma2 gemma3_text opt gptj gpt_neo bart".split(),
    ("query", "value"): "bert roberta xlm-roberta electra".split(),
    ("q", "v"): "t5 mt5".split(),
    ("c_attn",): "gpt2 gpt_bigcode".split(),
    ("query_key_value",): "gpt_neox bloom falcon".split(),
}


# Settings of PEFT's that change the computation and are not LoRA's: a file that sets one is not ours to read.
NOT_PLAIN = (
    "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "megatron_config",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config",
    "kasa_config",
)  # fmt: skip
# PEFT's other ways to begin (PiSSA, OLoRA, LoftQ, ...) change the base weights too, so such a file needs that base.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoRA:
    """What to attach. Trains r (d_in + d_out) numbers per matched layer (Hu et al. 2021, arXiv:2106.09685).

    r, alpha         rank, and the scale's numerator
    targets          names ("q_proj", "v_proj"), one regular expression over whole paths (a str), "all-linear",
                     or None for the usual ones of the model's family
    scaling          "standard" (alpha / r) or "rslora" (alpha / sqrt(r))
    dropout          probability, on the LoRA branch's input only, in training mode only
    layers           layer numbers to keep, or None for all     exclude: names or a regular expression to leave out
    rank_pattern     {name or regex: r} for single modules      alpha_pattern: the same for alpha
    bias             "none", "lora_only" (biases of the adapted layers) or "all": biases trained beside it
    modules_to_save  modules trained whole and saved; None: the classification head, if the model has one
    init             "uniform" (A in +-1/sqrt(d_in)), "gaussian" (std 1/r), "random_b" (B not zero, for tests)
    dtype            of A and B; None: float32 over a half-precision base, else the base's
    """

    r: int = 8
    alpha: float = 16
    targets: tuple[str, ...] | str | None = None
    scaling: str = "standard"
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    exclude: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    init: str = "uniform"
    dtype: torch.dtype | None = None

    peft_type = "LORA"
    linear, embedding = LoRALinear, LoRAEmbedding  # the wrappers; DoRA has its own

    def __post_init__(self):
        settings.rank(self.r)
        settings.positive("alpha", self.alpha)
        settings.probability("dropout", self.dropout)
        settings.one_of("bias", self.bias, ("none", "lora_only", "all"))
        settings.one_of("init", self.init, ("uniform", "gaussian", "random_b"))
        settings.float_dtype("dtype", self.dtype)
        lora_scale(self.alpha, self.r, self.scaling)  # raises for an unknown rule
        alpha = partial(settings.positive, "alpha")
        clean = {
            "targets": settings.names("targets", self.targets),
            "layers": settings.layer_numbers(self.layers),
            "exclude": settings.names("exclude", self.exclude) or (),
            "rank_pattern": settings.per_module("rank_pattern", self.rank_pattern, settings.rank),
            "alpha_pattern": settings.per_module("alpha_pattern", self.alpha_pattern, alpha),
            "modules_to_save": settings.names("modules_to_save", self.modules_to_save, or_regex=False),
        }
        if clean["targets"] == ():
            raise ValueError("targets is empty: name at least one module, or say 'all-linear'")
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @staticmethod
    def default_targets(family):
        """The usual targets of a model family (config.model_type), as PEFT has them, or None."""
        return next((targets for targets, families in DEFAULT_TARGETS.items() if family in families), None)

    def parts(self, model):
        """{path: wrapper} for every matched module."""
        wrappers = wrap_targets(model, self)
        all_used((self.rank_pattern, self.alpha_pattern), wrappers)
        return wrappers

    def biases(self, model, parts):
        return chosen_biases(model, parts, self.bias)

    def wrap(self, module, path, dtype):
        """The wrapper for one matched module, or ValueError when there is no form for it."""
        core = core_of(module)
        if isinstance(core, nn.Embedding):
            kind = self.embedding
        elif isinstance(core, nn.Linear) or is_conv1d(core):
            kind = self.linear
        else:
            method = type(self).__name__
            raise ValueError(f"{method} adapts nn.Linear, Conv1D and nn.Embedding, not {type(core).__name__}")
        r = pattern_value(self.rank_pattern, path, self.r)
        alpha = pattern_value(self.alpha_pattern, path, self.alpha)
        return kind(module, r, alpha, self.scaling, self.dropout, self.init, dtype)

    # ---- PEFT's file

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are LoRA's own."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.scaling == "rslora",
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": self.bias,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, fields):
        """The configuration that such a file describes, or ValueError for what is not plain LoRA."""
        others = [name for name in NOT_PLAIN if fields.get(name)]
        if fields.get("init_lora_weights") not in PLAIN_INITS:
            others.append(f"init_lora_weights={fields['init_lora_weights']!r}")
        if others:
            raise ValueError(f"the file uses {', '.join(others)}, which is not plain LoRA")
        settings.one_of("use_rslora", fields.get("use_rslora"), (None, False, True))
        return cls(
            r=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            scaling="rslora" if fields.get("use_rslora") else "standard",
            dropout=fields.get("lora_dropout", 0.0),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            bias=fields.get("bias", "none"),
            **settings.peft_targets(fields),
        )
