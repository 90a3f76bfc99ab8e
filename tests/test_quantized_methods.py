"""Every method of the table over a base in 4 bits: what holds over any base, and what is different here.

The base is a tiny Llama in NF4, or Qwen2 and BERT for the methods that need biases or an encoder.
"""

import copy

import pytest
import torch
from method_table import METHODS, config_of
from small_models import (
    backward,
    batch,
    bits,
    gradients,
    logits,
    move,
    output,
    same_bits,
    shape_of,
    small_model,
)

from utils import FP4, INT4, NF4, DoRA, LoRA, adapters, attach, dequantize_base, load_adapter, quantize_base
from utils.checkpoint import WEIGHTS, file_tensors
from utils.measure import saved_by_shape
from utils.methods.parts import core_of
from utils.quantization.linear import QuantizedLinear
from utils.targeting import module_tree

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
ON = {name: next(a for a in ("llama_gqa", "qwen2", "bert") if a in row.on) for name, row in METHODS.items()}
MERGEABLE = [name for name, row in METHODS.items() if ON[name] in row.mergeable]
ROUNDED = [name for name in MERGEABLE if name != "bitfit"]  # it merges by leaving its biases where they are
every = pytest.mark.parametrize("method", METHODS)


def quantized(method, dtype=torch.float32, setting=None):
    return quantize_base(small_model(ON[method], dtype), setting or NF4())


def attached(method, dtype=torch.float32, setting=None):
    """(model, adapter with shifted numbers, output of the base)."""
    model = quantized(method, dtype, setting)
    base = output(model)
    adapter = attach(model, config_of(method, ON[method]))
    move(adapter)
    return model, adapter, base


@every
def test_off_is_the_quantized_base_to_the_bit(method):
    model, adapter, base = attached(method)
    adapted = output(model)
    assert (adapted - base).abs().max() > 1e-3
    with adapter.disabled():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), adapted)


@every
def test_only_the_adapter_is_trained_and_detach_leaves_nothing(method):
    model = quantized(method).train()
    base, before, shape = output(model), bits(model), shape_of(model)
    adapter = attach(model, config_of(method, ON[method]))
    parameters = adapter.parameters()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    backward(logits(model))
    assert all(
        p.grad is not None and p.grad.any() for n, p in adapter.named_parameters() if not n.endswith("k_proj.bias")
    )
    torch.optim.SGD(parameters, lr=0.01).step()
    with adapter.disabled():
        assert torch.equal(output(model), base)
    adapter.detach()
    assert same_bits(bits(model), before) and shape_of(model) == shape


@every
def test_saved_and_loaded_is_equal(method, tmp_path):
    model, adapter, _ = attached(method)
    adapter.save(tmp_path)
    other = quantized(method)
    loaded = load_adapter(other, tmp_path)
    assert same_bits(file_tensors(loaded), file_tensors(adapter))
    assert torch.equal(output(other), output(model))
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    load_adapter(small_model(ON[method]), tmp_path)  # and over the base in 32 bits


@every
def test_a_copy_has_an_adapter_of_its_own_and_two_switch(method):
    model, adapter, base = attached(method)
    adapted = output(model)
    twin = copy.deepcopy(model)
    move(adapters(twin)["default"])
    assert torch.equal(output(model), adapted) and not torch.equal(output(twin), adapted)
    adapters(twin)["default"].detach()
    assert torch.equal(output(twin), base)
    second = attach(model, config_of(method, ON[method]), "second")
    move(second)
    outputs = {"default": adapted, "second": output(model)}
    for name in ("default", "second", "default"):
        adapters(model)[name].activate()
        assert torch.equal(output(model), outputs[name])
        with adapters(model)[name].disabled():
            assert torch.equal(output(model), base)
    second.detach()
    adapter.detach()
    assert torch.equal(output(model), base)


