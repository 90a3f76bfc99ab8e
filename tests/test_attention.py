"""Guests inside attention: what they see, what they may change, and that nothing else changes."""

import math
import pickle
from copy import deepcopy

import pytest
import torch
import transformers as tf
from small_models import COMMON, OPEN_ATTENTION, TOKENS, batch, logits, output, shape_of, small_model
from torch import nn

from utils import adapters, attach
from utils.methods.attention import AttentionGuest, attention_modules, widen_mask

needs_open_t5 = pytest.mark.skipif("t5" not in OPEN_ATTENTION, reason="T5's attention is in one piece here")
SOME = [a for a in ("llama_gqa", "gpt2", "bert", "t5") if a in OPEN_ATTENTION]


class Extra(AttentionGuest):
    """One key and one value in front, the same for every head: the least prefix there is."""

    def __init__(self, width=1):
        super().__init__()
        self.number = nn.Parameter(torch.linspace(0.5, 1, width).view(-1, 1))
        self.seen = []

    def tensors(self):
        return {"number": self.number}

    def attend(self, host, attention, query, key, value, mask, kwargs):
        width = len(self.number)
        wide = widen_mask(mask, width, host, query, key, kwargs)
        if "position_bias" in kwargs:
            kwargs = kwargs | {"position_bias": nn.functional.pad(kwargs["position_bias"], (width, 0))}
        rows = self.number.to(key.dtype).expand(*key.shape[:2], width, key.shape[3])
        return attention(query, torch.cat([rows, key], 2), torch.cat([rows, value], 2), wide, **kwargs)


class Twice(AttentionGuest):
    """Doubles what attention returns."""

    def tensors(self):
        return {}

    def attend(self, host, attention, query, key, value, mask, kwargs):
        out, weights = attention(query, key, value, mask, **kwargs)
        return 2 * out, weights


class Everywhere:
    """A configuration that puts one guest into every attention module."""

    modules_to_save = ()

    def __init__(self, kind=Extra):
        self.kind = kind

    def parts(self, model):
        return {path: self.kind() for path in attention_modules(model, "Extra")}


def hosts(model):
    return [model.get_submodule(path) for path in attention_modules(model, "Extra")]


def test_attention_by_hand():
    """One layer's attention, q, k and v caught on the way in, computed again with the extra key and value."""
    model = small_model("llama")
    calls = []

    class Watch(Extra):
        def attend(self, host, attention, query, key, value, mask, kwargs):
            out, weights = super().attend(host, attention, query, key, value, mask, kwargs)
            calls.append((query, key, value, kwargs["scaling"], out))
            return out, weights

    attach(model, Everywhere(Watch))
    ids = batch(model)["input_ids"][:1]
    model(ids)
    query, key, value, scaling, out = calls[0]
    n, hd = query.shape[2:]
    assert scaling == pytest.approx(1 / math.sqrt(hd))
    extra = torch.full((1, 4, 1, hd), 0.5)
    scores = query @ torch.cat([extra, key], 2).mT / math.sqrt(hd)  # (1, heads, n, 1 + n)
    later = torch.ones(n, 1 + n).triu(2).bool()  # column 0 is the extra one, which everyone sees
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    expected = (weights @ torch.cat([extra, value], 2)).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_guests_take_turns():
    """The last to enter is the outermost: it sees the output of the one before."""
    model = small_model("gpt2")
    query = torch.randn(1, 4, 3, 8)
    attach(model, Everywhere(Twice), "first")
    attach(model, Everywhere(Twice), "second")
    host = hosts(model)[0]
    call = tf.models.gpt2.modeling_gpt2.ALL_ATTENTION_FUNCTIONS[host.config._attn_implementation]
    with torch.no_grad():
        one, _ = call(host, query, query, query, None, scaling=1.0)
        for adapter in adapters(model).values():
            adapter._set_active(True)  # a method of several parts has them on together
        two, _ = call(host, query, query, query, None, scaling=1.0)
    assert torch.equal(two, 2 * one)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", OPEN_ATTENTION)
def test_off_is_the_base_and_leaving_gives_the_config_back(architecture, implementation):
    model = small_model(architecture)
    model.set_attn_implementation(implementation)
    base, shape, configs = output(model), shape_of(model), [host.config for host in hosts(model)]
    adapter = attach(model, Everywhere())
    on = output(model)
    assert (on - base).abs().max() > 1e-3
    with adapter.disabled():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), on)
    second = attach(model, Everywhere(), "second")
    adapter.detach()
    assert all(host.config is not config for host, config in zip(hosts(model), configs, strict=True))
    second.detach()
    assert torch.equal(output(model), base) and shape_of(model) == shape
    assert all(host.config is config for host, config in zip(hosts(model), configs, strict=True))


@pytest.mark.parametrize("architecture", OPEN_ATTENTION)
def test_sdpa_and_eager_agree_also_when_set_afterwards(architecture):
    model = small_model(architecture)
    model.set_attn_implementation("sdpa")
    attach(model, Everywhere())
    inputs = {k: v for k, v in batch(model).items() if k != "attention_mask"}  # without padding sdpa gets no mask
    with torch.no_grad():
        found, bare = output(model), model(**inputs).logits
        model.set_attn_implementation("eager")
        assert all(host.config._attn_implementation == "with_guests" for host in hosts(model))
        torch.testing.assert_close(output(model), found, rtol=0, atol=2e-5)
        torch.testing.assert_close(model(**inputs).logits, bare, rtol=0, atol=2e-5)


