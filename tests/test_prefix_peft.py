"""Prefix tuning agrees with PEFT's: outputs, gradients, generation, files. Where PEFT's does not work, ours does."""

import peft
import pytest
import torch
import transformers as tf
from peft_pair import QUIET, assert_near, task
from small_models import COMMON, DECODERS, OPEN_ATTENTION, TOKENS, backward, batch, logits, output, small_model

from utils import PrefixTuning, attach, load_adapter
from utils.checkpoint import STATE

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:Passing a tuple of `past_key_values`"),
]


def reference_of(architecture, dtype=torch.float32, **settings):
    """PEFT's prefix tuning on a small model, 5 virtual tokens."""
    torch.manual_seed(0)
    config = peft.PrefixTuningConfig(task_type=task(architecture), num_virtual_tokens=5, **settings)
    return peft.get_peft_model(small_model(architecture, dtype), config).eval()


def theirs(reference):
    """PEFT's trained tensors: (prompt or E, W1, b1, W2, b2)."""
    return list(reference.prompt_encoder["default"].parameters())


def as_pairs(root, tensor):
    """The rows of a tensor of PEFT's, or the columns of its prompt, that our layers use."""
    split = tensor.split(2 * root.shape[1], dim=0 if root.mlp else 1)
    return [split[i] for i in root.used]


def in_our_order(root, tensors):
    """PEFT's tensors cut up as ours are, in the order of `root.tensors()`."""
    if not root.mlp:
        return as_pairs(root, tensors[0])
    E, W1, b1, W2, b2 = tensors
    return [E, W1, b1, *(t for pair in zip(as_pairs(root, W2), as_pairs(root, b2), strict=True) for t in pair)]


def pair(architecture, hidden=None, dtype=torch.float32):
    """(our model, its adapter, PEFT's model), equal in all numbers. A head starts in both as the base's."""
    network = {"prefix_projection": True, "encoder_hidden_size": hidden} if hidden else {}
    reference = reference_of(architecture, dtype, **network)
    model = small_model(architecture, dtype)
    adapter = attach(model, PrefixTuning(5, hidden=hidden))
    root = adapter.parts[""]
    with torch.no_grad():
        for own, other in zip(root.tensors().values(), in_our_order(root, theirs(reference)), strict=True):
            own.copy_(other)
    return model, adapter, reference


@pytest.mark.parametrize("architecture", OPEN_ATTENTION)
@pytest.mark.parametrize("hidden", [None, 6])
def test_output_and_gradient(architecture, hidden):
    model, adapter, reference = pair(architecture, hidden)
    found, expected = logits(model), logits(reference)
    assert_near(found, expected)
    backward(found)
    backward(expected)
    root = adapter.parts[""]
    gradients = in_our_order(root, [p.grad for p in theirs(reference)])
    for own, other in zip(root.tensors().values(), gradients, strict=True):
        assert_near(own.grad, other)
    assert sum(g.abs().sum() for g in gradients).item() == pytest.approx(
        sum(p.grad.abs().sum() for p in theirs(reference)).item()  # what we do not train has no gradient there
    )


@pytest.mark.parametrize("architecture", OPEN_ATTENTION)
def test_bf16(architecture):
    model, _, reference = pair(architecture, dtype=torch.bfloat16)
    found, expected = output(model).float(), output(reference).float()
    assert (found - expected).norm() <= 0.03 * expected.norm()


