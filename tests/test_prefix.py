"""Prefix tuning: its equations by hand, what it does to a model, its files, and what it refuses."""

import math
import shutil

import pytest
import torch
import transformers as tf
from small_models import (
    COMMON,
    DECODERS,
    OPEN_ATTENTION,
    TOKENS,
    backward,
    batch,
    bits,
    logits,
    move,
    output,
    same_bits,
    shape_of,
    small_model,
)
from torch import nn

from utils import PrefixTuning, adapters, attach, load_adapter
from utils.attach import count_parameters
from utils.checkpoint import CONFIG, STATE, file_tensors
from utils.methods.prefix import (
    PositionShift,
    prefix_as_gate,
    prefix_attention,
    prefix_key_values,
    prefix_mlp,
    prefix_num_params,
)

needs_open_t5 = pytest.mark.skipif("t5" not in OPEN_ATTENTION, reason="T5's attention is in one piece here")
GENERATING = [a for a in (*DECODERS, "t5") if a in OPEN_ATTENTION]

# ---------------------------------------------------------------------------------------------- the equations


def test_layout_by_hand():
    rows = torch.arange(8.0).view(1, 8)  # one virtual token, two layers, two heads of one number each
    (key0, value0), (key1, value1) = prefix_key_values(rows, layers=2, heads=2)
    assert key0.shape == (2, 1, 1)
    found = [t.flatten().tolist() for t in (key0, value0, key1, value1)]
    assert found == [[0, 1], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match="8 columns cannot be 3 keys and values of 2 heads each"):
        prefix_key_values(rows, layers=3, heads=2)


def test_attention_by_hand():
    query, key, value = torch.zeros(1, 2), torch.ones(2, 2), torch.tensor([[3.0, 0.0], [0.0, 6.0]])
    prefix_key, prefix_value = torch.ones(1, 2), torch.tensor([[9.0, 9.0]])
    out = prefix_attention(query, key, value, prefix_key, prefix_value, 1.0)  # no score differs: the mean of three
    torch.testing.assert_close(out, torch.tensor([[4.0, 5.0]]))
    gate, text, prefix = prefix_as_gate(query, key, value, prefix_key, prefix_value, 1.0)
    torch.testing.assert_close(gate, torch.tensor([[1 / 3]]))
    torch.testing.assert_close(text, torch.tensor([[1.5, 3.0]]))
    torch.testing.assert_close(prefix, torch.tensor([[9.0, 9.0]]))


@pytest.mark.parametrize("scaling", [0.3, 1000.0])
def test_a_prefix_is_a_gated_sum(scaling):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(3))
    prefix_key, prefix_value = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(2))
    gate, text, prefix = prefix_as_gate(query, key, value, prefix_key, prefix_value, scaling)
    assert ((gate >= 0) & (gate <= 1)).all()
    whole = prefix_attention(query, key, value, prefix_key, prefix_value, scaling)
    torch.testing.assert_close((1 - gate) * text + gate * prefix, whole)


def test_network_by_hand():
    E, W1, b1 = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 1.0]]), torch.tensor([-3.0])
    W2, b2 = torch.ones(4, 1), torch.arange(4.0)
    assert prefix_mlp(E, W1, b1, W2, b2).tolist() == [[0, 1, 2, 3]]  # tanh(0) = 0
    found = prefix_mlp(E, W1, b1 + 1, W2, b2)
    torch.testing.assert_close(found, math.tanh(1) + torch.arange(4.0)[None])


def test_number_of_parameters():
    assert prefix_num_params(10, 24, 1024) == 491_520
    assert prefix_num_params(10, 24, 1024, hidden=512) == 25_750_016
    assert prefix_num_params(1, 1, 2, hidden=3, d=5) == 5 + 15 + 3 + 12 + 4


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("architecture, d_kv", [("llama", 32), ("llama_gqa", 16), ("gemma", 16), ("gpt2", 32)])
def test_adapters_train_that_many(architecture, d_kv, hidden):
    model = small_model(architecture)
    adapter = attach(model, PrefixTuning(5, hidden=hidden))
    assert count_parameters(model)[0] == prefix_num_params(5, 2, d_kv, hidden)
    assert file_tensors(adapter)["prompt_embeddings"].shape == (5, 2 * 2 * d_kv)
    kind = "flat" if hidden is None else "made by a network of width 6"
    assert f"5 virtual tokens, {kind}: 2 pairs of (5, {d_kv})" in str(adapter)


