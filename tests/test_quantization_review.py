"""What a base in 4 bits must survive: other default dtypes, damaged files, trained biases, hooks, full GPUs."""

import json

import pytest
import torch
import torch.nn.utils as U
import torch.nn.utils.prune
import transformers as tf
from small_models import output, small_model
from torch import nn

from utils import INT4, NF4, LoRA, attach, dequantize_base, quantize_base
from utils.methods.bitfit import BitFit
from utils.optimizers import AdamW8bit
from utils.quantization.base import from_bitsandbytes
from utils.quantization.codebooks import dynamic_codebook, fp4_codebook, int4_codebook, nf4_codebook
from utils.quantization.linear import QuantizedLinear
from utils.quantization.weights import QuantizedWeight, quantize_weight

DESCRIPTION = "weight.quant_state.bitsandbytes__nf4"
Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def quantized(architecture="llama"):
    return quantize_base(small_model(architecture), NF4())


# ----------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_default_dtypes_change_nothing(dtype, default_dtype):
    """Models are often built under torch.set_default_dtype(torch.bfloat16)."""
    W = random(8, 64)
    expected = quantize_weight(W, "nf4", 64, double_quant=True)
    books = [book() for book in (nf4_codebook, fp4_codebook, int4_codebook, dynamic_codebook)]
    default_dtype(dtype)
    for book, there in zip((nf4_codebook, fp4_codebook, int4_codebook, dynamic_codebook), books, strict=True):
        assert book().dtype == torch.float32 and torch.equal(book(), there)
    found = quantize_weight(W, "nf4", 64, double_quant=True)
    read = QuantizedWeight.from_state(expected.to_state())
    for weight in (found, read):
        assert weight.nested[0].dtype == torch.float32
        assert torch.equal(weight.dequantize(), expected.dequantize())


@pytest.mark.parametrize("block_size", [2**40, 2**40 + 1])
def test_a_block_far_larger_than_the_weight_costs_no_memory(block_size):
    """One scale is repeated for the numbers there are, and not for a block of four terabytes."""
    W = random(4, 16)
    expected = quantize_weight(W, "nf4", 64).dequantize()
    assert torch.equal(quantize_weight(W, "nf4", block_size).dequantize(), expected)


# ------------------------------------------------------------------------------------------------- files


def state(words=None, **tensors):
    """The state of an 8 x 64 weight, with other words in its description, or other tensors."""
    state = quantize_weight(random(8, 64), "nf4", 64, double_quant=True).to_state()
    described = json.loads(bytes(state[DESCRIPTION].tolist())) | (words or {})
    state[DESCRIPTION] = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    return state | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("words", [{"nested_offset": 10**400}, {"nested_offset": 1e300}, {"nested_offset": "nan"},
                                   {"shape": [2**70, 1]}, {"shape": [2**40, 2**40]}])  # fmt: skip
def test_unfit_descriptions_get_a_sentence(words):
    with pytest.raises(ValueError):
        QuantizedWeight.from_state(state(words))


def test_a_description_without_bottom_gets_a_sentence():
    deep = torch.frombuffer(bytearray(b"[" * 200_000), dtype=torch.uint8)
    with pytest.raises(ValueError, match="cannot be read"):
        QuantizedWeight.from_state(state() | {DESCRIPTION: deep})


def test_a_shape_that_overflows_is_not_taken_for_an_empty_weight():
    none = torch.zeros(0)
    empty = {"weight": none.byte(), "weight__absmax": none.byte(), "weight__nested_absmax": none}
    with pytest.raises(ValueError, match="weight has 0 numbers"):
        QuantizedWeight.from_state(state({"shape": [2**40, 2**40]}, **empty))


def test_tensors_of_any_shape_and_stride_are_read():
    expected = QuantizedWeight.from_state(state())
    code, packed = nf4_codebook(), expected.packed
    odd = state(weight=packed.repeat(1, 2)[:, :1], weight__absmax=expected.absmax[:, None],
                weight__quant_map=code.repeat_interleave(2)[::2],
                weight__nested_quant_map=dynamic_codebook().view(16, 16))  # fmt: skip
    assert torch.equal(QuantizedWeight.from_state(odd).dequantize(), expected.dequantize())
    with pytest.raises(ValueError, match="needs 256"):
        QuantizedWeight.from_state(state(weight=torch.tensor(1.0)))


def test_strict_loading_names_what_has_no_place():
    model = quantized()
    contents = model.state_dict() | {f"{Q_PROJ}.rubbish": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=f"{Q_PROJ}.rubbish"):
        model.load_state_dict(contents)
    assert model.load_state_dict(contents, strict=False).unexpected_keys == [f"{Q_PROJ}.rubbish"]


def test_what_is_loaded_is_a_copy_unless_it_is_assigned():
    first, second = quantized(), quantized()
    second.load_state_dict(first.state_dict())
    codes = [m.get_submodule(Q_PROJ).weight for m in (first, second)]
    assert torch.equal(*codes) and codes[0].data_ptr() != codes[1].data_ptr()
    second.load_state_dict(first.state_dict(), assign=True)
    assert codes[0].data_ptr() == second.get_submodule(Q_PROJ).weight.data_ptr()


