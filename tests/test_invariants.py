"""What holds for every method on every model, as one matrix. The methods are the rows of method_table."""

import copy

import pytest
import torch
from method_table import MATRIX, METHODS, config_of
from small_models import bits, move, output, same_bits, shape_of, small_model

from utils import adapters, attach, load_adapter
from utils.checkpoint import WEIGHTS, file_tensors

MERGEABLE = [p for p in MATRIX if p.values[1] in METHODS[p.values[0]].mergeable]
every = pytest.mark.parametrize("method, architecture", MATRIX)


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
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in tmp_path.iterdir()}
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


@every
def test_switching_between_two(method, architecture):
    model = small_model(architecture)
    base = output(model)
    outputs = {}
    for name in ("first", "second"):
        move(attach(model, config_of(method, architecture), name))
        outputs[name] = output(model)
    assert not torch.equal(outputs["first"], outputs["second"])
    pair = adapters(model)
    for name in ("first", "second", "first"):
        pair[name].activate()
        assert torch.equal(output(model), outputs[name])
        with pair[name].disabled():
            assert torch.equal(output(model), base)
    pair["second"].detach()
    assert torch.equal(output(model), outputs["first"])
    pair["first"].detach()
    assert torch.equal(output(model), base)
