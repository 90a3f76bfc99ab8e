"""The methods of this package by name, and which of them a PEFT file means. Imports a method's file when it is used."""

import importlib

from utils.methods.settings import one_of

HOME = {
    "LoRA": "utils.methods.lora",
    "DoRA": "utils.methods.dora",
    "AdaLoRA": "utils.methods.adalora",
    "HoulsbyAdapter": "utils.methods.houlsby",
    "PfeifferAdapter": "utils.methods.pfeiffer",
    "ParallelAdapter": "utils.methods.parallel",
    "LlamaAdapter": "utils.methods.llama_adapter",
    "PromptTuning": "utils.methods.prompt",
    "PTuning": "utils.methods.ptuning",
    "PrefixTuning": "utils.methods.prefix",
    "PTuningV2": "utils.methods.ptuning_v2",
    "BitFit": "utils.methods.bitfit",
    "IA3": "utils.methods.ia3",
    "MAM": "utils.methods.mam",
    "UniPELT": "utils.methods.unipelt",
}


def method(name):
    """The configuration class called `name`."""
    return getattr(importlib.import_module(HOME[name]), name)


def methods():
    """All configuration classes, in the order of the course."""
    return [method(name) for name in HOME]


def peft_method(fields):
    """The configuration class that an adapter_config.json means.

    fields: its content, a dict   raises ValueError for a type that is not one of ours
    """
    kind = fields.get("peft_type")
    if kind == "LORA" and one_of("use_dora", fields.get("use_dora"), (None, False, True)):
        return method("DoRA")
    known = {}
    for cls in methods():
        known.setdefault(getattr(cls, "peft_type", None), cls)  # the first of a type is the plain one
    known.pop(None, None)
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"peft_type is {kind!r}; this version reads {', '.join(map(repr, sorted(known)))}")
    return known[kind]
