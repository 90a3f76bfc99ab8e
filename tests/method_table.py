"""The table of methods that the matrix of invariants runs over: a method joins with one row.

A configuration here makes an adapter that is not the identity once `move` has shifted its numbers by a little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from small_models import ALL, DECODERS, ENCODERS, OPEN_ATTENTION, WITH_BIASES, names

from utils import (
    IA3,
    MAM,
    AdaLoRA,
    BitFit,
    DoRA,
    HoulsbyAdapter,
    LlamaAdapter,
    LoRA,
    ParallelAdapter,
    PfeifferAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    UniPELT,
)

TIED = ("gemma", "gpt2", "opt", "t5")  # the embedding is the output layer's weight too


@dataclass(frozen=True)
class Method:
    """config: Names of an architecture -> configuration   on: the architectures   mergeable: those where it can be

    longer: how many positions it adds to the input
    """

    config: Callable
    on: tuple = ALL
    mergeable: tuple = ()
    longer: int = 0


START = {"r": 3, "alpha": 2, "init": "random_b"}
BUDGET = {"init_r": 4, "target_r": 2, "alpha": 2, "total_steps": 9, "init": "random_e"}
METHODS = {
    "lora": Method(lambda n: LoRA(targets=n.attention, **START), mergeable=ALL),
    "lora everywhere": Method(
        lambda n: LoRA(targets="all-linear", scaling="rslora", dropout=0.2, **START), mergeable=ALL
    ),
    "lora and biases": Method(
        lambda n: LoRA(targets=n.attention, bias="all", **START), on=WITH_BIASES, mergeable=WITH_BIASES
    ),
    "lora and a module": Method(lambda n: LoRA(targets=n.attention, modules_to_save=(n.norm,), **START), mergeable=ALL),
    "lora on embeddings": Method(
        lambda n: LoRA(targets=(n.embedding, *n.attention), **START), mergeable=tuple(a for a in ALL if a not in TIED)
    ),
    "dora": Method(lambda n: DoRA(targets=n.attention, **START), mergeable=ALL),
    "dora everywhere": Method(
        lambda n: DoRA(targets="all-linear", scaling="rslora", dropout=0.2, **START), mergeable=ALL
    ),
    "dora on embeddings": Method(
        lambda n: DoRA(targets=(n.embedding, *n.attention), dropout=0.2, dropout_on="update", **START),
        mergeable=tuple(a for a in ALL if a not in TIED),
    ),
    "adalora": Method(lambda n: AdaLoRA(targets=n.attention, **BUDGET), mergeable=ALL),
    "adalora everywhere": Method(lambda n: AdaLoRA(targets="all-linear", dropout=0.2, **BUDGET), mergeable=ALL),
    "adalora finished": Method(
        lambda n: AdaLoRA(targets=n.attention, rank_pattern={r".*\.0\..*": 1}, **BUDGET),
        on=("llama_gqa", "gpt2", "t5"),
        mergeable=("llama_gqa", "gpt2", "t5"),
    ),
    "houlsby": Method(lambda n: HoulsbyAdapter(init="bert")),
    "houlsby without norms": Method(lambda n: HoulsbyAdapter(layer_norms=False, dropout=0.2, init="bert")),
    # no relu: of three one may be silent everywhere, and then nothing of it is trained
    "pfeiffer": Method(lambda n: PfeifferAdapter(size=3, activation="swish", init="bert")),
    "parallel": Method(lambda n: ParallelAdapter(init="bert")),
    "parallel on the residual": Method(lambda n: ParallelAdapter(scale="learned", reads="residual", init="bert")),
    "llama-adapter": Method(lambda n: LlamaAdapter(adapter_len=5, gate_init=0.5), on=DECODERS),
    "llama-adapter as its authors": Method(
        lambda n: LlamaAdapter(adapter_len=5, adapter_layers=2, gate="tanh-per-head", gate_init=0.5),
        on=("llama_gqa", "gemma", "gpt2"),
    ),
    "prompt tuning": Method(lambda n: PromptTuning(num_virtual_tokens=5), longer=5),
    "p-tuning": Method(lambda n: PTuning(num_virtual_tokens=5), longer=5),
    "p-tuning through an lstm": Method(
        lambda n: PTuning(num_virtual_tokens=5, encoder="lstm", hidden=8, layers=1), longer=5
    ),
    "prefix": Method(lambda n: PrefixTuning(num_virtual_tokens=5), on=OPEN_ATTENTION),
    "prefix through a network": Method(lambda n: PrefixTuning(num_virtual_tokens=5, hidden=8), on=OPEN_ATTENTION),
    "p-tuning v2": Method(lambda n: PTuningV2(num_virtual_tokens=5), on=ENCODERS),
    "bitfit": Method(lambda n: BitFit(), on=WITH_BIASES, mergeable=WITH_BIASES),
    "ia3": Method(lambda n: IA3(), mergeable=ALL),
    "ia3 everywhere": Method(lambda n: IA3(targets="all-linear", feedforward=(n.mlp,)), mergeable=ALL),
    "mam": Method(lambda n: MAM(num_virtual_tokens=3, hidden=8, init="bert"), on=OPEN_ATTENTION),
    "mam with a flat prefix": Method(
        lambda n: MAM(num_virtual_tokens=3, hidden=None, scale="learned", init="bert", dropout=0.2),
        on=("llama_gqa", "bert"),
    ),
    "unipelt": Method(
        lambda n: UniPELT(
            num_virtual_tokens=3, hidden=8, size=4, r=3, adapter_init="bert", lora_init="random_b", dropout=0.2
        ),
        on=OPEN_ATTENTION,
    ),
}


def config_of(method, architecture):
    """The configuration of a method of the table for an architecture."""
    return METHODS[method].config(names(architecture))


# Llama and Mistral are llama_gqa but for the number of heads, and a variant differs from its method in few ways.
TWINS = ("llama", "mistral")
FEW = ("llama_gqa", "gpt2", "bert", "t5")
VARIANTS = {
    "lora and a module", "lora on embeddings", "dora everywhere", "dora on embeddings", "adalora everywhere",
    "houlsby without norms", "parallel on the residual", "p-tuning through an lstm", "prefix through a network",
    "ia3 everywhere",
}  # fmt: skip


def architectures(name):
    """Those that a method of the table is put through."""
    on = METHODS[name].on
    if name in VARIANTS:
        return [a for a in on if a in FEW]
    return [a for a in on if a not in TWINS or name == "lora"]


MATRIX = [pytest.param(m, a, id=f"{m}-{a}") for m in METHODS for a in architectures(m)]
