"""The table of methods that the matrix of invariants runs over: a method joins with one row.

A configuration here makes an adapter that is not the identity once `move` has shifted its numbers by a little.
"""

from collections.abc import Callable
from dataclasses import dataclass

from small_models import ALL, WITH_BIASES, names

from utils import IA3, BitFit, LoRA

TIED = ("gemma", "gpt2", "opt", "t5")  # the embedding is the output layer's weight too


@dataclass(frozen=True)
class Method:
    """config: Names of an architecture -> configuration   on: the architectures   mergeable: those where it can be"""

    config: Callable
    on: tuple = ALL
    mergeable: tuple = ()


START = {"r": 3, "alpha": 2, "init": "random_b"}
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
    "bitfit": Method(lambda n: BitFit(), on=WITH_BIASES, mergeable=WITH_BIASES),
    "ia3": Method(lambda n: IA3(), mergeable=ALL),
    "ia3 everywhere": Method(lambda n: IA3(targets="all-linear", feedforward=(n.mlp,)), mergeable=ALL),
}


def config_of(method, architecture):
    """The configuration of a method of the table for an architecture."""
    return METHODS[method].config(names(architecture))
