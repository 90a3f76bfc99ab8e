"""P-Tuning v2: the head beside the prefix, what it pools, its count, and its file."""

import json

import peft
import pytest
import torch
import transformers as tf
from peft_pair import QUIET, assert_near
from small_models import COMMON, ENCODERS, NO_DROPOUT, TOKENS, backward, batch, logits, move, output, small_model

from utils import PTuningV2, attach, load_adapter
from utils.attach import count_parameters
from utils.checkpoint import CONFIG, file_tensors
from utils.methods.ptuning_v2 import ptuning_v2_num_params

pytestmark = QUIET


def test_number_of_parameters():
    assert ptuning_v2_num_params(20, 24, 1024, 2) == 983_040 + 2_050
    model = small_model("bert")
    adapter = attach(model, PTuningV2(num_virtual_tokens=5))
    assert count_parameters(model)[0] == ptuning_v2_num_params(5, layers=2, d=32, classes=3)
    tensors = file_tensors(adapter)
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        "prompt_embeddings": (5, 2 * 2 * 32),
        "classifier.weight": (3, 32),
        "classifier.bias": (3,),
    }


@pytest.mark.parametrize("architecture", ENCODERS)
def test_the_head_sees_the_first_real_token(architecture):
    model = small_model(architecture)
    adapter = attach(model, PTuningV2(num_virtual_tokens=5))
    move(adapter)
    encoder = getattr(model, architecture)
    with torch.no_grad():
        states = encoder(**batch(model)).last_hidden_state  # (3, 11, 32): the prefix has no place in it
        seen = states if architecture == "roberta" else encoder.pooler(states[:, :1])
        expected = model.classifier(seen)
    assert states.shape == (3, 11, 32)
    assert_near(output(model), expected)


@pytest.mark.parametrize("architecture", ENCODERS)
def test_head_and_prefix_are_trained_together(architecture):
    model = small_model(architecture)
    head = {n: p.detach().clone() for n, p in model.classifier.named_parameters()}
    adapter = attach(model, PTuningV2(num_virtual_tokens=5, hidden=6))
    backward(logits(model.train()))
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    torch.optim.SGD(adapter.parameters(), lr=0.1).step()
    adapter.detach()
    assert all(torch.equal(p, head[n]) for n, p in model.classifier.named_parameters())  # the base's head was not


def test_dropout_is_the_papers_and_in_training_only():
    model = small_model("bert")
    attach(model, PTuningV2(num_virtual_tokens=5))
    assert torch.equal(output(model), output(model))
    model.train()
    assert not torch.equal(output(model), output(model))


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("architecture", ENCODERS)
def test_file_is_a_prefix_file_of_peft(architecture, hidden, tmp_path):
    model = small_model(architecture)
    adapter = attach(model, PTuningV2(num_virtual_tokens=5, hidden=hidden))
    move(adapter)
    adapter.save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["peft_type"] == "PREFIX_TUNING" and fields["task_type"] == "SEQ_CLS"
    theirs = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path)
    assert_near(output(theirs.eval()), output(model))
    other = small_model(architecture)
    loaded = load_adapter(other, tmp_path)
    assert type(loaded.config).__name__ == "PrefixTuning"
    assert torch.equal(output(other), output(model))


def test_token_classification():
    """The other task of the paper's kind: a label for every real token."""
    torch.manual_seed(0)
    model = tf.BertForTokenClassification(tf.BertConfig(**COMMON | TOKENS | NO_DROPOUT, num_labels=3)).eval()
    base = output(model)
    adapter = attach(model, PTuningV2(num_virtual_tokens=5))
    assert output(model).shape == base.shape == (3, 11, 3)
    assert (output(model) - base).abs().max() > 1e-4
    assert "classifier.weight" in file_tensors(adapter)


def test_a_model_without_a_head_is_refused():
    model = small_model("llama")
    with pytest.raises(ValueError, match="trains a head with the prefix, and this LlamaForCausalLM has none"):
        attach(model, PTuningV2())
    attach(model, PTuningV2(modules_to_save=("lm_head",)))
