"""Several adapters on one model, models that move, export, and models that no library made."""

import copy
import json

import pytest
import torch
from small_models import (
    ALL,
    ENCODERS,
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
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
)

from utils import IA3, AdaLoRA, HoulsbyAdapter, LoRA, PTuning, adapters, attach, load_adapter
from utils.checkpoint import CONFIG

START = {"r": 3, "alpha": 2, "init": "random_b"}  # an adapter that is not the identity

# ------------------------------------------------------------------------------------------------- several adapters


def two(architecture="bert", **options):
    """A model with two adapters whose numbers differ, its base output, and the output of either."""
    model = small_model(architecture)
    base = output(model)
    pair, outputs = [], []
    for name in ("first", "second"):
        adapter = attach(model, LoRA(targets=names(architecture).attention, **START, **options), name)
        move(adapter)
        pair.append(adapter)
        outputs.append(output(model))
    assert len({tuple(o.flatten().tolist()) for o in (base, *outputs)}) == 3
    return model, base, pair, outputs


OPTIONS = [{}, {"bias": "all"}, {"bias": "lora_only", "modules_to_save": ("classifier",)}]
with_options = pytest.mark.parametrize("options", OPTIONS, ids=["plain", "bias all", "bias lora_only"])


@with_options
def test_switching(options):
    model, base, (first, second), (y1, y2) = two(**options)
    assert list(adapters(model)) == ["first", "second"] and second.active and not first.active
    for adapter, y in ((first, y1), (second, y2), (first, y1)):
        adapter.activate()
        assert torch.equal(output(model), y)
        for either in (first, second):  # disabled means the base, whichever of the two is asked
            with either.disabled():
                assert torch.equal(output(model), base)
            assert torch.equal(output(model), y) and adapter.active
    second.detach()
    assert torch.equal(output(model), y1)
    first.detach()
    assert torch.equal(output(model), base)


@with_options
def test_each_trains_its_own(options):
    model, base, (first, second), (y1, y2) = two(**options)
    first.activate()
    optimizer = torch.optim.SGD(first.parameters(), lr=0.01)
    backward(logits(model))
    grads = {n for n, p in first.named_parameters() if p.grad is not None}
    assert grads == {n for n, _ in first.named_parameters()}
    assert all(p.grad is None for n, p in second.named_parameters() if n not in second.biases)
    optimizer.step()
    trained = output(model)
    assert not torch.equal(trained, y1)
    second.activate()
    assert torch.equal(output(model), y2)
    with second.disabled():
        assert torch.equal(output(model), base)
    first.activate()
    assert torch.equal(output(model), trained)


@with_options
def test_an_adapter_that_is_off_saves_its_own_values(options, tmp_path):
    model, _, (first, second), (y1, y2) = two(**options)
    first.save(tmp_path / "off")
    with second.disabled():
        second.save(tmp_path / "disabled")
    for folder, y in (("off", y1), ("disabled", y2)):
        fresh = small_model("bert")
        load_adapter(fresh, tmp_path / folder)
        assert torch.equal(output(fresh), y)


def test_biases_stay_trained_when_another_adapter_leaves():
    model, _, (first, second), (_, y2) = two(bias="all")
    first.detach()
    assert torch.equal(output(model), y2)
    assert all(p.requires_grad for p in second.parameters())
    second.detach()
    assert all(p.requires_grad for p in model.parameters())  # as small_model makes them


def test_merging_with_two():
    model, base, (first, second), (y1, y2) = two(bias="all")
    second.merge()
    torch.testing.assert_close(output(model), y2, rtol=0, atol=1e-5)
    first.detach()
    torch.testing.assert_close(output(model), y2, rtol=0, atol=1e-5)
    second.detach()
    assert torch.equal(output(model), base)


@pytest.mark.parametrize(
    "config", [LoRA(targets=("o_proj",), init="random_b"), IA3(), AdaLoRA(9, init="random_e")], ids=str
)
def test_beside_the_parts_of_a_method_that_is_off(config):
    """Houlsby's parts live in the layers that the other adapts: off, they change no bit and stand in no merge's way."""
    model = small_model("llama_gqa")
    adapter = attach(model, config)
    move(adapter)
    alone = output(model)
    attach(model, HoulsbyAdapter(), "houlsby")
    adapter.activate()
    assert torch.equal(output(model), alone)
    adapter.merge()
    torch.testing.assert_close(output(model), alone, rtol=0, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(output(model), alone)


@pytest.mark.parametrize("config", [LoRA(), IA3(), AdaLoRA(9)], ids=str)
def test_a_layer_with_hooks_is_not_merged_and_the_reason_is_said(config):
    model = small_model("llama_gqa")
    model.model.layers[0].self_attn.v_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="v_proj: this Linear has hooks, which .* remove them first"):
        attach(model, config).merge()


