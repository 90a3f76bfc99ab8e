"""LoRA+: which tensor gets which learning rate, by hand and against PEFT's optimizer."""

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from peft_pair import QUIET, their_tensors
from small_models import ENCODERS, backward, logits, names, small_model

from utils import IA3, BitFit, LoRA, attach, lora_plus_groups
from utils.checkpoint import file_tensors
from utils.methods.lora_plus import lora_plus_group

pytestmark = QUIET


def test_groups_by_name():
    assert lora_plus_group("h.0.c_attn.lora_A.weight", 2) == "A"
    assert lora_plus_group("h.0.c_attn.lora_B.weight", 2) == "B"
    assert lora_plus_group("h.0.c_attn.lora_E", 2) == "A"
    assert lora_plus_group("wte.lora_embedding_A", 2) == lora_plus_group("wte.lora_embedding_B", 2) == "embedding"
    assert lora_plus_group("h.0.c_attn.lora_magnitude_vector", 1) == "magnitude"
    assert lora_plus_group("h.0.c_attn.bias", 1) == "vectors"
    assert lora_plus_group("classifier.weight", 2) == "A"


def groups_of(adapter, *args, **kwargs):
    """name of the group -> (lr, weight decay, names of what is in it)"""
    names = {id(p): n for n, p in adapter.named_parameters()}
    groups = lora_plus_groups(adapter, *args, **kwargs)
    return {g["name"]: (g["lr"], g["weight_decay"], [names[id(p)] for p in g["params"]]) for g in groups}


def test_rates_by_hand():
    adapter = attach(small_model("llama"), LoRA(r=2, targets=("q_proj",), layers=(0,)))
    path = "model.layers.0.self_attn.q_proj"
    assert groups_of(adapter, 1e-4) == {
        "A": (1e-4, 0.0, [f"{path}.lora_A.weight"]),
        "B": (16 * 1e-4, 0.0, [f"{path}.lora_B.weight"]),
    }
    assert groups_of(adapter, 1e-4, ratio=4, weight_decay=0.1)["B"][:2] == (4e-4, 0.1)


def test_one_step_moves_b_sixteen_times_as_far():
    model = small_model("llama")
    adapter = attach(model, LoRA(r=2, init="random_b"))
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer = torch.optim.Adam(lora_plus_groups(adapter, lr=1e-3, ratio=16))
    backward(logits(model))
    optimizer.step()  # Adam's first step is lr, whatever the gradient
    for name, parameter in adapter.named_parameters():
        step = (parameter.detach() - before[name]).abs().median().item()
        assert step == pytest.approx(0.016 if "lora_B" in name else 0.001, rel=0.01)


CASES = {
    "plain": ({}, {}),
    "biases": ({"bias": "all"}, {"bias": "all"}),
    "embedding": ({"targets": None}, {}),
    "a norm": ({"modules_to_save": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_rates_are_pefts(architecture, case):
    n = names(architecture)
    ours, theirs = CASES[case]
    targets = (n.embedding, *n.attention) if case == "embedding" else n.attention
    whole = [n.norm] if case == "a norm" else []
    whole += ["classifier"] if architecture in ENCODERS else []
    ours = ours | {"targets": targets, "modules_to_save": tuple(whole)}
    theirs = theirs | {"target_modules": list(targets), "modules_to_save": whole or None}
    adapter = attach(small_model(architecture), LoRA(r=4, **ours))
    reference = peft.get_peft_model(small_model(architecture), peft.LoraConfig(r=4, **theirs))
    settings = {"lr": 1e-3, "loraplus_lr_ratio": 8, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-5}
    optimizer = create_loraplus_optimizer(reference, torch.optim.AdamW, **settings)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    expected = {name: rates[id(p)] for name, p in their_tensors(reference).items()}
    groups = lora_plus_groups(adapter, 1e-3, ratio=8, weight_decay=0.1, embedding_lr=1e-5)
    rates = {id(p): g["lr"] for g in groups for p in g["params"]}
    assert {name: rates[id(p)] for name, p in file_tensors(adapter).items()} == expected
    decays = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert {decays[id(p)] for p in adapter.parameters() if p.ndim == 1} <= {0.0}
    assert {decays[id(p)] for p in adapter.parameters() if p.ndim > 1} == {0.1}


def test_every_parameter_once():
    adapter = attach(small_model("bert"), LoRA(bias="all", targets=("word_embeddings", "query")))
    found = [id(p) for g in lora_plus_groups(adapter, 1e-3) for p in g["params"]]
    assert len(found) == len(set(found)) and set(found) == {id(p) for p in adapter.parameters()}


@pytest.mark.parametrize("config", [IA3(), BitFit()], ids=["IA3", "BitFit"])
def test_a_method_without_b_is_refused(config):
    adapter = attach(small_model("gpt2"), config)
    with pytest.raises(ValueError, match=f"{type(config).__name__} has no matrix B, whose rate LoRA\\+ would raise"):
        lora_plus_groups(adapter, 1e-3)


WRONG = {
    "lr": ({"lr": 0}, "lr is 0; it must be a positive number"),
    "ratio": ({"ratio": -1}, "ratio is -1; it must be a positive number"),
    "embedding_lr": ({"embedding_lr": None}, "embedding_lr is None; it must be a positive number"),
    "weight_decay": ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be zero or a positive number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_numbers(name):
    settings, message = WRONG[name]
    adapter = attach(small_model("llama"), LoRA())
    with pytest.raises(ValueError, match=message):
        lora_plus_groups(adapter, **{"lr": 1e-3} | settings)