@every
def test_checkpointing_changes_nothing(method):
    model, adapter, _ = attached(method)
    plain, expected = gradients(model, adapter)
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        found, grads = gradients(model, adapter)
        torch.testing.assert_close(found, plain, rtol=0, atol=1e-6 * max(1, plain.abs().max().item()))
        for name, grad in grads.items():
            scale = max(1, expected[name].abs().max().item())
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every
def test_half_precision(method, dtype):
    """Close to the same adapter over the same codes in float32, with finite gradients and exact when off."""
    model, adapter, base = attached(method, dtype)
    exact = copy.deepcopy(model).float()  # scales and codes stay, see test_quantized_layer
    found, expected = output(model), output(exact)
    assert found.dtype == dtype
    assert (found - expected).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()
    backward(logits(model))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())
    with adapter.disabled():
        assert torch.equal(output(model), base)


@every
def test_no_unpacked_weight_is_kept_for_the_backward_pass(method):
    model, _, _ = attached(method)
    model.train().enable_input_require_grads()
    layers = [core_of(m) for _, m in module_tree(model) if isinstance(core_of(m), QuantizedLinear)]
    weights = {(m.out_features, m.in_features) for m in layers} | {(m.in_features, m.out_features) for m in layers}
    assert len(layers) > 10
    saved = saved_by_shape(lambda: logits(model), exclude=[model])
    assert not {(shape, dtype) for shape, dtype in saved if shape in weights and dtype.is_floating_point}


@every
def test_merging_asks_to_be_told(method):
    """Refused, with what to do instead, and nothing changed; rounded knowingly, with the error, and undone exactly."""
    model, adapter, base = attached(method)
    adapted, before = output(model), bits(model)
    if method not in ROUNDED:
        if method in MERGEABLE:
            assert adapter.merge() == {}
            assert torch.equal(output(model), adapted)
            return
        with pytest.raises(ValueError, match="cannot be merged"):
            adapter.merge(requantize=True)
        assert same_bits(bits(model), before) and not adapter.merged
        return
    with pytest.raises(ValueError, match=r"dequantize_base\(model\) first, or merge\(requantize=True\)"):
        adapter.merge()
    assert same_bits(bits(model), before) and not adapter.merged and torch.equal(output(model), adapted)
    lost = adapter.merge(requantize=True)
    four_bit = [p for p, part in adapter.parts.items() if isinstance(getattr(part, "core", None), QuantizedLinear)]
    assert list(lost) == [p for p in four_bit if p in lost] and set(lost) <= set(four_bit) and lost
    assert all(0 < error < 1.5 for error in lost.values())
    assert not same_bits(bits(model), before)
    with pytest.raises(ValueError, match="merged into the codes: unmerge it"):
        dequantize_base(model)
    with adapter.disabled():
        assert torch.equal(output(model), base)
    adapter.unmerge()
    assert same_bits(bits(model), before) and torch.equal(output(model), adapted)


@pytest.mark.parametrize("method", ROUNDED)
def test_dequantized_and_merged_is_the_trained_model(method):
    model, adapter, _ = attached(method)
    adapted = output(model)
    assert dequantize_base(model) is model
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    torch.testing.assert_close(output(model), adapted, rtol=0, atol=1e-5 * max(1, adapted.abs().max().item()))
    assert adapter.merge() == {}
    torch.testing.assert_close(output(model), adapted, rtol=0, atol=1e-5 * max(1, adapted.abs().max().item()))
    adapter.detach()
    assert (output(model) - output(quantized(method))).abs().max() < 1e-5


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
@pytest.mark.parametrize("architecture", ["gpt2", "t5", "bert"])
def test_merging_on_other_architectures(method, architecture):
    """GPT-2's Conv1D becomes a linear layer the right way round; T5 keeps wo as it is."""
    model = quantize_base(small_model(architecture), NF4(block_size=32))
    base = output(model)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    adapted, before = output(model), bits(model)
    assert (adapted - base).abs().max() > 1e-3
    adapter.merge(requantize=True)
    assert (output(model) - base).abs().max() > 1e-3
    adapter.unmerge()
    assert same_bits(bits(model), before) and torch.equal(output(model), adapted)
    dequantize_base(model)
    adapter.merge()
    torch.testing.assert_close(output(model), adapted, rtol=0, atol=1e-5 * max(1, adapted.abs().max().item()))


