"""The formulas for what autograd keeps, against a count of it: equal to the byte on small models of six families."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
import transformers as tf

from utils import LoRA, attach
from utils.measure import saved_bytes
from utils.memory.activations import (
    LINEAR,
    Needs,
    Run,
    attention,
    attention_kept,
    block_kept,
    checkpoint_kept,
    everything,
)
from utils.memory.blocks import activations, llama_block
from utils.memory.instruments import LiveBytes
from utils.memory.shapes import shape_of

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
OPT = SIZES | {"ffn_dim": 88, "word_embed_proj_dim": 32, "dropout": 0.0}
BERT = SIZES | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 3}
MODELS = {
    "llama": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES | TOKENS)),
    "llama_gqa": lambda: (tf.LlamaForCausalLM, tf.LlamaConfig(**SIZES | TOKENS, num_key_value_heads=2)),
    "mistral": lambda: (tf.MistralForCausalLM, tf.MistralConfig(**SIZES | TOKENS, num_key_value_heads=1)),
    "qwen2": lambda: (tf.Qwen2ForCausalLM, tf.Qwen2Config(**SIZES | TOKENS, num_key_value_heads=2)),
    "gemma": lambda: (tf.GemmaForCausalLM, tf.GemmaConfig(**SIZES | TOKENS, num_key_value_heads=1, head_dim=16)),
    "gpt2": lambda: (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2 | NO_DROPOUT | TOKENS)),
    "opt": lambda: (tf.OPTForCausalLM, tf.OPTConfig(**OPT | TOKENS)),
    "bert": lambda: (tf.BertForSequenceClassification, tf.BertConfig(**BERT)),
}
def make(name, attention, dtype):
    cls, config = MODELS[name]()
    return cls._from_config(config, attn_implementation=attention).to(dtype).train()


def block_of(name):
    return {"llama_gqa": "llama", "mistral": "llama", "qwen2": "llama"}.get(name, name)


def choices(name):
    """What is trained: everything, or a LoRA on some of the linear layers."""
    linear = tuple(LINEAR[block_of(name)])
    return [None, linear, linear[:1], linear[-1:], linear[1:3]]


CASES = [
    pytest.param(*case, id="-".join(map(str, (*case[:2], case[2].itemsize, *(case[3] or ["full"]), case[4][0]))))
    for case in (
        (name, attention, dtype, chosen, batch)
        for name in MODELS
        for attention, dtype in itertools.product(("sdpa", "eager"), (torch.float32, torch.bfloat16))
        for chosen in choices(name)
        for batch in ((3, 11), (1, 40))
    )
]


def loss_of(model, batch, length):
    ids = torch.randint(3, 97, (batch, length))
    labels = torch.randint(3, (batch,)) if hasattr(model, "classifier") else ids
    return ids, lambda: model(input_ids=ids, labels=labels).loss


def prepared(name, attention, dtype, chosen):
    """A model, with LoRA on the chosen linear layers or fully trained, and the Needs that this means."""
    model = make(name, attention, dtype)
    if chosen is None:
        return model, everything(shape_of(model))
    attach(model, LoRA(r=2, targets=rf".*\.\d+\.({'|'.join(map(re.escape, chosen))})"))
    return model, Needs(frozenset(LINEAR[block_of(name)][c] for c in chosen))


# Older torch has no fused kernel for shared keys on a CPU, and older transformers keep a number more here and there.
of_today = pytest.mark.skipif(torch.__version__ < "2.13", reason="the formulas are of what the pinned versions keep")


def test_there_are_enough_cases():
    assert len(CASES) >= 200


@of_today
@pytest.mark.parametrize("name, attention, dtype, chosen, batch", CASES)
def test_formulas_equal_the_count(name, attention, dtype, chosen, batch):
    model, needs = prepared(name, attention, dtype, chosen)
    _, loss = loss_of(model, *batch)
    kept = activations(shape_of(model), Run(*batch, needs, dtype.itemsize, attention))
    assert kept.total == saved_bytes(loss, exclude=[model])


@of_today
@pytest.mark.parametrize("chosen", [None, ("self_attn.q_proj", "self_attn.v_proj")], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["llama_gqa", "gemma"])
def test_checkpointing_keeps_the_inputs_of_blocks(name, chosen):
    """Counted as live bytes: what a checkpoint holds on to does not pass through autograd's own list."""
    model, needs = prepared(name, "sdpa", torch.float32, chosen)
    shape, run = shape_of(model), Run(4, 16, needs, checkpointing=True)
    model.gradient_checkpointing_enable()
    ids, loss = loss_of(model, 4, 16)
    with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
        value = loss()
        after = live.mark("forward")
    assert value.isfinite()
    assert abs(activations(shape, run).total / after - 1) < 0.01


def test_one_block_by_hand_and_by_parts():
    """The formula that stands alone, for full fine-tuning with sdpa, is what the parts of a block add up to."""
    shape = shape_of(make("llama_gqa", "sdpa", torch.float32))
    for e in (2, 4):
        run = Run(3, 11, everything(shape), e)
        alone = block_kept(33, shape.d, shape.d_ff, shape.heads, shape.kv_heads, shape.head_dim, e)
        assert alone == llama_block(run, shape, True).total
        for kernel in ("sdpa", "eager"):
            own = attention_kept(33, 11, shape.heads, shape.kv_heads, shape.head_dim, e, kernel)
            assert own == attention(replace(run, attention=kernel), shape, (True, True, True))
    # one token, d = d_ff = head_dim = 1, e = 2: norms 2 (4 + 4 + 2), inputs 2 (2 + 1), attention 2 x 4 + 4, product 6
    assert block_kept(1, 1, 1, 1, 1, 1, 2) == 20 + 6 + 12 + 6


def test_checkpoints():
    assert checkpoint_kept(layers=12, block=100, boundary=4) == 12 * 4 + 100
    assert checkpoint_kept(layers=12, block=100, boundary=4, every=5) == 3 * 4 + 5 * 100
    assert checkpoint_kept(layers=12, block=100, boundary=4, every=50) == 4 + 12 * 100
