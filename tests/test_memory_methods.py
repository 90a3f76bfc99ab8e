"""What the course's methods keep for the backward pass: the formulas against a count, equal to the byte."""

import itertools

import pytest
import torch
import transformers as tf
from test_memory_activations import BERT, MODELS, SIZES, TOKENS, loss_of, make, of_today

from utils import (
    IA3,
    AdaLoRA,
    BitFit,
    DoRA,
    HoulsbyAdapter,
    LoRA,
    ParallelAdapter,
    PfeifferAdapter,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    attach,
)
from utils.measure import saved_bytes
from utils.memory.activations import Run
from utils.memory.blocks import Activation, Block, activations
from utils.memory.estimate import estimate, needs_of
from utils.memory.methods import lora
from utils.memory.shapes import shape_of
from utils.methods.llama_adapter import LlamaAdapter
from utils.methods.mam import MAM
from utils.methods.unipelt import UniPELT

METHODS = {
    "LoRA": LoRA(r=2, dropout=0.1),
    "DoRA": DoRA(r=2),
    "DoRA, dropout": DoRA(r=2, dropout=0.1, targets="all-linear"),
    "AdaLoRA": AdaLoRA(total_steps=100, init_r=3, target_r=2),
    "IA3": IA3(),
    "BitFit": BitFit(),
    "Houlsby": HoulsbyAdapter(size=4),
    "Houlsby, norms frozen": HoulsbyAdapter(size=4, layer_norms=False, activation="relu", dropout=0.2),
    "Pfeiffer": PfeifferAdapter(size=4),
    "Parallel": ParallelAdapter(size=4),
    "Parallel, scale learned": ParallelAdapter(size=4, scale="learned", reads="residual", activation="swish"),
    "Prompt Tuning": PromptTuning(num_virtual_tokens=5),
    "P-Tuning": PTuning(num_virtual_tokens=5),
    "Prefix Tuning": PrefixTuning(num_virtual_tokens=5),
    "Prefix Tuning, network": PrefixTuning(num_virtual_tokens=5, hidden=7, dropout=0.1),
    "P-Tuning v2": PTuningV2(num_virtual_tokens=5),
    "LLaMA-Adapter": LlamaAdapter(adapter_len=4, adapter_layers=2),
    "LLaMA-Adapter, gates": LlamaAdapter(adapter_len=4, gate="tanh-per-head"),
    "MAM": MAM(num_virtual_tokens=4, hidden=6),
    "UniPELT": UniPELT(hidden=6),
    "UniPELT, dropout": UniPELT(hidden=None, dropout=0.1),
}
LACKS = {
    "llama_gqa": ("BitFit", "P-Tuning v2"),  # no biases, no head
    "gpt2": ("P-Tuning v2",),
    "bert": ("LLaMA-Adapter", "LLaMA-Adapter, gates"),  # for decoders
}
KINDS = list(itertools.product(("sdpa", "eager"), (torch.float32, torch.bfloat16)))
CASES = [(name, method, *kind) for name, lacks in LACKS.items() for method in METHODS if method not in lacks
         for kind in KINDS]  # fmt: skip
OTHERS = [(name, method, "sdpa", torch.bfloat16) for name in ("gemma", "mistral", "opt", "qwen2")
          for method in ("LoRA", "IA3", "Houlsby", "Prompt Tuning", "Prefix Tuning")]  # fmt: skip
BATCHES = ((3, 11), (1, 40))


def test_there_are_enough_cases():
    assert len(BATCHES) * len(CASES + OTHERS) >= 200


@of_today
@pytest.mark.parametrize("name, method, attention, dtype", CASES + OTHERS)
def test_formulas_equal_the_count(name, method, attention, dtype):
    model = make(name, attention, dtype)
    attach(model, METHODS[method])
    model.train()
    shape = shape_of(model)
    ends, blocks = needs_of(model, shape)
    for batch in BATCHES:
        _, loss = loss_of(model, *batch)
        kept = activations(shape, Run(*batch, ends, dtype.itemsize, attention, blocks=blocks))
        assert kept.total == saved_bytes(loss, exclude=[model])


def test_lora_by_hand():
    """Three tokens of width 8 in half precision: x, and a byte for each number of dropout's mask."""
    model = make("llama_gqa", "sdpa", torch.bfloat16)
    part = attach(model, LoRA(r=2, dropout=0.1)).parts["model.layers.0.self_attn.q_proj"]
    shape = shape_of(model)
    block = Block(Run(1, 3, needs_of(model, shape)[0], e=2), shape, False)
    x, y = Activation(3 * 8, False), Activation(3 * 16, False)
    assert lora(block, part, x, y).flows and not y.flows
    assert block.terms == {"linear inputs": 2 * 24, "adapters": 24}
    lora(block, part, x, y)  # k reads the same x, which is kept already
    assert block.terms == {"linear inputs": 2 * 24, "adapters": 48}


MORE = {
    "roberta": (tf.RobertaForSequenceClassification, tf.RobertaConfig(**BERT | {"pad_token_id": 0})),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config(**SIZES | TOKENS, num_key_value_heads=2, head_dim=8)),
}


@of_today
@pytest.mark.parametrize("method", [None, "LoRA", "Houlsby", "Prompt Tuning"])
@pytest.mark.parametrize("name", MORE)
def test_two_more_families(name, method, monkeypatch):
    """RoBERTa's head reads all last hidden states and has its own positions per row; Qwen3 has norms per head."""
    monkeypatch.setitem(MODELS, name, lambda: MORE[name])
    for dtype in (torch.float32, torch.bfloat16):
        model = make(name, "sdpa", dtype)
        if method:
            attach(model, METHODS[method])
            model.train()
        shape = shape_of(model)
        ends, blocks = needs_of(model, shape)
        _, loss = loss_of(model, 3, 11)
        kept = activations(shape, Run(3, 11, ends, dtype.itemsize, blocks=blocks))
        assert kept.total == saved_bytes(loss, exclude=[model])


def test_a_switched_off_adapter_keeps_nothing():
    model = make("llama_gqa", "sdpa", torch.float32)
    adapter = attach(model, LoRA())
    shape = shape_of(model)
    with adapter.disabled():
        ends, blocks = needs_of(model, shape)
    assert not ends.parts and not any(block.parts for block in blocks)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_an_estimate(method):
    """Of a real size, on the meta device."""
    name = "BERT-base" if method == "P-Tuning v2" else "OPT-125m"
    kwargs = {"batch": 2, "length": 128}
    if method == "P-Tuning v2":
        from utils.architectures import architecture

        name = architecture(name, "BertForSequenceClassification", num_labels=2)
    predicted = estimate(name, METHODS[method], **kwargs)
    assert 0 < predicted.trained < predicted.total / 2
    assert predicted.peak > sum(predicted.states.values()) + sum(predicted.kept.values())
