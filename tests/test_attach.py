"""What holds for every method on every model, as one matrix; then which modules are meant, and the report.

A method joins the matrix with one line in METHODS.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from small_models import (
    ALL,
    WITH_BIASES,
    backward,
    bits,
    logits,
    move,
    names,
    output,
    same_bits,
    shape_of,
    small_model,
)

from utils import LoRA, adapters, attach, load_adapter
from utils.attach import count_parameters, freeze
from utils.checkpoint import WEIGHTS, file_tensors
from utils.targeting import match_targets

TIED = ("gemma", "gpt2", "opt", "t5")  # the embedding is the output layer's weight too


@dataclass(frozen=True)
class Method:
    config: Callable  # names of an architecture -> configuration, of an adapter that is not the identity at its start
    on: tuple = ALL
    mergeable: tuple = ALL


START = {"r": 3, "alpha": 2, "init": "random_b"}
METHODS = {
    "lora": Method(lambda n: LoRA(targets=n.attention, **START)),
    "lora everywhere": Method(lambda n: LoRA(targets="all-linear", scaling="rslora", dropout=0.2, **START)),
    "lora and biases": Method(lambda n: LoRA(targets=n.attention, bias="all", **START), on=WITH_BIASES),
    "lora and a module": Method(lambda n: LoRA(targets=n.attention, modules_to_save=(n.norm,), **START)),
    "lora on embeddings": Method(
        lambda n: LoRA(targets=(n.embedding, *n.attention), **START), mergeable=tuple(a for a in ALL if a not in TIED)
    ),
}
MATRIX = [pytest.param(m, a, id=f"{m}-{a}") for m, method in METHODS.items() for a in method.on]
MERGEABLE = [p for p in MATRIX if p.values[1] in METHODS[p.values[0]].mergeable]
every = pytest.mark.parametrize("method, architecture", MATRIX)


def config_of(method, architecture):
    return METHODS[method].config(names(architecture))


# ------------------------------------------------------------------------------------------------- the matrix


@every
def test_disabled_is_the_base_to_the_bit(method, architecture):
    model = small_model(architecture)
    base = output(model)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    adapted = output(model)
    assert (adapted - base).abs().max() > 1e-3
    with adapter.disabled():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)


@every
def test_only_the_adapter_is_trained(method, architecture):
    model = small_model(architecture).train()
    base, before = output(model), bits(model)
    adapter = attach(model, config_of(method, architecture))
    parameters = adapter.parameters()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    backward(logits(model))
    optimizer.step()
    moved = [not torch.equal(p, s) for p, s in zip(parameters, start, strict=True)]
    # the key's bias shifts all scores of a query alike, so the softmax hides it and its gradient is rounding
    exempt = [n.endswith(("key.bias", "k_proj.bias")) for n, _ in adapter.named_parameters()]
    assert all(m or e for m, e in zip(moved, exempt, strict=True))
    with adapter.disabled():
        assert torch.equal(output(model), base)
    adapter.detach()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("method, architecture", MERGEABLE)
def test_merge_keeps_the_output_and_unmerge_every_bit(method, architecture):
    model = small_model(architecture)
    base = output(model)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    adapted, before = output(model), bits(model)
    adapter.merge()
    assert not same_bits(bits(model), before)
    torch.testing.assert_close(output(model), adapted, rtol=0, atol=1e-5 * max(1, adapted.abs().max().item()))
    with adapter.disabled():
        assert torch.equal(output(model), base)
    assert adapter.merged
    adapter.unmerge()
    assert same_bits(bits(model), before)
    assert torch.equal(output(model), adapted)


@every
def test_saved_and_loaded_is_equal(method, architecture, tmp_path):
    model = small_model(architecture)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    assert adapter.save(tmp_path) == tmp_path
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    other = small_model(architecture)
    loaded = load_adapter(other, tmp_path)
    assert same_bits(file_tensors(loaded), file_tensors(adapter))
    assert other.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(output(other), output(model))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@every
def test_detach_leaves_the_model_as_it_was(method, architecture):
    model = small_model(architecture)
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "1" in name  # some frozen, some not
    before, shape = bits(model), shape_of(model)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    assert shape_of(model) != shape
    if architecture in METHODS[method].mergeable:
        adapter.merge()
    adapter.detach()
    assert same_bits(bits(model), before) and shape_of(model) == shape
    attach(model, config_of(method, architecture)).detach()  # and again, under the same name
    assert same_bits(bits(model), before) and shape_of(model) == shape


@every
def test_a_copy_of_the_model_has_an_adapter_of_its_own(method, architecture):
    model = small_model(architecture)
    base = output(model)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    adapted = output(model)
    twin = copy.deepcopy(model)
    other = adapters(twin)["default"]
    assert other is not adapter and other.model is twin
    move(other)
    assert torch.equal(output(model), adapted) and not torch.equal(output(twin), adapted)
    other.detach()
    assert torch.equal(output(twin), base) and torch.equal(output(model), adapted)


@pytest.mark.parametrize("architecture", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_goes_there_and_back(architecture, dtype):
    model = small_model(architecture, dtype)
    base = output(model)
    adapter = attach(model, config_of("lora everywhere", architecture))
    adapted, before = output(model), bits(model)
    adapter.merge()
    difference = (output(model) - adapted).float().norm() / adapted.float().norm()
    assert difference < (0.05 if dtype == torch.bfloat16 else 0.01)  # the merged weight is rounded to half precision
    adapter.unmerge()
    assert same_bits(bits(model), before) and torch.equal(output(model), adapted)
    adapter.detach()
    assert torch.equal(output(model), base)


# ------------------------------------------------------------------------------------------------- which, how many


def test_match_targets():
    paths = ["a.q_proj", "a.k_proj", "b.q_proj", "b.q_proj.inner", "q_proj"]
    assert match_targets(paths, ["q_proj"]) == ["a.q_proj", "b.q_proj", "q_proj"]
    assert match_targets(iter(paths), ("b.q_proj", "q_proj")) == ["a.q_proj", "b.q_proj", "q_proj"]  # each once
    assert match_targets(paths, []) == []
    with pytest.raises(ValueError, match="no module is called proj, k"):  # a part of a word is no name
        match_targets(paths, ["proj", "q_proj", "k"])


def test_freeze_and_count():
    model = small_model("gpt2")
    assert count_parameters(model) == (29568, 29568)  # the tied head counts once
    kept = freeze(model, keep=("transformer.ln_f", "transformer.h.1.attn.c_attn.bias"))
    assert kept == ["transformer.h.1.attn.c_attn.bias", "transformer.ln_f.weight", "transformer.ln_f.bias"]
    assert count_parameters(model) == (96 + 32 + 32, 29568)
    assert freeze(model, keep=("transformer.h.1.attn.c_attn.bia",)) == []


def words(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_report():
    model = small_model("qwen2")
    options = {"rank_pattern": {"v_proj": 4}, "bias": "lora_only", "modules_to_save": ("norm",)}
    adapter = attach(model, LoRA(r=8, alpha=16, targets=("q_proj", "v_proj"), **options), "mine")
    total = 19744 + 2 * 8 * (32 + 32) + 2 * 4 * (32 + 16) + 32
    trained = total - 19744 + 2 * (32 + 16)
    assert words(str(adapter)) == [
        "LoRA adapter 'mine' on Qwen2ForCausalLM, active",
        "q_proj 2 x (32, 32) r=8 alpha=16 scale 2 1,024 numbers",
        "v_proj 2 x (16, 32) r=4 alpha=16 scale 4 384 numbers",
        "norm 1 x Qwen2RMSNorm, trained whole 32 numbers",
        "biases 4 96 numbers",
        f"trains {trained:,} of {total:,} numbers ({100 * trained / total:.2f} %), {4 * trained:,} bytes",
    ]
    assert repr(adapter) == "Adapter('mine', LoRA, 5 modules)"
    adapter.merge()
    assert "merged" in str(adapter).splitlines()[0]
    with adapter.disabled():
        assert "switched off" in str(adapter).splitlines()[0]


def test_a_classifier_trains_its_head_unless_told_not_to():
    assert "classifier" in attach(small_model("roberta"), LoRA()).wrappers
    assert "classifier" not in attach(small_model("roberta"), LoRA(modules_to_save=())).wrappers