@needs_open_t5
def test_a_copy_has_a_config_of_its_own():
    model = small_model("t5")
    attach(model, Everywhere())
    on = output(model)
    twin = deepcopy(model)
    assert twin.decoder.config is not model.decoder.config
    assert hosts(twin)[-1].config.of_the_model is twin.decoder.config
    twin.set_attn_implementation("eager")
    assert hosts(model)[0].config.of_the_model._attn_implementation == "sdpa"
    adapters(twin)["default"].detach()
    assert hosts(twin)[-1].config is twin.decoder.config
    assert torch.equal(output(model), on)


def test_a_pickled_model_works_in_a_process_that_knows_no_guests(monkeypatch):
    model = small_model("llama_gqa")
    attach(model, Everywhere())
    on, file = output(model), pickle.dumps(model)
    monkeypatch.delitem(tf.modeling_utils.AttentionInterface._global_mapping, "with_guests")
    assert torch.equal(output(pickle.loads(file)), on)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("architecture", SOME)
def test_gradient_checkpointing_computes_the_same(architecture, reentrant):
    model = small_model(architecture).train()
    adapter = attach(model, Everywhere())
    model.enable_input_require_grads()  # the reentrant kind needs an input with a gradient
    expected = torch.autograd.grad(logits(model).square().sum(), adapter.parameters())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    logits(model).square().sum().backward()
    for parameter, gradient in zip(adapter.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-5)


def test_compiled_in_one_graph():
    model = small_model("llama_gqa")
    attach(model, Everywhere())
    expected = output(model)
    torch._dynamo.reset()
    found = output(torch.compile(model, backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------- masks


def widened(mask, width, n, m, implementation="sdpa", causal=True, **kwargs):
    """`widen_mask` for n queries and m keys."""
    host = nn.Module()
    host.config = tf.LlamaConfig()
    host.config.of_the_model = tf.LlamaConfig(attn_implementation=implementation)
    host.is_causal = causal
    return widen_mask(mask, width, host, torch.empty(1, 1, n, 4), torch.empty(1, 1, m, 4), kwargs)


def test_no_mask_of_a_causal_model_becomes_a_triangle_with_ones_in_front():
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(widened(None, 2, 3, 3)[0, 0], expected)
    assert torch.equal(widened(None, 2, 3, 3, is_causal=None)[0, 0], expected)
    static = widened(None, 2, 3, 4)[0, 0]  # a static cache is longer than what is in it
    assert torch.equal(static, torch.cat([expected, torch.zeros(3, 1).bool()], 1))


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 1, "m": 5},  # one new token sees all
        {"n": 3, "m": 3, "causal": False},
        {"n": 3, "m": 3, "is_causal": False},
        {"n": 3, "m": 3, "implementation": "eager"},  # which knows no causal flag
        {"n": 3, "m": 3, "implementation": "flash_attention_2"},  # which counts from the last key
    ],
)
def test_no_mask_stays_none_where_that_means_the_same(settings):
    assert widened(None, 2, **settings) is None


def test_masks_are_widened_on_the_left():
    yes = torch.tensor([[True, False], [True, True]])[None, None]
    assert widened(yes, 1, 2, 2)[0, 0].tolist() == [[True, True, False], [True, True, True]]
    added = torch.tensor([[0.0, -9.0], [0.0, 0.0]])[None, None]
    assert widened(added, 1, 2, 2, "eager")[0, 0].tolist() == [[0, 0, -9], [0, 0, 0]]
    rows = torch.tensor([[0, 1], [1, 1]])
    assert widened(rows, 2, 2, 2, "flash_attention_2").tolist() == [[1, 1, 0, 1], [1, 1, 1, 1]]
    assert widened(rows, 1, 2, 2, "flash_attention_2").dtype == rows.dtype


def test_masks_that_cannot_be_widened_are_refused():
    with pytest.raises(ValueError, match="BlockMasks of flex_attention cannot be widened"):
        widened(type("BlockMask", (), {})(), 1, 2, 2, "flex_attention")
    with pytest.raises(ValueError, match="sliding window would lose sight"):
        widened(None, 1, 2, 2, "flash_attention_2", sliding_window=4)


# ------------------------------------------------------------------------------------------------- bad input


def test_models_without_the_table_are_refused():
    with pytest.raises(ValueError, match="does not know where the family"):
        attach(nn.Linear(2, 2), Everywhere())
    model = small_model("gpt2")
    before = shape_of(model)
    hosts(model)[1].reorder_and_upcast_attn = True
    with pytest.raises(ValueError, match="reorder_and_upcast_attn computes in one piece"):
        attach(model, Everywhere())
    assert shape_of(model) == before


def test_attention_that_asks_no_table_is_refused(monkeypatch):
    model = small_model("llama")
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", lambda self, hidden_states: hidden_states)
    with pytest.raises(ValueError, match="LlamaAttention in this version of transformers computes it in one piece"):
        attach(model, Everywhere())


def test_no_layers():
    with pytest.raises(ValueError, match="found no layers"):
        attention_modules(tf.LlamaForCausalLM(tf.LlamaConfig(**COMMON | TOKENS | {"num_hidden_layers": 0})), "Extra")