@pytest.mark.parametrize("architecture", [a for a in (*DECODERS, "t5") if a in OPEN_ATTENTION])
def test_generation_token_for_token(architecture):
    model, _, reference = pair(architecture)
    ids = torch.randint(3, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[2, :6] = 0  # padding on the left
    ids = ids * mask
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    found = model.generate(input_ids=ids, attention_mask=mask, **settings)
    expected = reference.generate(input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("architecture", OPEN_ATTENTION)
def test_ours_is_read_by_peft(architecture, hidden, tmp_path):
    model, adapter, _ = pair(architecture, hidden)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path)
    assert_near(output(theirs.eval()), output(model))


@pytest.mark.parametrize("architecture", [a for a in OPEN_ATTENTION if a != "t5"])
def test_a_model_without_head(architecture, tmp_path):
    """PEFT, told of no task, would leave the prefix out."""
    bare = small_model(architecture).base_model
    attach(bare, PrefixTuning(5)).save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(small_model(architecture).base_model, tmp_path).eval()
    inputs = batch(bare)
    with torch.no_grad():
        assert_near(theirs(**inputs)[0], bare(**inputs)[0])


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("architecture", OPEN_ATTENTION)
def test_peft_is_read_by_us(architecture, hidden, tmp_path):
    _, _, reference = pair(architecture, hidden)
    reference.save_pretrained(tmp_path)
    model = small_model(architecture)
    adapter = load_adapter(model, tmp_path)
    assert_near(output(model), output(reference))
    assert all(p.requires_grad for p in adapter.parameters())
    adapter.save(tmp_path / "again")
    assert not (tmp_path / "again" / STATE).exists()  # PEFT keeps no network: what is loaded is a flat prefix
    again = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "again")
    assert_near(output(again.eval()), output(reference))


@pytest.mark.skipif("t5" not in OPEN_ATTENTION, reason="T5's attention is in one piece here")
def test_heads_that_are_not_the_model_divided(tmp_path):
    """Our file says how wide the keys are; by itself PEFT divides the model's width by the heads, and fails."""
    size = {"vocab_size": 64, "d_model": 32, "d_kv": 4, "d_ff": 48, "num_layers": 2, "num_heads": 6}
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(tf.T5Config(**size, decoder_start_token_id=0, dropout_rate=0.0)).eval()
    adapter = attach(model, PrefixTuning(5))
    adapter.save(tmp_path)
    found = output(model)
    adapter.detach()
    assert_near(output(peft.PeftModel.from_pretrained(model, tmp_path).eval()), found)


# -------------------------------------------------------------------------------------- where PEFT's does not work


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_which_peft_refuses(reentrant):
    base = small_model("llama_gqa")
    base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        peft.get_peft_model(base, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5))

    model, adapter, reference = pair("llama_gqa", hidden=6)
    backward(logits(reference))
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    backward(logits(model))
    gradients = in_our_order(adapter.parts[""], [p.grad for p in theirs(reference)])
    for own, other in zip(adapter.parameters(), gradients, strict=True):
        assert_near(own.grad, other)


def test_switching_bert_off_which_breaks_in_peft():
    model, adapter, reference = pair("bert")
    base = output(small_model("bert"))
    with pytest.raises(UnboundLocalError), reference.disable_adapter():
        pass
    with adapter.disabled():
        assert torch.equal(output(model), base)


def test_a_window_behind_which_peft_loses_the_prefix():
    settings = {"num_key_value_heads": 2, "num_hidden_layers": 1, "sliding_window": 4}
    torch.manual_seed(0)
    model = tf.MistralForCausalLM(tf.MistralConfig(**COMMON | TOKENS | settings)).eval()
    reference = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    ids = batch(model)["input_ids"][:1]
    before = reference(ids).logits
    with torch.no_grad():
        theirs(reference)[0].mul_(2)
    moved = (reference(ids).logits - before).abs().amax(-1)[0] > 1e-6
    assert moved[:3].all() and not moved[4:].any()  # tests/test_prefix.py: with ours every token sees it


def test_peft_runs_its_network_once_for_each_sample():
    model, adapter, reference = pair("llama", hidden=6)
    rows = []
    hook = reference.prompt_encoder["default"].transform.register_forward_hook(
        lambda module, args, out: rows.append(out.shape[:2])
    )
    logits(reference)
    hook.remove()
    assert rows == [(3, 5)]
    assert adapter.parts[""].pair(0).shape[0] == 5  # ours makes the 5 virtual tokens and shows them to all 3 samples
