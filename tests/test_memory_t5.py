"""Memory of encoder-decoders, of the model's own dropout, of checkpointing in part, of accumulation and generation."""

import itertools

import pytest
import torch
import transformers as tf
from test_memory_activations import GPT2, OPT, SIZES, TOKENS, loss_of, make, of_today

from utils import IA3, DoRA, HoulsbyAdapter, LoRA, ParallelAdapter, PfeifferAdapter, PrefixTuning, PromptTuning, attach
from utils.architectures import known
from utils.measure import saved_bytes
from utils.memory.activations import Run
from utils.memory.blocks import activations, checkpointed
from utils.memory.estimate import estimate, generation, needs_of
from utils.memory.instruments import LiveBytes
from utils.memory.shapes import shape_of
from utils.memory.states import kv_cache, nf4_bytes

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
T5 = {
    "vocab_size": 97, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4,
    "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "use_cache": False,
}  # fmt: skip


def t5(attention, dtype, gated, dropout=0.0):
    forms = {True: "gated-gelu", False: "relu"}
    config = tf.T5Config(**T5, dropout_rate=dropout, feed_forward_proj=forms[gated], tie_word_embeddings=not gated)
    return tf.T5ForConditionalGeneration._from_config(config, attn_implementation=attention).to(dtype).train()


METHODS = {
    "full": None,
    "LoRA": LoRA(r=2, targets="all-linear", dropout=0.1),
    "LoRA, encoder": LoRA(r=2, targets=r"encoder.*SelfAttention\.v"),
    "DoRA": DoRA(r=2),
    "IA3": IA3(),
    "Houlsby": HoulsbyAdapter(size=4),
    "Pfeiffer": PfeifferAdapter(size=4),
    "Parallel": ParallelAdapter(size=4, reads="residual", scale="learned"),
    "Prompt Tuning": PromptTuning(num_virtual_tokens=5),
    "Prefix Tuning": PrefixTuning(num_virtual_tokens=5),
}
KINDS = list(itertools.product(("sdpa", "eager"), (torch.float32, torch.bfloat16)))


def counted_and_predicted(model, loss, batch, **options):
    shape = shape_of(model)
    ends, blocks = needs_of(model, shape)
    predicted = activations(shape, Run(*batch, ends, next(model.parameters()).dtype.itemsize, blocks=blocks, **options))
    return saved_bytes(loss, exclude=[model]), predicted.total


@of_today
@pytest.mark.parametrize("gated", [False, True], ids=["relu", "gated"])
@pytest.mark.parametrize("attention, dtype", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_t5(method, attention, dtype, gated):
    model = t5(attention, dtype, gated)
    if METHODS[method]:
        attach(model, METHODS[method])
        model.train()
    for batch, target in (((3, 11), 7), ((1, 12), 9)):
        ids, labels = torch.randint(3, 97, batch), torch.randint(3, 97, (batch[0], target))
        loss = lambda ids=ids, labels=labels: model(input_ids=ids, labels=labels).loss  # noqa: E731
        counted, predicted = counted_and_predicted(model, loss, batch, attention=attention, target=target)
        assert counted == predicted


WITH_DROPOUT = {
    "gpt2": lambda: (tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2 | TOKENS)),
    "bert": lambda: (tf.BertForSequenceClassification, tf.BertConfig(**SIZES, num_labels=3)),
    "opt": lambda: (tf.OPTForCausalLM, tf.OPTConfig(**OPT | TOKENS | {"dropout": 0.1})),
}


@of_today
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*WITH_DROPOUT, "t5"])
@pytest.mark.parametrize("method", ["full", "DoRA", "Houlsby"])
def test_dropout_of_the_model(method, name, dtype):
    if name == "t5":
        model = t5("eager", dtype, False, dropout=0.1)
    else:
        cls, config = WITH_DROPOUT[name]()
        model = cls._from_config(config, attn_implementation="eager").to(dtype).train()
    if METHODS[method]:
        attach(model, METHODS[method])
        model.train()
    ids, loss = loss_of(model, 3, 11)
    if name == "t5":
        labels = ids.clone()
        loss = lambda: model(input_ids=ids, labels=labels).loss  # noqa: E731
    counted, predicted = counted_and_predicted(model, loss, (3, 11), attention="eager", dropout=True)
    assert counted == predicted


def test_dropout_is_cheaper_on_cuda():
    run = {"batch": 2, "length": 64, "recipe": "fp32", "dropout": True}
    assert 4 * estimate("GPT-2", **run).kept["dropout"] == estimate("GPT-2", device="cpu", **run).kept["dropout"]


@pytest.mark.parametrize("first", [1, 2, 3])
def test_checkpointing_in_part(first):
    """The first blocks keep their inputs only: with transformers, by switching the others' checkpoints off again."""
    model = make("llama_gqa", "sdpa", torch.float32)
    attach(model, LoRA(r=2))
    model.gradient_checkpointing_enable()
    for layer in model.model.layers[first:]:
        layer.gradient_checkpointing = False
    model.train()
    shape = shape_of(model)
    ends, blocks = needs_of(model, shape)
    ids, loss = loss_of(model, 4, 16)
    with LiveBytes([*model.parameters(), *model.buffers(), ids]) as live:
        value = loss()
        after = live.mark("forward")
    assert value.isfinite()
    predicted = activations(shape, Run(4, 16, ends, blocks=blocks, checkpointing=first))
    assert predicted.total == pytest.approx(after, rel=0.01)
    assert [checkpointed(first, i) for i in range(3)] == [i < first for i in range(3)]


def test_accumulated_gradients_live_through_the_forward_pass():
    once, more = (estimate("GPT-2", batch=4, accumulate=k) for k in (1, 4))
    assert more.moments["loss"] == once.moments["loss"] + once.gradients
    assert more.moments["optimizer step"] == once.moments["optimizer step"]


@pytest.mark.parametrize("name", [n for n in known() if known()[n]["model"].startswith("T5")])
def test_every_t5_of_the_table_has_an_estimate(name):
    for method in (None, LoRA()):
        predicted = estimate(name, method, batch=2, length=128, target=32)
        assert predicted.total >= predicted.trained > 0 and predicted.peak > 4 * predicted.trained
        assert estimate(name, method, batch=2, length=128, target=32, checkpointing=True).peak <= predicted.peak


def test_generation():
    """Llama-2-7B: 13.5 GB of weights in 16 bits, half a mebibyte per token, logits of 32,000 in 2 and in 4 bytes."""
    whole = generation("Llama-2-7B", batch=3, length=100)
    assert whole.peak == 2 * 6_738_415_616 + 3 * 100 * 2**19 + 3 * 32000 * 6
    four = generation("Llama-2-7B", quantized=True)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert four.states["weights, 4 bits"] == nf4_bytes(linear)
    assert four.moments["last token"] == kv_cache(32, 32, 128, 1, 512) + 32000 * 6
