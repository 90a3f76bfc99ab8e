"""NF4Linear as a module (state dicts, dtypes, copies), and quantize_base given what it cannot take."""

import copy
import io
import json
import pickle

import bitsandbytes as bnb
import pytest
import torch
from small_models import bits, output, same_bits, shape_of, small_model
from torch import nn

from utils import FP4, INT4, NF4, LoRA, attach, dequantize_base, quantize_base
from utils.quantization.base import FourBit, from_bitsandbytes
from utils.quantization.linear import NF4Linear, QuantizedLinear
from utils.quantization.weights import quantize_weight

WORDS = "weight.quant_state.bitsandbytes__nf4"


def layer(d_out=8, d_in=64, double_quant=True, dtype=torch.float32, kind="nf4"):
    plain = nn.Linear(d_in, d_out, dtype=dtype).requires_grad_(False)
    made = NF4Linear if kind == "nf4" else QuantizedLinear
    return made(quantize_weight(plain.weight, kind, 64, double_quant), plain.bias)


# ---------------------------------------------------------------------------------------- dtypes, copies, devices


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
def test_scales_are_never_rounded(cast, double_quant):
    """Codes and scales stay as they are; the bias is cast, as any module's."""
    part = layer(double_quant=double_quant)
    held = {n: t.clone() for n, t in [*part.named_buffers(), ("weight", part.weight)]}
    model = getattr(nn.Sequential(part), cast)()
    now = dict(model[0].named_buffers()) | {"weight": model[0].weight}
    assert held.keys() == now.keys()
    assert all(torch.equal(held[n], now[n]) and held[n].dtype == now[n].dtype for n in held)
    assert model[0].bias.dtype == {"half": torch.half, "double": torch.double}.get(cast, getattr(torch, cast))
    x = torch.randn(3, 64, dtype=model[0].bias.dtype)
    assert model(x).dtype == x.dtype
    assert torch.equal(model[0].dequantize(), part.dequantize())


@pytest.mark.parametrize("double_quant", [True, False])
def test_copies_and_pickles(double_quant):
    part = layer(double_quant=double_quant)
    x = torch.randn(3, 64)
    buffer = io.BytesIO()
    torch.save(part, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(part), pickle.loads(pickle.dumps(part)), torch.load(buffer, weights_only=False)):
        assert torch.equal(twin(x), part(x)) and repr(twin) == repr(part)
        assert same_bits(bits(twin), bits(part))
        twin.weight.data.zero_()
        assert part.weight.any()


def test_to_meta_and_back_by_a_state_dict():
    part = layer()
    state, x = bits(part), torch.randn(3, 64)
    empty = copy.deepcopy(part).to("meta")
    assert empty.weight.is_meta and empty.absmax.is_meta and empty(x.to("meta")).shape == (3, 8)
    empty.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(empty(x), part(x))


def test_requires_grad_is_the_biases_alone():
    part = layer()
    part.bias.requires_grad_(True)
    part(torch.randn(3, 64)).sum().backward()
    assert torch.equal(part.bias.grad, torch.full((8,), 3.0)) and part.weight.grad is None