# ------------------------------------------------------------------------------------------------ in a model


def cached(model, prompt, heads):
    """The same, the other way: the prefix as a cache, ones in front of the mask, positions from l on."""
    inputs = batch(model)
    length = len(prompt)
    pairs = prefix_key_values(prompt, 2, heads)
    cache = tf.DynamicCache([tuple(t.expand(3, -1, -1, -1) for t in pair) for pair in pairs])
    mask = torch.cat([torch.ones(3, length, dtype=torch.long), inputs["attention_mask"]], 1)
    positions = torch.arange(length, length + 11)[None]
    return model(inputs["input_ids"], attention_mask=mask, past_key_values=cache, position_ids=positions).logits


@pytest.mark.parametrize("hidden", [None, 6])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture, heads", [("llama", 4), ("llama_gqa", 2), ("gemma", 1), ("gpt2", 4)])
def test_it_is_a_cache_of_keys_and_values(architecture, heads, implementation, hidden):
    model = small_model(architecture)
    model.set_attn_implementation(implementation)
    adapter = attach(model, PrefixTuning(5, hidden=hidden))
    with torch.no_grad():
        found = logits(model)
        prompt = file_tensors(adapter)["prompt_embeddings"]
        with adapter.disabled():
            expected = cached(model, prompt, heads)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", GENERATING)
def test_text_goes_on_from_a_cache_that_holds_text_only(architecture):
    """One pass over all tokens, and two passes with a cache between them, are the same."""
    model = small_model(architecture)
    attach(model, PrefixTuning(5))
    seq2seq = model.config.is_encoder_decoder
    key = "decoder_input_ids" if seq2seq else "input_ids"
    inputs = {k: v[:2] for k, v in batch(model).items()}  # without the padded one
    whole = model(**inputs).logits
    inputs.pop("attention_mask")
    first = model(**inputs | {key: inputs[key][:, :7]}, use_cache=True)
    cache = first.past_key_values
    assert cache.get_seq_length() == 7
    rest = model(**inputs | {key: inputs[key][:, 7:]}, past_key_values=cache).logits
    assert cache.get_seq_length() == 11
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=0, atol=2e-5)


GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def first_tokens():
    return torch.randint(3, 60, (1, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", DECODERS)
def test_generation_does_not_see_padding(architecture):
    model = small_model(architecture)
    attach(model, PrefixTuning(5))
    ids = first_tokens()
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    found = model.generate(padded, attention_mask=(torch.arange(10) >= 3).long()[None], **GREEDY)
    assert torch.equal(found[:, 3:], model.generate(ids, **GREEDY))


@pytest.mark.parametrize("architecture", GENERATING)
def test_generation_with_a_static_cache(architecture):
    """One that is longer than what is in it."""
    model = small_model(architecture)
    attach(model, PrefixTuning(5))
    expected = model.generate(first_tokens(), **GREEDY)
    found = model.generate(first_tokens(), cache_implementation="static", disable_compile=True, **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_two_forwards_before_two_backwards():
    """Nothing is kept from one forward for another, with recomputation between them either."""
    model = small_model("llama_gqa").train()
    adapter = attach(model, PrefixTuning(5, hidden=6))
    ids = batch(model)["input_ids"]

    def losses():
        return [model(part).logits.square().mean() for part in (ids[:1], ids[1:])]

    expected = [torch.autograd.grad(loss, adapter.parameters(), retain_graph=True) for loss in losses()]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for parameter, *wanted in zip(adapter.parameters(), *expected, strict=True):
        parameter.wanted = sum(wanted)
    for loss in losses():
        loss.backward()
    for parameter in adapter.parameters():
        torch.testing.assert_close(parameter.grad, parameter.wanted)


def test_a_window_never_loses_sight_of_the_prefix():
    settings = {"num_key_value_heads": 2, "num_hidden_layers": 1, "sliding_window": 4}
    model = tf.MistralForCausalLM(tf.MistralConfig(**COMMON | TOKENS | settings)).eval()
    adapter = attach(model, PrefixTuning(2))
    ids = batch(model)["input_ids"][:1]
    before = model(ids).logits
    move(adapter)
    assert ((model(ids).logits - before).abs().amax(-1) > 1e-6).all()  # token 10 too, seven past the window


def test_dropout_in_training_only_and_another_draw_for_each_sample():
    model = small_model("llama")
    adapter = attach(model, PrefixTuning(5, dropout=0.5))
    guest = adapter.parts["model.layers.0.self_attn"]
    keys = torch.zeros(3, 4, 11, 8)
    exact = torch.stack(guest.key_value(keys))
    model.train()
    dropped = torch.stack(guest.key_value(keys))
    assert dropped.shape == exact.shape == (2, 3, 4, 5, 8)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * exact[kept])  # 1 / (1 - p)
    assert 0.4 < kept.float().mean() < 0.6
    assert not torch.equal(kept[:, 0], kept[:, 1])


def test_positions():
    ids = torch.tensor([[0, 1, 2, 3]])
    rotary = nn.Module()
    args, kwargs = PositionShift(5).before(rotary, ("states",), {"position_ids": ids})
    assert args == ("states",) and kwargs["position_ids"].tolist() == [[5, 6, 7, 8]]
    (found,), _ = PositionShift(5).before(nn.Embedding(9, 2), (ids,), {})
    assert found.tolist() == [[5, 6, 7, 8]]
    (found,), _ = PositionShift(5).before(nn.Embedding(11, 2, padding_idx=1), (ids,), {})  # RoBERTa: 1 is no position
    assert found.tolist() == [[5, 1, 7, 8]]
    opt = nn.Embedding(11, 2)
    opt.offset = 2
    args, kwargs = PositionShift(5).before(opt, (), {"position_ids": ids - 1})  # OPT: -1 is no position
    assert kwargs["position_ids"].tolist() == [[-1, 5, 6, 7]]


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "bert", "roberta"])
def test_texts_need_room_for_the_prefix(architecture):
    model = small_model(architecture)
    room = 63 if architecture == "roberta" else 64  # RoBERTa counts from the padding's number on, 0 here
    adapter = attach(model, PrefixTuning(5))
    fits = torch.full((1, room - 5), 7)
    model(fits)
    with pytest.raises(ValueError, match=f"{room - 4} tokens and a prefix of 5 need more positions than the model's"):
        model(torch.cat([fits, fits[:, :1]], 1))
    with adapter.disabled():
        model(torch.cat([fits, fits[:, :1]], 1))


# ------------------------------------------------------------------------------------------- encoder-decoders


def t5(**extra):
    size = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return tf.T5Config(**size | {"decoder_start_token_id": 0, "dropout_rate": 0.0} | extra)


@needs_open_t5
@pytest.mark.parametrize("layers, slots", [(1, [0]), (2, [0, 0]), (3, [0, 2, 1]), (4, [0, 2, 0, 2])])
def test_decoders_share_out_the_pairs_as_peft_does(layers, slots):
    model = tf.T5ForConditionalGeneration(t5(num_decoder_layers=layers))
    adapter = attach(model, PrefixTuning(5))
    found = [part.slot for path, part in adapter.parts.items() if path.startswith("decoder")]
    assert found == slots
    assert not any(path.startswith("encoder") for path in adapter.parts)
    assert count_parameters(model)[0] == len(set(slots)) * 2 * 5 * 32
    written = file_tensors(adapter)["prompt_embeddings"]
    assert written.shape == (5, 2 * layers * 32)
    assert [i for i, pair in enumerate(written.split(64, 1)) if pair.any()] == sorted(set(slots))


@needs_open_t5
def test_heads_that_are_not_the_model_divided():
    """flan-t5-small: 6 heads of 64 in a model of width 512."""
    model = tf.T5ForConditionalGeneration(t5(d_kv=4, num_heads=6)).eval()
    base = output(model)
    adapter = attach(model, PrefixTuning(5))
    assert file_tensors(adapter)["prompt_embeddings"].shape == (5, 4 * 24)
    assert (output(model) - base).abs().max() > 1e-3


@needs_open_t5
def test_an_encoder_alone_is_refused():
    with pytest.raises(ValueError, match="goes into a decoder, and this T5EncoderModel has none"):
        attach(tf.T5EncoderModel(t5()), PrefixTuning(5))


