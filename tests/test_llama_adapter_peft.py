"""LLaMA-Adapter and PEFT's AdaptionPrompt on the same numbers: outputs, gradients, text, files in both directions."""

import peft
import pytest
import torch
import transformers as tf
from peft_pair import QUIET, assert_near, output_and_gradient, pair, their_tensors
from small_models import COMMON, TOKENS, batch, logits, move, output, small_model

from utils import LlamaAdapter, attach, load_adapter
from utils.checkpoint import file_tensors

pytestmark = QUIET
IN_PEFT = ("llama", "llama_gqa", "mistral", "gpt2")


def prompts(architecture, layers=2, dtype=torch.float32):
    """(our model, its adapter, PEFT's model), with the same prompts for every dtype: PEFT draws them in the base's."""
    theirs = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=layers, task_type="CAUSAL_LM")
    found = pair(architecture, LlamaAdapter(adapter_len=5, adapter_layers=layers), theirs, dtype)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, other in their_tensors(found[2]).items():
            other.copy_(torch.randn(other.shape, generator=g))
            file_tensors(found[1])[name].copy_(other)
    return found


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("architecture", IN_PEFT)
def test_outputs_gradients_and_files(architecture, layers, tmp_path):
    model, adapter, reference = prompts(architecture, layers)
    expected, gradient = output_and_gradient(reference, their_tensors(reference))
    found, own_gradient = output_and_gradient(model, file_tensors(adapter))
    assert_near(found, expected)
    assert_near(own_gradient, gradient)
    with adapter.disabled():
        assert (output(model).flatten() - expected).abs().max() > 0.01

    adapter.save(tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "ours")
    assert_near(output(loaded).flatten(), expected)
    reference.save_pretrained(tmp_path / "theirs")
    model = small_model(architecture)
    again = load_adapter(model, tmp_path / "theirs")
    assert_near(output(model).flatten(), expected)
    assert (again.config.adapter_len, again.config.adapter_layers) == (5, layers)


@pytest.mark.parametrize("architecture", IN_PEFT)
def test_bfloat16(architecture):
    """The base in bfloat16; PEFT's prompts too, ours in float32. A gate has one gradient, a sum that cancels a lot."""
    _, _, exact = prompts(architecture)
    model, adapter, reference = prompts(architecture, dtype=torch.bfloat16)
    exact = output_and_gradient(exact, their_tensors(exact))
    reference = output_and_gradient(reference, their_tensors(reference))
    found = output_and_gradient(model, file_tensors(adapter))
    for tolerance, own, theirs, true in zip((0.03, 0.15), found, reference, exact, strict=True):
        assert (own - theirs).norm() < tolerance * true.norm()
        assert (own - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("architecture", IN_PEFT)
def test_generation_token_for_token(architecture):
    model, adapter, reference = prompts(architecture)
    inputs = {k: v.flip(1) for k, v in batch(model).items()}  # padding on the left
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, **settings)
    assert found.tolist() == reference.generate(**inputs, **settings).tolist()


def test_heads_that_are_not_the_width_divided():
    """PEFT takes d / (width of k) for the number of queries that share a key: 32 / 32 = 1 here, where it is 2."""
    shape = COMMON | TOKENS | {"num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).eval()
    theirs = peft.AdaptionPromptConfig(adapter_len=5, adapter_layers=1, task_type="CAUSAL_LM")
    reference = peft.get_peft_model(model, theirs)
    with pytest.raises(RuntimeError, match="shape"):
        logits(reference)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).eval()
    base = output(model)
    attach(model, LlamaAdapter(adapter_len=5, gate_init=1.0))
    assert (output(model) - base).abs().max() > 0.01


def test_a_classification_head_goes_with_it(tmp_path):
    """PEFT trains no head beside its prompts, and puts the one of our file in its place."""

    def classifier():
        torch.manual_seed(0)
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "num_labels": 3}
        return tf.GPT2ForSequenceClassification(tf.GPT2Config(vocab_size=64, **size | TOKENS)).eval()

    model = classifier()
    adapter = attach(model, LlamaAdapter(adapter_len=3))
    move(adapter)
    assert "score.weight" in file_tensors(adapter)
    adapter.save(tmp_path / "ours")
    with pytest.warns(UserWarning, match="Unexpected keyword arguments .'modules_to_save'."):
        loaded = peft.PeftModel.from_pretrained(classifier(), tmp_path / "ours")
    assert_near(output(loaded), output(model))
    loaded.save_pretrained(tmp_path / "theirs")
    assert not load_adapter(classifier(), tmp_path / "theirs").config.modules_to_save


def test_families_that_peft_lacks(tmp_path):
    adapter = attach(small_model("gemma"), LlamaAdapter(adapter_len=5))
    adapter.save(tmp_path)
    with pytest.raises(ValueError, match="Unsupported model type for adaption prompt: 'gemma'"):
        peft.PeftModel.from_pretrained(small_model("gemma"), tmp_path)
