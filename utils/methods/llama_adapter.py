"""LLaMA-Adapter: Efficient Fine-tuning with Zero-init Attention (Zhang et al. 2023, https://arxiv.org/abs/2303.16199).

    o = W_o [ softmax(q k^T / sqrt(hd)) v  +  g softmax(q k_P^T / sqrt(hd)) v_P ]      k_P = W_k P   v_P = W_v P

    P (K, d)     the prompt of one layer: K learned vectors, in place of tokens' hidden states; starts at N(0, 1)
    g            its gate, starts at zero: the first forward pass is the base model's, and at first only g moves
    q            the layer's queries, with their positions rotated in; the prompt's keys have no position
    K d + 1      numbers trained per layer, or K d + heads with a gate per head

The two softmaxes are apart, so that the tokens' attention weights keep their sum of 1 whatever the prompt does. Only
the upper layers have a prompt. It is seen at every step of generation, and the cache does not grow by it. What is
added depends on the queries, hence on the text: it is no change of a weight and cannot be merged.

The two codes differ in the gate, and their trained numbers cannot be exchanged:
    "scalar"          g is one number per layer, as PEFT has it
    "tanh-per-head"   g = tanh(gate), one gate per head: the authors' code for training

PEFT knows Llama, Mistral and GPT-2. It divides d by the width of W_k to count the heads that share a key, and fails
where heads * hd is not d (Gemma, Qwen3); here the heads are counted. Under GPT-2 it adds the prompt's part behind W_o
(c_proj) instead of before it; "scalar" does the same there, to mean the same by a file, and "tanh-per-head" does not.

Worked example: Llama-7B has 32 layers and d = 4096. K = 10 in the upper 30: 30 * (10 * 4096 + 1) = 1,228,830 numbers,
the paper's 1.2 million.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from utils.methods import settings
from utils.methods.attention import AttentionGuest, attention_modules
from utils.methods.families import family_of
from utils.methods.parts import adapter_dtype, core_of

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2", "opt")

# ---------------------------------------------------------------------------------------------- the equations


def gated_prompt_attention(q, k_P, v_P, gate, scaling=None):
    """What the prompt adds to the output of the heads: g softmax(q k_P^T s) v_P (Zhang et al. 2023, eq. 6 to 9).

    q: (b, heads, n, hd)   k_P, v_P: (kv_heads, K, hd); heads / kv_heads queries in a row share a key
    gate: (1,) or (heads,), the factor itself   scaling: s, None for 1 / sqrt(hd)
    returns (b, heads, n, hd)
    """
    shared = q.shape[1] // k_P.shape[0]
    k_P = k_P * (q.shape[-1] ** -0.5 if scaling is None else scaling)  # before the product: it could overflow float16
    k_P, v_P = k_P.repeat_interleave(shared, 0), v_P.repeat_interleave(shared, 0)  # (heads, K, hd)
    weights = (q @ k_P.mT).softmax(-1)  # (b, heads, n, K)
    return (gate.view(-1, 1, 1) * weights) @ v_P


def gate_factor(gate, rule):
    """The factor g of a trained gate.

    gate: (1,) or (heads,)   rule: "scalar" (g is the gate) or "tanh-per-head" (g = tanh(gate), between -1 and 1)
    raises ValueError for any other rule
    """
    if rule == "scalar":
        return gate
    if rule == "tanh-per-head":
        return torch.tanh(gate)
    raise ValueError(f"gate is {rule!r}; it can be 'scalar' or 'tanh-per-head'")


def upper_layers(layers, adapter_layers=None):
    """The numbers of the layers with a prompt, counted from 0.

    layers: how many the model has   adapter_layers: how many from the top; None for all but the first two, at least one
    raises ValueError for more than there are
    """
    if adapter_layers is None:
        adapter_layers = max(1, layers - 2)
    if adapter_layers > layers:
        raise ValueError(f"adapter_layers is {adapter_layers}, and this model has {layers} layers")
    return range(layers - adapter_layers, layers)


def llama_adapter_num_params(adapter_layers, d, adapter_len=10, gates=1):
    """How many numbers are trained: adapter_layers (K d + gates).

    d: width of the hidden states   adapter_len: K   gates: per layer, 1 or the number of heads
    """
    return adapter_layers * (adapter_len * d + gates)


# ------------------------------------------------------------------------------------------------- the module


class GatedPrompt(AttentionGuest):
    """The prompt and the gate of one layer. host: its attention   q, k, v: what its projections are called there"""

    why_not = "adds what depends on the queries"

    def __init__(self, host, k, v, adapter_len, gate, gate_init=0.0, dtype=None):
        super().__init__()
        self.k, self.v, self.rule = k, v, gate
        core = core_of(host.get_submodule(k))
        heads = 1 if gate == "scalar" else host.config.num_attention_heads
        like = {"dtype": dtype or adapter_dtype(core), "device": core.weight.device}
        self.adaption_prompt = nn.Parameter(torch.empty(1, adapter_len, host.config.hidden_size, **like).normal_())
        self.adaption_gate = nn.Parameter(torch.full((heads,), gate_init, **like))
        self.after_projection = k == "c_attn" and gate == "scalar"  # PEFT's GPT-2
        self.waiting = None

    def attend(self, host, attention, query, key, value, mask, kwargs):
        output, weights = attention(query, key, value, mask, **kwargs)  # (b, n, heads, hd)
        k_P, v_P = self.keys_and_values(host, query.dtype, query.shape[-1])
        gate = gate_factor(self.adaption_gate, self.rule).to(query.dtype)
        added = gated_prompt_attention(query, k_P, v_P, gate, kwargs.get("scaling")).transpose(1, 2)
        if self.after_projection:
            self.waiting = added.flatten(2)  # (b, n, d)
            return output, weights
        return output + added, weights

    def keys_and_values(self, host, dtype, head_dim):
        """k_P and v_P, each (kv_heads, K, hd): as the layer makes them of a hidden state, but for the position."""
        prompt = self.adaption_prompt.to(dtype)
        if self.k == self.v:  # GPT-2's c_attn
            _, k_P, v_P = host.get_submodule(self.k)(prompt).chunk(3, dim=-1)
        else:
            k_P, v_P = host.get_submodule(self.k)(prompt), host.get_submodule(self.v)(prompt)
        k_P, v_P = (t.view(t.shape[1], -1, head_dim) for t in (k_P, v_P))  # (K, kv_heads, hd)
        if hasattr(host, "k_norm"):  # Qwen3 normalises every head's keys before it rotates them
            k_P = host.k_norm(k_P)
        return k_P.transpose(0, 1).to(dtype), v_P.transpose(0, 1).to(dtype)

    def after(self, host, args, kwargs, output):
        if not self.after_projection:
            return output
        added, self.waiting = self.waiting, None
        return (output[0] + added, *output[1:])

    def tensors(self):
        return {"adaption_prompt": self.adaption_prompt, "adaption_gate": self.adaption_gate}

    def facts(self):
        _, adapter_len, d = self.adaption_prompt.shape
        return f"prompt of {adapter_len} x {d}, gate {self.rule}"


# ---------------------------------------------------------------------------------------------- the configuration


@dataclass(frozen=True)
class LlamaAdapter:
    """What to attach. Trains K d + 1 numbers in each of the upper layers (Zhang et al. 2023, arXiv:2303.16199).

    adapter_len      K, the vectors of a layer's prompt
    adapter_layers   how many layers, from the top, have one; None: all but the first two, at least one
    gate             "scalar" (PEFT's) or "tanh-per-head" (the authors'; written in a file format of our own)
    gate_init        where the gates start; at 0 the first forward pass is the base model's
    modules_to_save  modules trained whole and saved; None: the classification head, if the model has one
    dtype            of prompts and gates; None: float32 over a half-precision base, else the base's
    """

    adapter_len: int = 10
    adapter_layers: int | None = None
    gate: str = "scalar"
    gate_init: float = 0.0
    modules_to_save: tuple[str, ...] | None = None
    dtype: torch.dtype | None = None

    peft_type = "ADAPTION_PROMPT"

    def __post_init__(self):
        settings.whole("adapter_len", self.adapter_len)
        if self.adapter_layers is not None:
            settings.whole("adapter_layers", self.adapter_layers)
        settings.one_of("gate", self.gate, ("scalar", "tanh-per-head"))
        if not settings.is_number(self.gate_init) or not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init is {self.gate_init!r}; it must be a number")
        settings.float_dtype("dtype", self.dtype)
        whole = settings.names("modules_to_save", self.modules_to_save, or_regex=False)
        object.__setattr__(self, "modules_to_save", whole)  # the dataclass is frozen
        if self.gate != "scalar":
            object.__setattr__(self, "peft_type", None)  # PEFT has no such gate, hence no file for it

    def parts(self, model):
        """{path: GatedPrompt} for the attention of the upper layers."""
        family, *others = family_of(model, "LLaMA-Adapter")
        if others or model.config.model_type not in DECODERS:
            raise ValueError(
                "LLaMA-Adapter is for decoders, whose queries it meets in causal self-attention; "
                f"{type(model).__name__} is none of {', '.join(DECODERS)}"
            )
        paths = attention_modules(model, "LLaMA-Adapter")
        k, v = (name.removeprefix(family.attention + ".") for name in (family.k, family.v))
        form = (k, v, self.adapter_len, self.gate, self.gate_init, self.dtype)
        chosen = [paths[i] for i in upper_layers(len(paths), self.adapter_layers)]
        return {path: GatedPrompt(core_of(model.get_submodule(path)), *form) for path in chosen}

    # ---- PEFT's file

    def to_peft(self, adapter):
        """The fields of adapter_config.json that are this method's own."""
        prompts = [path for path, part in adapter.parts.items() if isinstance(part, GatedPrompt)]
        return {
            "adapter_len": self.adapter_len,
            "adapter_layers": len(prompts),
            "target_modules": prompts[0].rsplit(".", 1)[-1],
        }

    @classmethod
    def from_peft(cls, fields):
        """The configuration that such a file describes."""
        return cls(
            adapter_len=fields.get("adapter_len"),
            adapter_layers=fields.get("adapter_layers"),
            modules_to_save=fields.get("modules_to_save") or (),
        )
