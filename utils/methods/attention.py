"""Guests inside attention: a part that sees the queries, keys and values, and may change what becomes of them.

    out = softmax(q k^T s + mask) v          q (b, heads, n, hd)   k, v (b, kv_heads, m, hd)   s = scaling, 1/sqrt(hd)

Every attention module of transformers leaves this line to a function that it looks up by the name in its config, and
hands over q and k with the positions rotated in (RoPE) and k and v with the cache in front. While a guest lives in
such a module, its config is a copy that names a function of ours. That one finds the guests, lets each have its turn,
and calls the function the model meant. Without a guest that is on, it is the model's own call and nothing else.

A cache that puts more keys in front would be the other way in, and is PEFT's. It cannot reach the queries, which the
LLaMA-Adapter needs, it fills with every recomputation under gradient checkpointing, and it counts what it holds as
tokens of the text.

Worked example: 3 real tokens, a prefix of 2. Row i of the causal mask, whom token i may see, gets two ones in front:

    1 0 0         1 1  1 0 0
    1 1 0   ->    1 1  1 1 0
    1 1 1         1 1  1 1 1
"""

import inspect
import sys
from copy import copy
from functools import partial

import torch
import torch.nn.functional as F

from utils.methods.families import family_of
from utils.methods.parts import Guest, core_of

NAME = "with_guests"  # what a host's config calls `attention_with_guests`


class AttentionGuest(Guest):
    """A guest of a self-attention module. Subclasses write `attend`, which is called while it is on."""

    def attend(self, host, attention, query, key, value, mask, kwargs):
        """Compute the attention, by calling `attention` with something changed, or by changing what it returns.

        attention: called as attention(query, key, value, mask, **kwargs); what the model, or the guest before, computes
        query: (b, heads, n, hd)   key, value: (b, kv_heads, m, hd), the cached ones included
        mask: None, (b, 1, n, m) of bool or of numbers to add, or (b, m)   kwargs: dropout, scaling, position_bias, ...
        returns (b, n, heads, hd), and the weights (b, heads, n, m) or None
        """
        return attention(query, key, value, mask, **kwargs)

    def enter(self, model, path):
        super().enter(model, path)
        host = core_of(model.get_submodule(path))
        if not hasattr(host.config, "of_the_model"):
            register()
            config = copy(host.config)
            config.of_the_model = host.config
            config._attn_implementation_internal = NAME  # the plain name is a setter that reaches into sub-configs
            host.config = config

    def leave(self, model, path):
        super().leave(model, path)
        host = core_of(model.get_submodule(path))
        if not any(isinstance(child, AttentionGuest) for child in host.children()):
            host.config = host.config.of_the_model

    def __setstate__(self, state):
        super().__setstate__(state)
        register()  # a model that was pickled and comes alive in another process has entered already


def register():
    """Tell transformers what the name in a host's config means."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # there before, as the model is

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_with_guests)


def attention_with_guests(host, query, key, value, attention_mask, **kwargs):
    """What a host of attention guests calls in place of the model's own attention function, with the same arguments."""
    code, implementation = modeling(host), host.config.of_the_model._attn_implementation  # asked anew: it can be set
    own = code.ALL_ATTENTION_FUNCTIONS.get_interface(implementation, code.eager_attention_forward)
    attention = partial(own, host)
    for guest in host.children():
        if isinstance(guest, AttentionGuest) and guest.on:
            attention = partial(take_turn, guest, host, attention)
    return attention(query, key, value, attention_mask, **kwargs)


def take_turn(guest, host, attention, query, key, value, mask, **kwargs):
    """One guest's `attend`, called as an attention function."""
    return guest.attend(host, attention, query, key, value, mask, kwargs)


def modeling(host):
    """The module of transformers that defines the host: it has the table of attention functions."""
    return sys.modules[type(host).__module__]


def attention_modules(model, method):
    """The paths of all self-attention modules of a model, in its order: [path, ...]. A decoder's follow the encoder's.

    method: its name, for the message
    raises ValueError for a family without a row, or for attention that asks no table for its function
    """
    paths = [f"{p}.{family.attention}" for family in family_of(model, method) for p in family.layers(model)]
    for path in paths:
        host = core_of(model.get_submodule(path))
        forward = inspect.unwrap(type(host).forward)
        if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names or not hasattr(host, "config"):
            raise ValueError(
                f"{method} works inside attention, but {type(host).__name__} in this version of transformers computes "
                "it in one piece: a newer version may not"
            )
        if getattr(host, "reorder_and_upcast_attn", False):
            raise ValueError(f"{method} works inside attention, which reorder_and_upcast_attn computes in one piece")
    if not paths:
        raise ValueError(f"{method} found no layers in this {type(model).__name__}")
    return paths


def widen_mask(mask, width, host, query, key, kwargs):
    """The mask that fits when `width` keys, which every query may see, are put in front of the m there are.

    mask: None, (b or 1, 1, n, m) of bool or of numbers to add, or (b, m) of ones and zeros   width: int
    query: (b, heads, n, hd)   key: (b, kv_heads, m, hd)   kwargs: of the attention function
    returns a mask with width + m columns, or None where that still means the same
    raises ValueError for a mask that cannot be widened
    """
    implementation = host.config.of_the_model._attn_implementation
    if "flash" in implementation and kwargs.get("sliding_window") is not None:
        raise ValueError("flash attention with a sliding window would lose sight of keys in front: use 'sdpa'")
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(host, "is_causal", True) if causal is None else causal
        n, m = query.shape[2], key.shape[2]
        if implementation != "sdpa" or not causal or n == 1:
            return None  # no mask is meant, or one that flash attention lines up with the last key
        # sdpa lines its own causal mask up with the first key, which was a token's and is one of the new ones now
        mask = torch.ones(1, 1, n, m, dtype=torch.bool, device=key.device).tril()
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"{type(mask).__name__}s of {implementation} cannot be widened: use 'sdpa' or 'eager'")
    ones = mask.dtype == torch.bool or mask.ndim == 2
    return F.pad(mask, (width, 0), value=True if ones else 0.0)