# ------------------------------------------------------------------------------------------------------ files


def step(model, adapter):
    model.zero_grad()
    backward(logits(model))
    torch.optim.SGD(adapter.parameters(), lr=0.01).step()


def test_training_goes_on_from_the_network(tmp_path):
    model = small_model("llama_gqa")
    adapter = attach(model, PrefixTuning(5, hidden=6))
    step(model, adapter)
    adapter.save(tmp_path)
    other = small_model("llama_gqa")
    loaded = load_adapter(other, tmp_path)
    for _ in range(2):
        step(model, adapter)
        step(other, loaded)
    assert torch.equal(output(other), output(model))
    assert len(loaded.parameters()) == 7  # E, W1, b1 and two W2, two b2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_network_in_another_dtype_is_saved_and_loaded(dtype, tmp_path):
    model = small_model("llama_gqa")
    attach(model, PrefixTuning(5, hidden=6)).save(tmp_path / "before")
    model.to(dtype)  # base and adapter
    adapters(model)["default"].save(tmp_path / "after")
    for folder in ("before", "after"):
        other = small_model("llama_gqa", dtype)
        load_adapter(other, tmp_path / folder)
        assert (output(other) - output(model)).norm() < 0.05 * output(model).norm()


def test_without_the_network_a_prefix_goes_on_flat(tmp_path):
    model = small_model("llama_gqa")
    adapter = attach(model, PrefixTuning(5, hidden=6))
    adapter.save(tmp_path)
    (tmp_path / STATE).unlink()
    other = small_model("llama_gqa")
    loaded = load_adapter(other, tmp_path)
    assert torch.equal(output(other), output(model))
    assert "5 virtual tokens, flat" in str(loaded)
    assert count_parameters(other)[0] == prefix_num_params(5, 2, 16)
    before = file_tensors(loaded)["prompt_embeddings"]
    step(other, loaded)
    assert (file_tensors(loaded)["prompt_embeddings"] != before).all()
    loaded.save(tmp_path / "flat")
    assert '"prefix_projection": false' in (tmp_path / "flat" / CONFIG).read_text()
    third = small_model("llama_gqa")
    load_adapter(third, tmp_path / "flat")
    assert torch.equal(output(third), output(other))
    frozen = load_adapter(small_model("llama_gqa"), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_network_of_another_prefix_is_refused(tmp_path):
    for name in ("one", "two"):
        attach(small_model("llama"), PrefixTuning(5, hidden=6)).save(tmp_path / name)
    shutil.copy(tmp_path / "two" / STATE, tmp_path / "one" / STATE)
    model = small_model("llama")
    before, shape = bits(model), shape_of(model)
    with pytest.raises(ValueError, match="makes another prefix than the file holds"):
        load_adapter(model, tmp_path / "one")
    assert same_bits(bits(model), before) and shape_of(model) == shape


def test_another_model_is_refused(tmp_path):
    attach(small_model("llama"), PrefixTuning(5)).save(tmp_path)
    model = small_model("llama_gqa")
    shape = shape_of(model)
    with pytest.raises(ValueError, match="1 tensors have another shape: prompt_embeddings"):
        load_adapter(model, tmp_path)
    assert shape_of(model) == shape


# -------------------------------------------------------------------------------------------------- bad input


def test_no_merging():
    model = small_model("llama")
    adapter = attach(model, PrefixTuning(5))
    with pytest.raises(ValueError, match="Prefix adds keys and values, and is no change of a weight, so it cannot be"):
        adapter.merge()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; it must be a whole number from 1 up"),
        ({"hidden": 0}, "hidden is 0; it must be a whole number from 1 up"),
        ({"dropout": 1.0}, "dropout is 1.0; it is a probability"),
        ({"init_std": 0}, "init_std is 0; it must be a positive number"),
        ({"modules_to_save": 3}, "modules_to_save is 3"),
    ],
)
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PrefixTuning(**settings)


def test_layers_of_different_width_are_refused():
    model = small_model("llama")
    model.model.layers[1].self_attn.k_proj = nn.Linear(32, 16)
    with pytest.raises(ValueError, match=r"the layers' keys differ in width: \[16, 32\]"):
        attach(model, PrefixTuning(5))