@pytest.mark.parametrize("setting", [FP4(), INT4(block_size=32), NF4(double_quant=False, block_size=16)], ids=repr)
@pytest.mark.parametrize("method", ["lora everywhere", "dora everywhere"])
def test_other_kinds_of_4_bits(method, setting):
    model, adapter, base = attached(method, setting=setting)
    adapted = output(model)
    assert adapter.merge(requantize=True)
    with adapter.disabled():
        assert torch.equal(output(model), base)
    adapter.unmerge()
    assert torch.equal(output(model), adapted)
    dequantize_base(model)
    adapter.merge()
    torch.testing.assert_close(output(model), adapted, rtol=0, atol=1e-5 * max(1, adapted.abs().max().item()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_update_of_zero_costs_nothing_and_a_small_one_all(dtype):
    """B zero: the codes stay. A tiny B: every weight is rounded back, and the whole update is lost."""
    model = quantize_base(small_model("llama_gqa", dtype), NF4())
    adapter = attach(model, LoRA(r=4, alpha=4, targets=("q_proj",)))
    before = bits(model)
    assert set(adapter.merge(requantize=True).values()) == {0}
    assert same_bits(bits(model), before)
    adapter.unmerge()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "lora_B" in name:
                parameter.fill_(1e-2)
    assert min(adapter.merge(requantize=True).values()) > 0.8


def test_a_merged_update_is_found_again_in_the_weight():
    """The error reported is the one that can be measured."""
    model = quantize_base(small_model("llama_gqa"), NF4())
    layer = model.model.layers[0].self_attn.q_proj
    W = layer.dequantize()
    adapter = attach(model, LoRA(r=4, alpha=8, targets=("q_proj",), init="random_b"))
    part = adapter.parts["model.layers.0.self_attn.q_proj"]
    delta = (2 * part.B @ part.A).detach()
    lost = adapter.merge(requantize=True)["model.layers.0.self_attn.q_proj"]
    measured = (layer.dequantize() - W - delta).norm() / delta.norm()
    assert lost == pytest.approx(measured.item(), rel=1e-4)


@pytest.mark.parametrize("method", ["lora everywhere", "dora"])
def test_compiled_in_one_graph(method):
    """Forward and backward, without a break. (aot_eager: all but the C++ at its end.)"""
    model = small_model("llama_gqa")
    model.model.layers = model.model.layers[:1]  # tracing takes seconds
    adapter = attach(quantize_base(model, NF4()), config_of(method, "llama_gqa"))
    move(adapter)
    inputs = {k: v[:2] for k, v in batch(model).items() if k != "attention_mask"}

    def run(fn):
        model.zero_grad()
        found = fn(**inputs, use_cache=False).logits
        backward(found)
        return found.detach(), [p.grad.clone() for p in adapter.parameters()]

    plain, expected = run(model)
    torch._dynamo.reset()
    found, grads = run(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-5 * max(1, plain.abs().max().item()))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-4 * max(1, other.abs().max().item()))


@pytest.mark.parametrize("method", ["houlsby", "parallel"])
def test_a_layer_with_a_guest_is_not_replaced(method):
    """Not even the layers before it: an adapter in a layer must go first."""
    model, adapter, _ = attached(method)
    before, shape, adapted = bits(model), shape_of(model), output(model)
    with pytest.raises(ValueError, match="lives in this layer; detach its adapter first"):
        dequantize_base(model)
    assert same_bits(bits(model), before) and shape_of(model) == shape and torch.equal(output(model), adapted)
    adapter.detach()
    dequantize_base(model)


def test_an_export_is_of_the_dequantized_model(tmp_path):
    model, adapter, _ = attached("lora")
    adapted = output(model)
    with pytest.raises(ValueError, match="dequantize_base"):
        adapter.export(tmp_path / "merged")
    assert not (tmp_path / "merged").exists() and not adapter.merged
    dequantize_base(model)
    adapter.export(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(loaded), adapted, rtol=0, atol=1e-5 * adapted.abs().max().item())


def test_a_model_that_is_planned_on_meta():
    """Without memory: quantized, adapted, and run for its shapes."""
    model = small_model("llama_gqa").to("meta")
    quantize_base(model, NF4())
    adapter = attach(model, DoRA(targets="all-linear"))
    assert model(input_ids=torch.zeros(1, 5, dtype=torch.long, device="meta")).logits.shape == (1, 5, 64)
    real = attach(quantize_base(small_model("llama_gqa"), NF4()), DoRA(targets="all-linear"))
    assert str(adapter) == str(real)