# --------------------------------------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("setting", [NF4(), NF4(double_quant=False), FP4(), INT4(block_size=32)], ids=repr)
@pytest.mark.parametrize("architecture", ["llama_gqa", "gpt2", "t5"])
def test_a_strict_round_trip(architecture, setting):
    model = quantize_base(small_model(architecture), setting)
    other = small_model(architecture)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    other = quantize_base(other, setting)
    assert not torch.equal(output(other), output(model))
    assert other.load_state_dict(model.state_dict()) == ([], [])
    assert torch.equal(output(other), output(model)) and same_bits(bits(other), bits(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    quantize_base(small_model(architecture), setting).load_state_dict(torch.load(buffer))


def edit(**changes):
    """A change of the description in a state dict; None takes an entry out."""

    def change(state):
        words = json.loads(bytes(state[WORDS].tolist())) | changes
        words = {k: v for k, v in words.items() if v is not None}
        state[WORDS] = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)

    return change


def drop(key):
    return lambda state: state.pop(key)


def put(key, tensor):
    return lambda state: state.__setitem__(key, tensor)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (drop("weight.absmax"), "differs in weight.absmax"),
        (drop("weight.nested_absmax"), "differs in weight.nested_absmax"),
        (drop("weight"), "differs in weight"),
        (drop(WORDS), "has 0 keys weight.quant_state.bitsandbytes__..., not one"),
        (put("weight.quant_state.bitsandbytes__fp4", torch.zeros(1)), "has 2 keys"),
        (put("weight.more", torch.zeros(1)), "differs in weight.more"),
        (put("weight", torch.zeros(255, 1, dtype=torch.uint8)), r"weight has 255 numbers; .*\(8, 64\) needs 256"),
        (put("weight.absmax", torch.zeros(7, dtype=torch.uint8)), "weight.absmax has 7 numbers; .* needs 8"),
        (put("weight.absmax", torch.zeros(8)), "weight.absmax is torch.float32, not torch.uint8"),
        (put("weight.quant_map", torch.zeros(15)), "weight.quant_map has 15 numbers"),
        (put("weight.quant_map", torch.full((16,), torch.nan)), "weight.quant_map has numbers that are not finite"),
        (
            put("weight.nested_absmax", torch.tensor([torch.inf])),
            "weight.nested_absmax has numbers that are not finite",
        ),
        (put("weight.nested_quant_map", torch.zeros(256).half()), "nested_quant_map is torch.float16"),
        (put(WORDS, torch.tensor([1, 2, 3], dtype=torch.uint8)), "cannot be read"),
        (put(WORDS, torch.tensor([0.5])), "cannot be read"),
        (edit(blocksize=0), "cannot be read.*blocksize is 0"),
        (edit(blocksize="64"), "cannot be read.*blocksize"),
        (edit(blocksize=32), "weight.absmax has 8 numbers; .* needs 16"),
        (edit(shape=[8, 65]), "weight has 256 numbers"),
        (edit(shape=[4, 128]), r"it is a weight of \(4, 128\), not \(8, 64\)"),
        (edit(shape=[8, -64]), "cannot be read"),
        (edit(shape=None), "cannot be read.*shape"),
        (edit(dtype="float8"), "cannot be read.*float8"),
        (edit(quant_type="nf3"), "the code book is 'nf3'"),
        (edit(nested_blocksize=64), "cannot be read.*nested_blocksize is 64, not 256"),
        (edit(nested_offset="much"), "cannot be read"),
        (edit(nested_offset=float("nan")), "cannot be read.*nested_offset"),
    ],
)
def test_a_damaged_state_is_refused_in_one_sentence(change, sentence):
    model = nn.Sequential(layer())
    before, x = bits(model), torch.randn(3, 64)
    y, state = model(x), {k: t.clone() for k, t in layer().state_dict().items() if k != "bias"}
    change(state)
    with pytest.raises(RuntimeError, match=sentence) as error:
        model[0].load_state_dict(state, strict=False)
    assert len(str(error.value).splitlines()) == 2  # torch's heading, and ours
    assert same_bits(bits(model), before) and torch.equal(model(x), y)