def test_saving_leaves_nothing_of_the_adapter_that_was_in_the_folder(tmp_path):
    attach(small_model("llama_gqa"), PTuning(num_virtual_tokens=3)).save(tmp_path)
    attach(small_model("llama_gqa"), LoRA()).save(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_detached_while_disabled():
    model, base, (first, second), _ = two(bias="all")
    second.merge()
    with second.disabled():
        second.detach()
    assert torch.equal(output(model), base)
    with first.disabled():
        third = attach(model, LoRA(r=2, init="random_b"), "third")
        y3 = output(model)
    assert third.active and torch.equal(output(model), y3)


def test_loaded_for_use_only(tmp_path):
    model, *_ = two(bias="all")
    adapters(model)["second"].save(tmp_path)
    model = small_model("bert")
    loaded = load_adapter(model, tmp_path, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    other = attach(model, LoRA(r=2, bias="all"), "other")
    assert all(p.requires_grad for p in other.parameters())
    loaded.activate()
    assert not any(p.requires_grad for p in loaded.parameters())
    with loaded.disabled():
        pass
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_failed_load_leaves_the_others_as_they_were(tmp_path):
    model, _, (first, second), (_, y2) = two(bias="all")
    first.save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"r": 5}))
    before, shape = bits(model), shape_of(model)
    with pytest.raises(ValueError, match="have another shape"):
        load_adapter(model, tmp_path, "third")
    assert same_bits(bits(model), before) and shape_of(model) == shape
    assert second.active and torch.equal(output(model), y2)


# ------------------------------------------------------------------------------------------------- the model moves


def test_a_cast_while_merged_or_switched_off_is_followed():
    model = small_model("bert")
    expected = bits(copy.deepcopy(model).double())
    adapter = attach(model, LoRA(r=3, bias="all", init="random_b"))
    move(adapter)
    adapter.merge()
    model.double()
    adapter.detach()
    assert same_bits(bits(model), expected)


# ------------------------------------------------------------------------------------------------- export


def reload(architecture, path):
    kind = AutoModelForSequenceClassification if architecture in ENCODERS else AutoModelForCausalLM
    kind = AutoModelForSeq2SeqLM if architecture == "t5" else kind
    return kind.from_pretrained(path).eval()


@pytest.mark.parametrize("architecture", ALL)
def test_export_is_a_plain_merged_model(architecture, tmp_path):
    model = small_model(architecture)
    model.save_pretrained(tmp_path / "base")
    adapter = attach(model, LoRA(targets="all-linear", scaling="rslora", **START))
    other = attach(model, LoRA(r=2, targets=(names(architecture).mlp,), modules_to_save=()), "other")
    adapter.activate()
    move(adapter)
    adapted, before, shape = output(model), bits(model), shape_of(model)
    adapter.export(tmp_path / "merged")
    assert same_bits(bits(model), before) and shape_of(model) == shape and not adapter.merged
    plain, base = reload(architecture, tmp_path / "merged"), reload(architecture, tmp_path / "base")
    assert shape_of(plain)[0] == shape_of(base)[0] and bits(plain).keys() == bits(base).keys()
    torch.testing.assert_close(output(plain), adapted, rtol=0, atol=1e-5 * max(1, adapted.abs().max().item()))
    adapter.merge()
    merged = output(model)
    adapter.export(tmp_path / "again")
    assert adapter.merged and torch.equal(output(reload(architecture, tmp_path / "again")), merged)
    assert not other.active


def test_export_of_a_trained_output_layer_unties_it(tmp_path):
    model = small_model("gpt2")
    adapter = attach(model, LoRA(r=3, modules_to_save=("lm_head",), init="random_b"))
    move(adapter)
    adapted = output(model)
    adapter.export(tmp_path)
    assert model.config.tie_word_embeddings
    torch.testing.assert_close(output(reload("gpt2", tmp_path)), adapted, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- plain modules


class Net(nn.Module):
    """A model of no library, whose `config` is nothing that transformers knows."""

    config = {"width": 4}

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return self.out(x)


STACK = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


@pytest.mark.parametrize("model", [Net(), STACK], ids=["Net", "Sequential"])
def test_a_model_of_no_library(model, tmp_path):
    x = torch.randn(3, 4)
    fresh, base = copy.deepcopy(model), model(x)
    adapter = attach(model, LoRA(r=2, targets="all-linear", bias="all", init="random_b"))
    move(adapter)
    adapter.save(tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x)) and not torch.equal(model(x), base)
    adapter.detach()
    assert torch.equal(model(x), base)


def test_layers_are_counted_in_any_kind_of_path():
    assert list(attach(Net(), LoRA(targets="all-linear", layers=(1,))).parts) == ["layers.1"]
    stack = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert list(attach(stack, LoRA(targets="all-linear", layers=(0,))).parts) == ["0"]


def test_a_bias_in_two_places_is_one():
    """BERT's output layer holds the bias of the module around it: swapped twice, it would stay."""
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = BertForMaskedLM(BertConfig(**sizes, num_attention_heads=2)).eval()
    ids = torch.randint(64, (2, 5))
    with torch.no_grad():
        base = model(ids).logits
        adapter = attach(model, LoRA(targets=("query",), bias="all"))
        move(adapter)
        moved = model(ids).logits
        with adapter.disabled():
            assert torch.equal(model(ids).logits, base)
        assert torch.equal(model(ids).logits, moved) and not torch.equal(moved, base)
        adapter.detach()
        assert torch.equal(model(ids).logits, base)
