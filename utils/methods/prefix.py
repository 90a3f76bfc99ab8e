"""Prefix Tuning: Optimizing Continuous Prompts for Generation (Li & Liang 2021, https://arxiv.org/abs/2101.00190).

    head = softmax(q [P_k; K]^T s) [P_v; V]        in every layer's self-attention, s = 1 / sqrt(hd)

P_k, P_v (l, d_kv)     trained keys and values of l virtual tokens, one pair for each of the L layers
K, V (m, d_kv)         those of the real tokens; d_kv = kv_heads hd
2 L l d_kv             numbers, trained as they are ("flat"), or as the output of a small network that is thrown away
                       after training (the paper's way: a flat prefix was unstable):

    P = tanh(E W1^T + b1) W2^T + b2        E (l, d)   W1 (h, d)   b1 (h,)   W2 (2 L d_kv, h)   b2 (2 L d_kv,)

Nothing is rotated into P_k (RoPE), and the real tokens stand at positions l, l + 1, ... as if the prefix were text.

Worked example: GPT-2 medium has 24 layers of width 1024. A prefix of l = 10 holds 2 x 24 x 10 x 1024 = 491,520
numbers, 0.14 % of the model. With h = 512 and d = 1024 the network trains 25,750,016 numbers to make them.

Beside PEFT's prefix tuning, which puts the prefix into the cache: here each layer's attention puts it in front of its
keys and values. So gradient checkpointing works (there the recomputation fills the cache once more), the network runs
once and not once per sample, the cache holds real tokens only, and a switched-off prefix leaves BERT usable (there
disable_adapter ends in an UnboundLocalError). A sliding window never loses sight of the prefix (there it does). In an
encoder-decoder both put it into the decoder's self-attention. PEFT shares out the pairs there as if cross-attention
had its own, so that layer i gets pair 2i mod L; here too, because the file is PEFT's, but the others are not trained.

A prefix is no change of a weight, so it cannot be merged: it costs its l keys in every layer for good.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils.methods import settings
from utils.methods.attention import AttentionGuest, attention_modules, widen_mask
from utils.methods.families import family_of, own_modules
from utils.methods.layers import linear_shape
from utils.methods.parts import Guest, adapter_dtype, core_of

# ---------------------------------------------------------------------------------------------- the equations


def prefix_key_values(prompt_embeddings, layers, heads):
    """A prefix as PEFT stores it, taken apart: virtual token by virtual token, each layer's key and then its value.

    prompt_embeddings: (l, 2 L d_kv)   layers: L   heads: how many d_kv is divided among
    returns L pairs of a key and a value, each (heads, l, hd)
    raises ValueError if the width is no multiple of 2 L heads
    """
    length, width = prompt_embeddings.shape
    if width % (2 * layers * heads):
        raise ValueError(f"{width} columns cannot be {layers} keys and values of {heads} heads each")
    by_slot = prompt_embeddings.view(length, 2 * layers, heads, -1).permute(1, 2, 0, 3)  # (2 L, heads, l, hd)
    return list(zip(by_slot[0::2], by_slot[1::2], strict=True))


def prefix_attention(query, key, value, prefix_key, prefix_value, scaling):
    """Attention with a prefix in front of the keys and values (Li & Liang 2021). No mask.

    query: (..., n, hd)   key, value: (..., m, hd)   prefix_key, prefix_value: (..., l, hd)   scaling: float
    returns (..., n, hd)
    """
    key = torch.cat([prefix_key, key], dim=-2)  # (..., l + m, hd)
    value = torch.cat([prefix_value, value], dim=-2)
    weights = (query @ key.mT * scaling).softmax(dim=-1)
    return weights @ value


def prefix_as_gate(query, key, value, prefix_key, prefix_value, scaling):
    """The same attention as a gated sum (He et al. 2022, https://arxiv.org/abs/2110.04366, eq. 7).

        (1 - lambda) softmax(q K^T s) V + lambda softmax(q P_k^T s) P_v

    lambda is the part of q's attention that goes to the prefix: a prefix works like an adapter beside attention, its
    l rows a bottleneck of width l, softmax its nonlinearity. Arguments as for `prefix_attention`.
    returns lambda (..., n, 1), attention to the text and attention to the prefix, both (..., n, hd)
    """
    text, prefix = query @ key.mT * scaling, query @ prefix_key.mT * scaling  # (..., n, m), (..., n, l)
    gate = torch.sigmoid(prefix.logsumexp(-1, keepdim=True) - text.logsumexp(-1, keepdim=True))
    return gate, text.softmax(-1) @ value, prefix.softmax(-1) @ prefix_value


def prefix_mlp(E, W1, b1, W2, b2):
    """The network that makes a prefix: tanh(E W1^T + b1) W2^T + b2.

    E: (l, d)   W1: (h, d)   b1: (h,)   W2: (2 L d_kv, h)   b2: (2 L d_kv,)
    returns (l, 2 L d_kv)
    """
    return torch.tanh(E @ W1.T + b1) @ W2.T + b2


def prefix_num_params(num_virtual_tokens, layers, d_kv, hidden=None, d=None):
    """How many numbers prefix tuning trains.

    d_kv: width of a token's keys, kv_heads hd   hidden: h of the network, None: a flat prefix   d: of E, None: d_kv
    returns 2 L l d_kv, or with the network l d + h d + h + 2 L d_kv (h + 1), an int
    """
    width = 2 * layers * d_kv
    if hidden is None:
        return num_virtual_tokens * width
    d = d_kv if d is None else d
    return num_virtual_tokens * d + hidden * d + hidden + width * (hidden + 1)


# ------------------------------------------------------------------------------------------------- the modules


class Prefix(Guest):
    """The trained numbers of all layers, at the model's root. Layers use pairs (P_k, P_v) by their slot in PEFT's file.

    Each pair's numbers are a tensor of their own: the gradient of a slice would be as large as the whole.
    """

    why_not = "adds keys and values, and is no change of a weight"
    nameless = True  # the file calls it prompt_embeddings, without a path

    def __init__(self, num_virtual_tokens, d_kv, slots, used, hidden=None, init_std=1.0, **like):
        """slots: pairs in the file   used: the numbers of those in use   like: dtype and device"""
        super().__init__()
        self.shape, self.slots, self.used = (num_virtual_tokens, d_kv), slots, sorted(used)
        self.mlp = hidden is not None
        if self.mlp:
            self.embedding = nn.Parameter(torch.empty(num_virtual_tokens, d_kv, **like))
            self.inner = nn.Linear(d_kv, hidden, **like)
            self.pairs = nn.ModuleDict({str(i): nn.Linear(hidden, 2 * d_kv, **like) for i in self.used})
            start = [self.embedding]
        else:
            empty = torch.empty(num_virtual_tokens, 2 * d_kv, **like)
            self.pairs = nn.ParameterDict({str(i): nn.Parameter(empty.clone()) for i in self.used})
            start = self.pairs.values()
        for tensor in start:
            nn.init.normal_(tensor, std=init_std)

    def pair(self, slot):
        """(l, 2 d_kv): P_k and P_v beside each other, made anew wherever they are asked for."""
        rows = self.pairs[str(slot)]
        if self.mlp:
            rows = prefix_mlp(self.embedding, self.inner.weight, self.inner.bias, rows.weight, rows.bias)
        return rows

    def tensors(self):
        """The trained tensors: flat pairs, or the network's."""
        return dict(self.named_parameters())

    def exported(self):
        """PEFT's one tensor; pairs that no layer uses are zero."""
        length, d_kv = self.shape
        with torch.no_grad():
            pairs = {i: self.pair(i) for i in self.used}
            unused = torch.zeros_like(pairs[self.used[0]])
            return {"prompt_embeddings": torch.cat([pairs.get(i, unused) for i in range(self.slots)], dim=1)}

    def training_state(self):
        return self.tensors() if self.mlp else {}

    def load(self, tensors, state, trainable):
        """A prefix whose network is not in the files (PEFT never writes it) goes on as a flat one."""
        prompt = tensors["prompt_embeddings"]
        if self.mlp and state:
            for name, own in self.tensors().items():
                own.copy_(state[name])
            made = self.exported()["prompt_embeddings"]
            if (made - prompt.to(made)).norm() > 0.01 * made.norm():  # further apart than bfloat16's rounding
                raise ValueError("the network in training_state.safetensors makes another prefix than the file holds")
            return
        if self.mlp:
            like, self.mlp = self.embedding, False
            del self.embedding, self.inner
            empty = {str(i): nn.Parameter(like.new_empty(like.shape[0], 2 * like.shape[1])) for i in self.used}
            self.pairs = nn.ParameterDict(empty)
        for i, rows in zip(range(self.slots), prompt.split(2 * self.shape[1], dim=1), strict=True):
            if i in self.used:
                self.pairs[str(i)].copy_(rows)

    def facts(self):
        length, d_kv = self.shape
        kind = f"made by a network of width {self.inner.out_features}" if self.mlp else "flat"
        return f"{length} virtual tokens, {kind}: {len(self.used)} pairs of ({length}, {d_kv})"


class PrefixAttention(AttentionGuest):
    """Puts one pair of a Prefix in front of the keys and values of its host."""

    def __init__(self, prefix, slot, dropout=0.0):
        super().__init__()
        self.prefix = (prefix,)  # in a tuple, so that it is not a child of every layer
        self.slot, self.dropout = slot, dropout

    def attend(self, host, attention, query, key, value, mask, kwargs):
        prefix_key, prefix_value = self.key_value(key)
        mask = widen_mask(mask, prefix_key.shape[2], host, query, key, kwargs)
        key, value = torch.cat([prefix_key, key], dim=2), torch.cat([prefix_value, value], dim=2)
        return attention(query, key, value, mask, **kwargs)

    def key_value(self, key):
        """P_k and P_v, each (b, heads, l, hd), for keys of the shape (b, heads, m, hd)."""
        rows = self.prefix[0].pair(self.slot).to(key)  # (l, 2 d_kv)
        batch, heads, _, hd = key.shape
        by_head = rows.view(len(rows), 2, 1, heads, hd).permute(1, 2, 3, 0, 4)  # (2, 1, heads, l, hd)
        for_all = by_head.expand(-1, batch, -1, -1, -1)
        if self.dropout and self.training:
            for_all = F.dropout(for_all, self.dropout)  # another draw for each sample, as in P-Tuning v2's code
        return for_all.unbind()

    def tensors(self):
        return {}

    def facts(self):
        return "keys and values in front"


class BiasedPrefixAttention(PrefixAttention):
    """The same in T5, whose scores get a bias by distance: a prefix of l stands l tokens ahead of the text."""

    def __init__(self, prefix, slot, dropout, biases):
        """biases: the attention module that holds the biases of all layers"""
        super().__init__(prefix, slot, dropout)
        self.biases = (biases,)

    def before(self, host, args, kwargs):
        cache = kwargs.get("past_key_values")
        self.seen = 0 if cache is None else cache.get_seq_length(host.layer_idx)  # before this call's tokens join them
        return args, kwargs

    def attend(self, host, attention, query, key, value, mask, kwargs):
        length, text = self.prefix[0].shape[0], kwargs["position_bias"]  # (1, heads, n, m)
        bias = self.biases[0].compute_bias(query.shape[2], length, key.device, self.seen + length)  # (1, heads, n, l)
        kwargs = kwargs | {"position_bias": torch.cat([bias.to(text.dtype), text], dim=3)}
        return super().attend(host, attention, query, key, value, mask, kwargs)


class PositionShift(Guest):
    """Moves real tokens l positions on, in the module that makes something of positions. Padding stays padding."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def before(self, host, args, kwargs):
        if kwargs.get("position_ids") is not None:
            return args, kwargs | {"position_ids": self.shifted(host, kwargs["position_ids"])}
        return (*args[:-1], self.shifted(host, args[-1])), kwargs

    def shifted(self, host, positions):
        padding = -1 if hasattr(host, "offset") else getattr(host, "padding_idx", None)  # OPT's, RoBERTa's
        if isinstance(host, nn.Embedding):
            first = getattr(host, "offset", 0 if padding is None else padding + 1)
            room, n = host.num_embeddings - first, positions.shape[-1]
            if n + self.by > room:
                raise ValueError(f"{n} tokens and a prefix of {self.by} need more positions than the model's {room}")
        moved = positions + self.by
        return moved if padding is None else torch.where(positions == padding, positions, moved)

    def tensors(self):
        return {}

    def facts(self):
        return f"positions from {self.by} on"


# ---------------------------------------------------------------------------------------------- the configuration

POSITIONS = ("rotary_emb", "wpe", "embed_positions", "position_embeddings")  # the modules that positions go into


@dataclass(frozen=True)
class PrefixTuning:
    """What to attach. Trains 2 L l d_kv numbers (Li & Liang 2021, arXiv:2101.00190).

    num_virtual_tokens  l, the length of the prefix
    hidden              width h of the network that makes the prefix while it is trained; None: none, a flat prefix
    dropout             probability, on the prefix's keys and values, in training mode only
    init_std            of the normal start: of a flat prefix itself, of the network's input E otherwise
    modules_to_save     modules trained whole and saved; None: the classification head, if the model has one
    """

    num_virtual_tokens: int = 20
    hidden: int | None = None
    dropout: float = 0.0
    init_std: float = 1.0
    modules_to_save: tuple[str, ...] | None = None

    peft_type = "PREFIX_TUNING"
    default_task = "FEATURE_EXTRACTION"  # without a known head: PEFT ignores a prefix where no task is named
    file_prefix = "base_model."
    bare_names = ("prompt_embeddings",)

    def __post_init__(self):
        settings.whole("num_virtual_tokens", self.num_virtual_tokens)
        if self.hidden is not None:
            settings.whole("hidden", self.hidden)
        settings.probability("dropout", self.dropout)
        settings.positive("init_std", self.init_std)
        clean = settings.names("modules_to_save", self.modules_to_save, or_regex=False)
        object.__setattr__(self, "modules_to_save", clean)

    def parts(self, model):
        """{path: guest}: the numbers at the root, a guest in every layer, one where positions are used."""
        method = type(self).__name__
        paths, decoder = attention_modules(model, method), family_of(model, method)[-1]
        if decoder.cross:
            stack = decoder.layers(model)
            paths = [p for p in paths if any(p.startswith(layer + ".") for layer in stack)]
            if not paths:
                raise ValueError(f"{method} goes into a decoder, and this {type(model).__name__} has none")
        layers, d_kv = len(paths), self.width(model, decoder)
        slots = [2 * i % layers if decoder.cross else i for i in range(layers)]
        like = next(model.parameters())
        root = Prefix(
            self.num_virtual_tokens, d_kv, layers, set(slots), self.hidden, self.init_std,
            dtype=adapter_dtype(model), device=like.device,
        )  # fmt: skip
        parts = {"": root}
        for path, slot in zip(paths, slots, strict=True):
            if decoder.cross:
                first = core_of(model.get_submodule(paths[0]))
                parts[path] = BiasedPrefixAttention(root, slot, self.dropout, first)
            else:
                parts[path] = PrefixAttention(root, slot, self.dropout)
        positions = [p for p, _ in own_modules(model) if p.rsplit(".", 1)[-1] in POSITIONS]
        return parts | {p: PositionShift(self.num_virtual_tokens) for p in positions}

    @staticmethod
    def width(model, family):
        """d_kv: how wide a token's keys are, all heads together. ValueError if that differs between layers."""
        shapes = {linear_shape(core_of(model.get_submodule(f"{p}.{family.k}"))) for p in family.layers(model)}
        if len(shapes) > 1:
            raise ValueError(f"the layers' keys differ in width: {sorted(d_out for d_out, _ in shapes)}")
        d_out, _ = shapes.pop()
        return d_out // 3 if family.k == family.q else d_out  # GPT-2's one projection makes q, k and v

    # ---- PEFT's file

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are prefix tuning's own."""
        root, config = adapter.parts[""], adapter.model.config
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_layers": root.slots,
            "token_dim": root.shape[1],
            "num_attention_heads": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            "num_transformer_submodules": 2 if config.is_encoder_decoder else 1,
            "prefix_projection": root.mlp,
            "encoder_hidden_size": self.hidden if root.mlp else None,
        }

    @classmethod
    def from_peft(cls, fields):
        """The configuration that such a file describes."""
        return cls(
            num_virtual_tokens=fields.get("num_virtual_tokens"),
            hidden=fields.get("encoder_hidden_size") if fields.get("prefix_projection") else None,
            modules_to_save=settings.peft_targets(fields)["modules_to_save"],
        )