def test_what_is_missing_or_dense():
    """A state dict without the layer is missing it; one of the model before it was quantized says so."""
    part = layer()
    before = bits(part)
    assert part.load_state_dict({"bias": torch.zeros(8)}, strict=False).missing_keys == ["weight"]
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        part.load_state_dict({"bias": before["bias"]})
    with pytest.raises(RuntimeError, match="has 0 keys weight.quant_state"):
        part.load_state_dict(nn.Linear(64, 8).state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*bias"):
        part.load_state_dict({k: t for k, t in before.items() if k != "bias"})
    with pytest.raises(RuntimeError, match="size mismatch for bias"):
        part.load_state_dict(before | {"bias": torch.zeros(9)})


# ----------------------------------------------------------------------------------------------- bad input


class Tied(nn.Module):
    """Two linear layers with one weight, and one that stands alone."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


class WithClass(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.block = nn.TransformerEncoderLayer(8, 2, 16)
        self.plain = nn.Linear(8, 8)


def spoiled(value):
    model = small_model("llama_gqa")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
    return model


def with_adapter():
    model = small_model("llama_gqa")
    attach(model, LoRA())
    return model


def with_hook():
    model = small_model("llama_gqa")
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    return model


def of_bitsandbytes():
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4"))
    model.to("cpu")
    return model if model[0].weight.quant_state is not None else model.to(torch.device("cpu"))


def held(model):
    """`bits`, with a number for NaN, which equals nothing."""
    return {n: t.nan_to_num(nan=12.34) for n, t in bits(model).items()}


BAD = {
    "adapters": (with_adapter, NF4(), "has the adapter 'default': quantize first, then attach"),
    "twice": (lambda: quantize_base(small_model("llama_gqa"), NF4()), NF4(), "is in 4 bits already"),
    "not finite": (lambda: spoiled(torch.nan), NF4(), "layers.1.mlp.up_proj: .* not finite"),
    "infinite": (lambda: spoiled(torch.inf), INT4(), "layers.1.mlp.up_proj: .* not finite"),
    "float64": (lambda: small_model("gpt2").double(), NF4(), "float32, float16 or bfloat16, not torch.float64"),
    "hooks": (with_hook, NF4(), "q_proj has hooks"),
    "tied": (Tied, NF4(targets=("third", "second")), "second cannot .* same tensor as first.weight"),
    "tied output": (lambda: small_model("gpt2"), NF4(targets=("lm_head",)), "lm_head cannot .* same tensor as"),
    "embedding": (lambda: small_model("llama"), NF4(targets=("embed_tokens",)), "embed_tokens .* it is a Embedding"),
    "norm": (lambda: small_model("llama"), NF4(targets=("norm",)), "norm cannot .* it is a LlamaRMSNorm"),
    "kept wide": (lambda: small_model("t5"), NF4(targets=("wo",)), "wo cannot .* the model keeps it in float32"),
    "no such name": (lambda: small_model("llama"), NF4(targets=("q_prj",)), "no module is called q_prj .*q_proj"),
    "no such regex": (lambda: small_model("llama"), NF4(targets="q_prj"), "matches no module"),
    "no such exclude": (lambda: small_model("llama"), NF4(exclude=("no",)), "exclude: no module fits"),
    "nothing left": (lambda: small_model("llama"), NF4(targets=("q_proj",), exclude=("q_proj",)), "leave none"),
    "nothing linear": (lambda: nn.Sequential(nn.ReLU(), nn.LayerNorm(4)), NF4(), "matches no module"),
    "attention": (WithClass, NF4(targets=("attention.out_proj",)), "out_proj cannot be put into 4 bits"),
    "encoder": (WithClass, NF4(targets=("linear1",)), "torch reads its weight without calling it"),
    "a lone layer": (lambda: nn.Linear(4, 4), NF4(), "matches no module"),
    "all tied": (Tied, FP4(exclude=("third",)), "this Tied has no linear layer to quantize"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_quantized_gets_a_sentence(case):
    make, setting, sentence = BAD[case]
    model = make()
    before, shape = held(model), shape_of(model)
    with pytest.raises(ValueError, match=sentence) as error:
        quantize_base(model, setting)
    assert "\n" not in str(error.value)
    assert same_bits(held(model), before) and shape_of(model) == shape


@pytest.mark.parametrize(
    "model, setting",
    [(5, NF4()), ("gpt2", NF4()), (nn.Sequential(nn.Linear(4, 4)), "nf4"), (nn.Sequential(nn.Linear(4, 4)), NF4),
     (nn.Sequential(nn.Linear(4, 4)), FourBit()), (nn.Sequential(nn.Linear(4, 4)), LoRA())],
)  # fmt: skip
def test_neither_a_model_nor_a_setting(model, setting):
    with pytest.raises(TypeError, match="quantize_base needs"):
        quantize_base(model, setting)


def test_what_stays_as_it_is_by_default():
    """Tied weights, torch's fused layers, and what has another form: the rest is quantized."""
    tied = quantize_base(Tied(), NF4())
    assert [type(m).__name__ for m in tied.children()] == ["Linear", "Linear", "NF4Linear"]
    mixed = quantize_base(WithClass(), NF4())
    assert [n for n, m in mixed.named_modules() if isinstance(m, QuantizedLinear)] == ["plain"]
    x = torch.randn(3, 2, 8)
    assert mixed.attention(x, x, x)[0].shape == mixed.block(x).shape == x.shape


def test_bitsandbytes_layers_are_in_4_bits_already():
    model = of_bitsandbytes()
    assert model[0].weight.quant_state is not None
    with pytest.raises(ValueError, match="0 is in 4 bits already"):
        quantize_base(model, NF4())
    assert isinstance(from_bitsandbytes(model)[0], NF4Linear)


@pytest.mark.parametrize("undo, sentence", [(dequantize_base, "no such layer in 4 bits"),
                                            (from_bitsandbytes, "no such layer in 4 bits")])  # fmt: skip
def test_nothing_to_undo(undo, sentence):
    model = small_model("llama_gqa")
    before = bits(model)
    with pytest.raises(ValueError, match=sentence):
        undo(model)
    assert same_bits(bits(model), before)


def test_dequantize_wants_a_dtype():
    model = quantize_base(small_model("llama_gqa"), NF4())
    for bad in (torch.int8, "bfloat16"):
        with pytest.raises((ValueError, TypeError), match="dtype"):
            dequantize_base(model, bad)
    assert isinstance(model.model.layers[0].mlp.up_proj, NF4Linear)


def test_the_mode_and_the_freezing_of_a_model():
    model = small_model("qwen2").train()
    model.model.layers[1].eval()
    quantize_base(model, NF4())
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.layers[0].mlp.up_proj.training and not model.model.layers[1].mlp.up_proj.training
    dequantize_base(model)
    assert model.model.layers[0].mlp.up_proj.training and not model.model.layers[1].mlp.up_proj.training
    assert model.model.layers[0].self_attn.q_proj.bias is not None
