"""A base in 4 bits: the formulas for what is kept, for states and for the peak, against counts on NF4Linear."""

import itertools

import pytest
import torch
import transformers as tf
from test_memory_activations import loss_of, make, of_today
from torch.utils._python_dispatch import _disable_current_modes

from utils import DoRA, LoRA, attach
from utils.architectures import architecture
from utils.measure import saved_bytes
from utils.memory.activations import Run
from utils.memory.blocks import activations
from utils.memory.estimate import estimate, facts_of, frozen_in_blocks, needs_of, predict
from utils.memory.instruments import LiveBytes
from utils.memory.shapes import shape_of
from utils.memory.states import nf4_bytes, quantized_base
from utils.quantization import weights
from utils.quantization.base import FP4, NF4, quantize_base
from utils.quantization.linear import NF4Linear, QuantizedLinear

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
METHODS = {
    "LoRA": LoRA(r=2),
    "LoRA, all": LoRA(r=2, targets="all-linear"),
    "LoRA, all, dropout": LoRA(r=2, targets="all-linear", dropout=0.1),
    "DoRA": DoRA(r=2),
    "DoRA, all, dropout": DoRA(r=2, targets="all-linear", dropout=0.1),
}
MODELS = ("llama_gqa", "gpt2", "bert", "opt", "gemma", "mistral")
DTYPES = (torch.float32, torch.bfloat16)


@of_today
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, method", list(itertools.product(MODELS, METHODS)))
def test_what_is_kept_to_the_byte(name, method, dtype):
    for attention, batch in (("sdpa", (3, 11)), ("sdpa", (1, 40)), ("eager", (3, 11))):
        model = quantize_base(make(name, attention, dtype), NF4(block_size=32))
        attach(model, METHODS[method])
        model.train()
        shape = shape_of(model)
        ends, blocks = needs_of(model, shape)
        _, loss = loss_of(model, *batch)
        run = Run(*batch, ends, dtype.itemsize, attention, blocks=blocks, quantized=True)
        assert activations(shape, run).total == saved_bytes(loss, exclude=[model])


def test_no_weight_is_kept():
    """What is kept without an adapter that trains before it: nothing, where a plain product keeps the dense weight."""
    model = quantize_base(make("llama", "sdpa", torch.float32), NF4())
    layer = model.model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, requires_grad=True)
    assert isinstance(layer, NF4Linear) and saved_bytes(lambda: layer(x), exclude=[model, x]) == 0
    plain = saved_bytes(lambda: torch.nn.functional.linear(x, layer.dequantize()), exclude=[model, x])
    assert plain == 4 * layer.in_features * layer.out_features


@pytest.mark.parametrize("method", [None, LoRA(r=2), DoRA(r=2)], ids=["no method", "LoRA", "DoRA"])
@pytest.mark.parametrize("setting", [NF4(), FP4(block_size=128)], ids=["NF4", "FP4"])
@pytest.mark.parametrize("name", ["llama_gqa", "gpt2", "bert"])
def test_facts_before_and_after_are_equal(name, setting, method):
    """A weight counts with the numbers it stands for, whether it is in 4 bits already or will be."""
    model = make(name, "sdpa", torch.bfloat16).requires_grad_(False)
    before = facts_of(model, method)
    quantize_base(model, setting)
    after = facts_of(model, method)
    for count in ("name", "shape", "trained", "total", "in_blocks", "first"):
        assert getattr(after, count) == getattr(before, count), count
    layers = list(frozen_in_blocks(model))
    assert layers and all(isinstance(layer, QuantizedLinear) for layer in layers)
    assert before.in_blocks == sum(layer.in_features * layer.out_features for layer in layers)


def test_a_model_in_4_bits_is_known_as_one():
    model = make("llama_gqa", "sdpa", torch.float32)
    before = estimate(model, LoRA(r=2), quantized=True)
    assert estimate(model, LoRA(r=2)).peak > before.peak
    quantize_base(model, NF4())
    assert estimate(model, LoRA(r=2)).states == before.states


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", [32, 64, 100])
def test_bytes_of_a_base(block_size, double_quant):
    """Against the tensors that are there: equal but for the rounding up of the last block, group and byte."""
    model = make("llama", "sdpa", torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    quantize_base(model, NF4(block_size=block_size, double_quant=double_quant))
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLinear)]
    linear = sum(layer.in_features * layer.out_features for layer in layers)
    packed = sum(layer.quantized.nbytes() for layer in layers)
    rest = sum(p.nbytes for p in model.parameters() if p.dtype != torch.uint8)
    assert rest == 2 * (total - linear)
    up = packed + rest - quantized_base(linear, total - linear, block_size, double_quant)
    assert 0 <= up <= 9 * len(layers)


def test_a_base_by_hand():
    assert nf4_bytes(64 * 256) == 64 * 128 + 256 + 4
    assert quantized_base(64, 10, double_quant=False) == 32 + 4 + 20
    assert quantized_base(64, 10, block=16, double_quant=False, e=4) == 32 + 16 + 40
    llama = architecture("Llama-2-7B")
    linear = sum(layer.weight.numel() for layer in frozen_in_blocks(llama.requires_grad_(False)))
    assert linear == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    total = sum(p.numel() for p in llama.parameters())
    assert quantized_base(linear, total - linear) / 1e9 == pytest.approx(3.866, abs=1e-3)


@pytest.fixture
def as_a_kernel(monkeypatch):
    """Unpacking that makes W' and nothing beside it, as on a GPU. On a CPU some parts are in float32 on the way."""

    unseen = weights.dequantize

    def dequantize(*arguments):
        with _disable_current_modes():  # LiveBytes does not look
            W = unseen(*arguments)
        return torch.empty(W.shape, dtype=W.dtype).copy_(W)

    monkeypatch.setattr(weights, "dequantize", dequantize)


SIZES = {"wide vocabulary": (4000, 64), "wide": (300, 640)}


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["", "dropout"])
@pytest.mark.parametrize("checkpointing", [False, True, 1], ids=["", "checkpointing", "the first block"])
@pytest.mark.parametrize("size", SIZES)
def test_peak_of_a_step(size, checkpointing, dropout, as_a_kernel):
    """States within 0.5 %, the peak within 5 % of live bytes."""
    torch.manual_seed(0)
    vocab, d = SIZES[size]
    config = tf.LlamaConfig(
        vocab_size=vocab, hidden_size=d, intermediate_size=d * 11 // 4, num_hidden_layers=2, num_attention_heads=4,
        use_cache=False,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).bfloat16().train()
    method, batch, length = LoRA(r=4, targets="all-linear", dropout=dropout), 4, 64
    options = dict(batch=batch, length=length, checkpointing=checkpointing, quantized=True, device="cpu")
    predicted = estimate(model, method, **options)
    quantize_base(model, NF4())
    assert predict(facts_of(model, method), **options) == predicted
    attach(model, method)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in list(model.model.layers)[len(model.model.layers) if checkpointing is True else checkpointing :]:
            layer.gradient_checkpointing = False
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    ids = torch.randint(3, 200, (batch, length))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    state = [t for kept in optimizer.state.values() for t in kept.values()]
    scales = [t for name, t in model.named_buffers() if "absmax" in name]
    own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *scales, *state)}
    with LiveBytes([*model.parameters(), *model.buffers(), *state, ids]) as live:
        step()
    assert sum(predicted.states.values()) == pytest.approx(sum(own.values()), rel=0.005)
    assert predicted.peak == pytest.approx(sum(own.values()) + live.peak, rel=0.05)
