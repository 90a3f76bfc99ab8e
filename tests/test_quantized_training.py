"""Adapters trained over 4 bits: ours over ours, ours over bitsandbytes, and PEFT over bitsandbytes do the same.

Ten steps of AdamW from the same A and B. All three compute the same products, in another order, so that losses may part
by rounding: 1e-6 of a loss to begin with, and Adam, which divides small gradients by their size, lets it grow. 1e-4 is
allowed after ten steps, where the loss itself falls by far more.
"""

import copy

import peft
import pytest
import torch
import transformers as tf
from peft_pair import QUIET, assert_near, their_tensors
from small_models import COMMON, TOKENS, batch, output
from transformers import BitsAndBytesConfig

from utils import DoRA, LoRA, adapters, attach, dequantize_base, load_adapter
from utils.checkpoint import file_tensors
from utils.methods.layers import is_linear4bit
from utils.quantization.base import bitsandbytes_fields, from_bitsandbytes

pytestmark = QUIET
SIZE = COMMON | TOKENS | {"hidden_size": 64, "intermediate_size": 128}  # rows of whole blocks of 64
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
BUILD = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZE, num_key_value_heads=2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, **GPT2, **TOKENS, initializer_range=0.15)),
}
TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "gpt2": ("c_attn", "mlp.c_proj")}
METHODS = {"lora": (LoRA, {}), "dora": (DoRA, {"use_dora": True})}
BASES = [("llama", torch.float32), ("llama", torch.bfloat16), ("gpt2", torch.float32)]


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    """(architecture, dtype) -> a fresh model by transformers and bitsandbytes."""
    made = {}

    def model(architecture, dtype=torch.float32):
        if (architecture, dtype) not in made:
            torch.manual_seed(0)
            folder = tmp_path_factory.mktemp(architecture)
            BUILD[architecture]().save_pretrained(folder)
            config = BitsAndBytesConfig(**bitsandbytes_fields(compute_dtype=dtype))
            made[architecture, dtype] = tf.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, dtype=dtype
            )
        fresh = copy.deepcopy(made[architecture, dtype])
        for module in fresh.modules():
            if is_linear4bit(module):  # no shortcut of inference on a CPU: see test_quantized_models
                module.support_avx512bf16_for_cpu = False
        return fresh

    return model


def three(method, architecture, dtype, four_bits):
    """(model, {name: trained tensor}) of ours over ours, ours over bitsandbytes, and PEFT over bitsandbytes."""
    config, extra = METHODS[method]
    theirs = peft.get_peft_model(
        four_bits(architecture, dtype),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(TARGETS[architecture]), task_type="CAUSAL_LM", **extra),
    )
    reference = their_tensors(theirs)
    with torch.no_grad():
        for name, tensor in reference.items():
            if "magnitude" not in name:  # m stays as PEFT begins it: of |W'|, and B is 0 then
                tensor.copy_(torch.randn(tensor.shape) * 0.1 * ("lora_A" in name))
    found = []
    for model in (from_bitsandbytes(four_bits(architecture, dtype)), four_bits(architecture, dtype)):
        adapter = attach(model, config(r=4, alpha=8, targets=TARGETS[architecture]))
        tensors = file_tensors(adapter)
        assert {n: (p.shape, p.dtype) for n, p in tensors.items()} == {
            n: (p.shape, p.dtype) for n, p in reference.items()
        }
        with torch.no_grad():
            for name, tensor in tensors.items():
                if "magnitude" in name:
                    assert_near(tensor, reference[name], 1e-5 if dtype == torch.float32 else 1e-2)
                tensor.copy_(reference[name])
        found.append((model, tensors))
    return [*found, (theirs, reference)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture, dtype", BASES)
def test_the_same_losses_and_gradients(method, architecture, dtype, four_bits):
    losses, gradients = [], []
    for model, tensors in three(method, architecture, dtype, four_bits):
        model.train()
        inputs = batch(model)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        optimizer = torch.optim.AdamW(list(tensors.values()), lr=1e-2)
        losses.append([])
        for step in range(10):
            loss = model(**inputs, labels=labels).loss
            loss.backward()
            losses[-1].append(loss.item())
            if step < 2:  # at step 0 B is zero, and so is A's gradient
                grads = [tensors[n].grad.float().flatten() for n in sorted(tensors)]
                gradients.append(torch.cat(grads).clone())
            optimizer.step()
            optimizer.zero_grad()
    ours, over_theirs, reference = (torch.tensor(row) for row in losses)
    assert reference[0] - reference[-1] > 0.3
    of_loss, of_gradient = (1e-4, 1e-4) if dtype == torch.float32 else (2e-2, 5e-2)
    assert_near(ours, reference, of_loss)
    assert_near(over_theirs, reference, of_loss)
    for step in range(2):
        expected = gradients[4 + step]
        for found in (gradients[step], gradients[2 + step]):
            assert (found - expected).norm() < of_gradient * expected.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_files_both_ways(method, architecture, four_bits, tmp_path):
    """An adapter trained over either base is the other's too."""
    (model, tensors), _, (theirs, reference) = three(method, architecture, torch.float32, four_bits)
    with torch.no_grad():
        for name in tensors:
            shift = torch.randn(tensors[name].shape) * 0.1
            tensors[name].add_(shift)
            reference[name].add_(shift)
    expected = output(model.eval())
    adapters(model)["default"].save(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(four_bits(architecture), tmp_path / "ours").eval()
    assert_near(output(loaded), expected, 1e-5)
    for base in (from_bitsandbytes(four_bits(architecture)), four_bits(architecture)):
        base.eval()
        before = output(base)
        adapter = load_adapter(base, tmp_path / "theirs")
        assert_near(output(base), expected, 1e-5)
        with adapter.disabled():
            assert torch.equal(output(base), before)


def test_the_report_counts_numbers_over_either(four_bits):
    """Not bytes: 73,728 numbers in 4 bits, see test_quantized_models; two embeddings of 4,096 and five norms of 64."""
    beside = 2 * 64 * 64 + 5 * 64
    for model in (from_bitsandbytes(four_bits("llama")), four_bits("llama")):
        adapter = attach(model, LoRA(r=4, targets=("q_proj",)))
        trained = 2 * 4 * (64 + 64)
        assert f"trains {trained:,} of {beside + 73_728 + trained:,} numbers" in str(adapter)


def test_dora_begins_as_the_base(four_bits):
    """B is zero and m is |W'|, of the weight that the 4 bits stand for."""
    for model in (from_bitsandbytes(four_bits("llama")), four_bits("llama")):
        model.eval()
        before = output(model)
        attach(model, DoRA(targets="all-linear"))
        assert_near(output(model), before, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_stays_while_the_base_changes_hands(method, four_bits):
    """bitsandbytes' layers -> ours -> dense ones, under the same adapter."""
    model = four_bits("llama").eval()
    adapter = attach(model, METHODS[method][0](r=4, alpha=8, targets="all-linear", init="random_b"))
    expected = output(model)
    with pytest.raises(ValueError, match="dequantize it first"):
        adapter.merge(requantize=True)
    assert_near(output(from_bitsandbytes(model)), expected)
    assert_near(output(dequantize_base(model)), expected)
    adapter.merge()
    assert_near(output(model), expected)