def test_a_model_on_meta_is_filled_by_assigning():
    model = quantized()
    empty = quantize_base(small_model("llama").to("meta"), NF4())
    empty.load_state_dict(model.state_dict(), assign=True)
    buffers = {name: b for name, b in empty.named_buffers() if b.is_meta}
    assert not any(p.is_meta for p in empty.parameters()) and all("inv_freq" in name for name in buffers)
    assert torch.equal(empty.get_submodule(Q_PROJ).dequantize(), model.get_submodule(Q_PROJ).dequantize())


def test_a_move_that_fails_leaves_the_scales_what_they_were():
    layer = quantized().get_submodule(Q_PROJ)
    before = layer.dequantize()

    def full(tensor):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        layer._apply(full)
    assert layer.offset.dtype == torch.float32
    assert torch.equal(layer.dequantize(), before)


# ------------------------------------------------------------------------------------------- adapters and hooks


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_trained_biases_stay_the_models_when_it_is_dequantized(dtype):
    model = quantized("qwen2")
    adapter = attach(model, LoRA(r=2, init="random_b", bias="lora_only"))
    with torch.no_grad():
        for bias in adapter.biases.values():
            bias.add_(1)
    dequantize_base(model, dtype)
    own = dict(model.named_parameters())
    assert all(any(bias is p for p in own.values()) for bias in adapter.biases.values())
    on = model.get_submodule(Q_PROJ).core.bias.clone()
    with adapter.disabled():
        off = model.get_submodule(Q_PROJ).core.bias
        torch.testing.assert_close(on - off, torch.ones_like(on), rtol=0, atol=0.02)
    adapter.merge()
    adapter.detach()


@pytest.mark.parametrize("name", ["up_proj", "layers.0.mlp"])
def test_a_layer_in_4_bits_cannot_be_trained_whole(name):
    model = quantized()
    before = output(model)
    with pytest.raises(ValueError, match="4 or 8 bits, which cannot be trained"):
        attach(model, LoRA(r=2, modules_to_save=(name,)))
    assert torch.equal(output(model), before)


@pytest.mark.parametrize("config", [LoRA(r=2, init="random_b"), BitFit()])
def test_a_base_in_4_bits_is_not_exported_as_a_plain_checkpoint(config, tmp_path):
    """It would be a folder of codes that from_pretrained takes for damaged weights."""
    adapter = attach(quantized("qwen2"), config)
    for merged in (False, True):
        if merged:
            adapter.merge(requantize=True)
        with pytest.raises(ValueError, match="dequantize_base"):
            adapter.export(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("convert", [lambda model: model, from_bitsandbytes])
def test_a_model_of_bitsandbytes_is_a_plain_one_when_it_is_dequantized(convert, tmp_path):
    """Its configuration must not go on saying that the folder holds 4 bits: from_pretrained would not read it."""
    small_model("llama").save_pretrained(tmp_path / "base")
    asked = tf.BitsAndBytesConfig(**NF4().to_bitsandbytes())
    read = {"quantization_config": asked, "device_map": "cpu", "dtype": torch.float32}
    model = convert(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **read))
    adapter = attach(dequantize_base(model), LoRA(r=2, init="random_b"))
    adapter.export(tmp_path / "merged")
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(output(again), output(model))
    assert model.half().dtype == torch.float16


def test_torch_exports_it():
    block, x = quantized().model.layers[0].mlp, random(1, 3, 32)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))


def test_a_merge_brings_its_own_code_book():
    """A file may list a code book in another order: the merged codes are read with the one they were made with."""
    W = random(8, 64)
    weight = quantize_weight(W)
    backwards = quantize_weight(W)
    backwards.code, backwards.packed = weight.code.flip(0), 255 - weight.packed
    assert torch.equal(backwards.dequantize(), weight.dequantize())
    merged = []
    for base in (weight, backwards):
        model = nn.Sequential(QuantizedLinear(base))
        torch.manual_seed(0)
        adapter = attach(model, LoRA(r=2, init="random_b", targets=("0",)))
        adapter.merge(requantize=True)
        merged.append(model[0].core.dequantize())
        adapter.unmerge()
        assert torch.equal(model[0].core.dequantize(), weight.dequantize())
    assert torch.equal(*merged)


@pytest.mark.parametrize("step", [None, "1", 1.5])
def test_an_optimizers_state_counts_its_steps(step):
    p = nn.Parameter(random(5000))
    p.grad = torch.ones(5000)
    optimizer = AdamW8bit([p])
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    with pytest.raises(ValueError, match="state of parameter 0"):
        optimizer.load_state_dict(state)


def test_hooks_are_not_lost_in_silence():
    model = quantized()
    hook = model.get_submodule(Q_PROJ).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        dequantize_base(model)
    assert "Quantized" not in type(model.lm_head).__name__ and hasattr(model.get_submodule(Q_PROJ), "quantized")
    hook.remove()
    dequantize_base(model)


@pytest.mark.parametrize("rewrite", [U.weight_norm, U.spectral_norm, U.parametrizations.weight_norm,
                                     lambda layer: U.prune.random_unstructured(layer, "weight", 0.5)])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_computed_is_left_alone(rewrite):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    rewrite(model[0])
    before = type(model[0])
    with pytest.raises(ValueError, match="0 cannot be put into 4 bits"):
        quantize_base(model, NF4(targets=("0",)))
    quantize_base(model, INT4())
    assert type(model[0]) is before and type(model[1]).__name__ == "QuantizedLinear"
