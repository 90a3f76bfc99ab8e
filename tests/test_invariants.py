"""What holds for every method on every model, as one matrix. The methods are the rows of method_table."""

import copy

import pytest
import torch
from method_table import METHODS, config_of
from small_models import ALL, backward, bits, logits, move, output, same_bits, shape_of, small_model

from utils import adapters, attach, load_adapter
from utils.checkpoint import WEIGHTS, file_tensors

MATRIX = [pytest.param(m, a, id=f"{m}-{a}") for m, method in METHODS.items() for a in method.on]
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
