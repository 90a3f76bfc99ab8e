"""AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning (Zhang et al. 2023,
https://arxiv.org/abs/2303.10512).

    y = W x + b + s B (E * A) dropout(x)        s = alpha / (r + 1e-5)

    W (d_out, d_in) and b (d_out,)   the layer, frozen
    A (r, d_in), B (d_out, r)        start normal with standard deviation 0.02 (the paper's Q and P)
    E (r, 1)                         one number per row of A, as a singular value has; starts at zero
    r (d_in + d_out + 1)             numbers trained per layer

Row i of A, E_i and column i of B are a triplet: one rank-1 matrix. Every layer starts with r triplets, more than are
wanted in the end. After each step of the optimizer the least important of the whole model lose their E, so that layers
that need rank keep it. A regulariser holds A's rows and B's columns orthonormal: else E_i would not measure a triplet.

    budget       b(t) triplets live after step t, falling from r to target_r per layer on average (cubic)
    sensitivity  I = |p dloss/dp|; I_bar and U_bar are moving averages of it and of |I - I_bar|
    importance   of a triplet: I_bar U_bar of E_i, plus its mean over row i of A, plus that over column i of B

Worked example: Llama-2-7B's q_proj is (4096, 4096). With r = 12, A, E and B hold 12 x 8193 = 98,316 numbers; with
target_r = 8, a third of the model's triplets is gone at the end, from some layers all and from others none.

PEFT has the user call the allocator after each step, and trains plain rank-r matrices for those who forget it. Here an
optimizer that steps calls it by itself. PEFT also adds the regulariser to the loss in evaluation, fails when target_r
is the rank at the start, and over a half-precision base trains the divisor of s, which no file holds; none of it here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from utils.methods import settings
from utils.methods.layers import is_conv1d, linear_shape, mergeable_weight
from utils.methods.lora import NOT_PLAIN, LoRA, LoRALinear
from utils.methods.parts import Wrapper, core_of
from utils.targeting import all_used, chosen_biases, is_linear, pattern_value, wrap_targets

# ---------------------------------------------------------------------------------------------- the equations


def adalora_scale(alpha, r_init):
    """The factor s in front of B (E * A): alpha / (r_init + 1e-5), with the rank at the start, not the present one."""
    return alpha / (r_init + 1e-5)


def adalora_delta(A, E, B, alpha, r_init):
    """The update of the weight: s B (E * A).

    A: (r, d_in)   E: (r, 1)   B: (d_out, r)   alpha: float   r_init: the rank at the start, r or more
    returns (d_out, d_in), the shape of nn.Linear.weight
    """
    return adalora_scale(alpha, r_init) * (B @ (E * A))


def adalora_forward(x, W, A, E, B, alpha, r_init):
    """Output of an AdaLoRA linear layer: x W^T plus the update, which is never formed.

    x: (..., d_in)   W: (d_out, d_in), frozen   A: (r, d_in)   E: (r, 1)   B: (d_out, r)
    returns (..., d_out)
    """
    narrow = (x @ A.T) * E[:, 0]  # (..., r)
    return x @ W.T + adalora_scale(alpha, r_init) * (narrow @ B.T)


def adalora_budget(t, b0, bT, tinit, tfinal, total_steps):
    """How many triplets live after step t, in all layers together (Zhang et al. 2023, eq. 15).

    t: steps taken, int   b0, bT: triplets at the start and at the end
    b0 for the first `tinit` steps, bT for the last `tfinal`, in between bT + (b0 - bT) (1 - share of the way)^3
    returns an int, rounded down
    """
    if t <= tinit:
        return b0
    if t >= total_steps - tfinal:
        return bT
    left = 1 - (t - tinit) / (total_steps - tfinal - tinit)
    return int((b0 - bT) * left**3 + bT)


def adalora_sensitivity(p, grad, I_bar, U_bar, beta1, beta2):
    """The moving averages of a parameter's sensitivity I = |p grad| and of its uncertainty (eq. 9 and 10).

    p, grad, I_bar, U_bar: of one shape   beta1, beta2: how much of the old averages stays, between 0 and 1
    returns the new I_bar and U_bar; the uncertainty |I - I_bar| is taken from the new I_bar
    """
    I = (p * grad).abs()  # noqa: E741, the paper's name
    I_bar = beta1 * I_bar + (1 - beta1) * I
    U_bar = beta2 * U_bar + (1 - beta2) * (I - I_bar).abs()
    return I_bar, U_bar


def triplet_importance(score_A, score_E, score_B):
    """The importance of each triplet of a layer, from the scores I_bar U_bar of its numbers (eq. 7).

    score_A: (r, d_in)   score_E: (r, 1)   score_B: (d_out, r)
    returns (r,): E's score plus the means of A's row and of B's column
    """
    return score_E[:, 0] + score_A.mean(1) + score_B.mean(0)


def adalora_mask(importance, budget):
    """Which triplets live: the `budget` most important ones, exactly that many. Of equal ones the earlier lives.

    importance: (n,), of all triplets of the model   budget: int; n or more keeps all
    returns (n,) bool
    PEFT prunes all up to the k-th smallest value: more than asked where values are equal, and an error for k = 0.
    """
    order = importance.argsort(descending=True, stable=True)
    keep = torch.zeros(importance.shape, dtype=torch.bool, device=importance.device)
    keep[order[:budget]] = True
    return keep


def gram_distance(M):
    """How far the rows of M are from orthonormal: ||M M^T - I|| (Frobenius, not squared).

    M: (..., r, d)   returns (...)
    """
    gram = M @ M.mT  # (..., r, r)
    return torch.linalg.vector_norm(gram - torch.eye(M.shape[-2], dtype=M.dtype, device=M.device), dim=(-2, -1))


def orthogonality(A, B):
    """The regulariser of one layer: the mean of ||A A^T - I|| and ||B^T B - I||.

    A: (r, d_in)   B: (d_out, r)   returns a number
    The paper's eq. 4 has the squares; its code and PEFT have the norms, and so does this.
    """
    return (gram_distance(A) + gram_distance(B.mT)) / 2


# ------------------------------------------------------------------------------------------------- the modules


class AdaLoRALinear(LoRALinear):
    """A linear layer with triplets beside it. r: how many are held now   r_init: how many there were at the start."""

    def __init__(self, base, r, r_init, alpha, dropout=0.0, init="zero_e", dtype=None):
        Wrapper.__init__(self, base)
        self.r, self.r_init, self.alpha, self.dropout = r, r_init, alpha, dropout
        self.scale = adalora_scale(alpha, r_init)
        d_out, d_in = linear_shape(self.core)
        like = {"dtype": dtype, "device": self.core.weight.device}
        self.A = nn.Parameter(torch.empty(r, d_in, **like).normal_(std=0.02))
        self.B = nn.Parameter(torch.empty(d_out, r, **like).normal_(std=0.02))
        self.E = nn.Parameter(torch.zeros(r, 1, **like))
        if init == "random_e":  # not the identity at the start: for tests
            nn.init.normal_(self.E)
        self.register_buffer("kept", None, persistent=False)  # (r,) bool: the triplets that live; None: all

    def adapted_forward(self, x):
        if self.r == 0:
            return self.inner(x)
        return self.low_rank_output(x, self.E * self.A, self.B)  # E on the small side: (r, d_in) numbers

    def merged_tensors(self):
        weight = mergeable_weight(self.core)
        update = adalora_delta(self.A.float(), self.E.float(), self.B.float(), self.alpha, self.r_init)
        merged = (weight.float() + update).to(weight.dtype)
        return {"weight": merged.T.contiguous() if is_conv1d(self.core) else merged}

    @torch.no_grad()
    def prune(self, keep):
        """Take the singular value of every other triplet. keep: (r,) bool"""
        self.kept = keep
        self.E.masked_fill_(~keep[:, None], 0)

    @property
    def rank(self):
        """How many triplets live."""
        return self.r if self.kept is None else int(self.kept.sum())

    finished = False  # the schedule is over: what is pruned now does not come back

    def tensors(self):
        return {"lora_A": self.A, "lora_B": self.B, "lora_E": self.E}

    def exported(self):
        """The triplets that live. Before the schedule is over a pruned one may come back, so they are all kept."""
        if not self.finished or self.kept is None:
            return self.tensors()
        return {"lora_A": self.A[self.kept], "lora_B": self.B[:, self.kept], "lora_E": self.E[self.kept]}

    def facts(self):
        shape = (self.B.shape[0], self.A.shape[1])
        return f"{shape}  rank {self.rank} of {self.r_init}  alpha={self.alpha:g}  scale {self.scale:.4g}"


# ---------------------------------------------------------------------------------------------- the configuration


DEFAULT_TARGETS = {  # where they are not LoRA's
    ("q", "k", "v", "o", "wi", "wo"): ("t5",),
    ("q", "k", "v", "o", "wi_0", "wi_1", "wo"): ("mt5",),
    ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"): ("opt", "bart"),
    ("query", "key", "value", "dense"): ("roberta",),
}


@dataclass(frozen=True)
class AdaLoRA:
    """What to attach. Trains init_r (d_in + d_out + 1) numbers per matched layer (Zhang et al. 2023, arXiv:2303.10512).

    total_steps      optimizer steps of the whole run, required: the schedule ends with them
    init_r           rank of every layer at the start     target_r: their average at the end, init_r at most
    tinit, tfinal    steps before the first pruning, and after the last one
    delta_t          steps from one pruning to the next
    beta1, beta2     how much of the averaged sensitivity and of its uncertainty stays at each step
    orth_weight      of the regulariser that keeps A and B orthonormal; 0 for none
    rank_pattern     {name or regex: rank} of a finished adapter, as its file says; then no rank changes any more
    alpha, targets, dropout, layers, exclude, bias, modules_to_save, dtype   as in LoRA
    init             "zero_e" (the identity at the start) or "random_e" (for tests)
    """

    total_steps: int | None = None
    init_r: int = 12
    target_r: int = 8
    alpha: float = 8
    targets: tuple[str, ...] | str | None = None
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_weight: float = 0.5
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None
    exclude: tuple[str, ...] | str = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    init: str = "zero_e"
    dtype: torch.dtype | None = None

    peft_type = "ADALORA"

    def __post_init__(self):
        if self.total_steps is None:
            raise ValueError(
                "total_steps is missing: the schedule needs the number of optimizer steps of the whole run"
            )
        settings.rank(self.init_r)
        settings.rank(self.target_r)
        for name, least in (("total_steps", 1), ("tinit", 0), ("tfinal", 0), ("delta_t", 1)):
            settings.whole(name, getattr(self, name), least)
        if self.target_r > self.init_r:
            raise ValueError(f"target_r is {self.target_r}, above init_r, {self.init_r}: ranks only go down")
        if self.tinit >= self.total_steps - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave none of the {self.total_steps} steps to prune in"
            )
        for name in ("beta1", "beta2"):
            settings.positive(name, settings.probability(name, getattr(self, name)))
        if self.orth_weight != 0:
            settings.positive("orth_weight", self.orth_weight)
        settings.positive("alpha", self.alpha)
        settings.probability("dropout", self.dropout)
        settings.one_of("bias", self.bias, ("none", "lora_only", "all"))
        settings.one_of("init", self.init, ("zero_e", "random_e"))
        settings.float_dtype("dtype", self.dtype)
        clean = {
            "targets": settings.names("targets", self.targets),
            "layers": settings.layer_numbers(self.layers),
            "exclude": settings.names("exclude", self.exclude) or (),
            "rank_pattern": settings.per_module("rank_pattern", self.rank_pattern, self._final_rank),
            "modules_to_save": settings.names("modules_to_save", self.modules_to_save, or_regex=False),
        }
        if clean["targets"] == ():
            raise ValueError("targets is empty: name at least one module, or say 'all-linear'")
        for name, value in clean.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def _final_rank(self, value):
        if settings.whole("a rank of rank_pattern", value, 0) > self.init_r:
            raise ValueError(f"rank_pattern has a rank of {value}, above init_r, {self.init_r}")
        return value

    @staticmethod
    def default_targets(family):
        """The usual targets of a model family (config.model_type), as PEFT has them, or None."""
        own = next((targets for targets, families in DEFAULT_TARGETS.items() if family in families), None)
        return own or LoRA.default_targets(family)

    def parts(self, model):
        """{path: wrapper} for every matched module, and the allocator at the model itself."""
        from utils.methods.adalora_allocator import AdaLoRAAllocator  # it imports this file's equations

        layers = wrap_targets(model, self)
        all_used((self.rank_pattern,), layers)
        return {**layers, "": AdaLoRAAllocator(self, layers)}

    def biases(self, model, parts):
        return chosen_biases(model, parts, self.bias)

    def wrap(self, module, path, dtype):
        """The wrapper for one matched module, or ValueError when AdaLoRA has no form for it."""
        core = core_of(module)
        if not is_linear(core):
            raise ValueError(f"AdaLoRA adapts nn.Linear and Conv1D, not {type(core).__name__}")
        r = pattern_value(self.rank_pattern, path, self.init_r)
        return AdaLoRALinear(module, r, self.init_r, self.alpha, self.dropout, self.init, dtype)

    # ---- PEFT's file

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are AdaLoRA's own."""
        allocator = adapter.parts[""]
        return {
            "init_r": self.init_r,
            "target_r": self.target_r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "total_step": self.total_steps,
            "tinit": self.tinit,
            "tfinal": self.tfinal,
            "deltaT": self.delta_t,
            "beta1": self.beta1,
            "beta2": self.beta2,
            "orth_reg_weight": self.orth_weight,
            "rank_pattern": {f"{p}.lora_E": pattern(layer) for p, layer in allocator.layers.items()}
            if allocator.finished
            else None,
            "bias": self.bias,
            "init_lora_weights": True,
        }

    @classmethod
    def from_peft(cls, fields):
        """The configuration that such a file describes, or ValueError for what is not plain AdaLoRA."""
        if others := [name for name in NOT_PLAIN if fields.get(name)]:
            raise ValueError(f"the file uses {', '.join(others)}, which is not plain AdaLoRA")
        init_r, alpha = fields.get("init_r", 12), fields.get("lora_alpha", 8)
        tinit, tfinal = fields.get("tinit", 0), fields.get("tfinal", 0)
        pattern = fields.get("rank_pattern") or {}
        if not isinstance(pattern, Mapping) or not all(isinstance(kept, list) for kept in pattern.values()):
            raise ValueError(f"rank_pattern is {pattern!r}; it must be a dict with a list of true and false per layer")
        return cls(
            total_steps=fields.get("total_step") or tinit + tfinal + 1,  # older files may say null
            init_r=init_r,
            target_r=fields.get("target_r", 8),
            alpha=init_r if settings.is_number(alpha) and alpha <= 0 else alpha,
            tinit=tinit,
            tfinal=tfinal,
            delta_t=fields.get("deltaT", 1),
            beta1=fields.get("beta1", 0.85),
            beta2=fields.get("beta2", 0.85),
            orth_weight=fields.get("orth_reg_weight", 0.5),
            dropout=fields.get("lora_dropout", 0.0),
            rank_pattern={re.escape(name.removesuffix(".lora_E")): sum(kept) for name, kept in pattern.items()},
            bias=fields.get("bias", "none"),
            **settings.peft_targets(fields),
        )


def pattern(layer):
    """Which of its first triplets a layer has kept, a list of bools."""
    if layer.kept is None:
        return [True] * layer.r + [False] * (layer.r_init - layer.r)
    return layer.kept.tolist()
