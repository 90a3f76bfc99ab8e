"""MAM and UniPELT: numbers done by hand, AdapterHub's library, and what gates do with padding and in generation."""

import copy
import json
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from peft_pair import assert_near
from small_models import DECODERS, OPEN_ATTENTION, batch, move, output, small_model
from test_adapters_library import base_model, recorded, their_name

from utils import MAM, UniPELT, adapters, attach, load_adapter
from utils.checkpoint import CONFIG, STATE
from utils.methods.families import family_of
from utils.methods.mam import mam_num_params
from utils.methods.prefix import PositionShift
from utils.methods.unipelt import Gate, gated_lora, gated_prefix, real_tokens, unipelt_gate, unipelt_num_params

UNIPELT = UniPELT(num_virtual_tokens=3, hidden=None, size=4, r=3, adapter_init="bert", lora_init="random_b")

# ------------------------------------------------------------------------------------------------ by hand


def test_a_gate_is_a_mean_of_sigmoids():
    """sigmoid(0) = 1/2 and sigmoid(ln 3) = 3/4, so the mean of both is 5/8, and without the second token 1/2."""
    x, w = torch.tensor([0.0, math.log(3)]).view(1, 2, 1), torch.ones(1, 1)
    assert unipelt_gate(x, w, torch.zeros(1)).item() == 0.625
    assert unipelt_gate(x, w, torch.zeros(1), torch.tensor([[True, False]])).item() == 0.5
    torch.testing.assert_close(unipelt_gate(x[:, :1], w, torch.tensor([math.log(3)])), torch.tensor([[0.75]]))


def test_several_gates_several_texts_and_one_of_padding_alone():
    x = torch.tensor([[[1.0, 0], [0, 1]], [[0, 0], [5, 5]]])
    w, real = torch.tensor([[math.log(3), 0], [0, math.log(3)], [0, 0]]), torch.tensor([[True, True], [True, False]])
    expected = torch.tensor([[0.625, 0.625, 0.5], [0.5, 0.5, 0.5]])
    torch.testing.assert_close(unipelt_gate(x, w, torch.zeros(3), real), expected)
    assert not unipelt_gate(x, w, torch.zeros(3), torch.zeros(2, 2, dtype=torch.bool)).any()  # and no NaN


def test_a_gated_lora():
    """A x = 2. B A x = (2, 4, 6), and each third of it times its own gate."""
    x, A, B = torch.tensor([[[1.0, 1.0]]]), torch.ones(1, 2), torch.tensor([[1.0], [2.0], [3.0]])
    assert gated_lora(x, A, B, torch.tensor([[0.5]])).flatten().tolist() == [1, 2, 3]
    assert gated_lora(x, A, B, torch.tensor([[1.0, 0.5, 0.25]])).flatten().tolist() == [2, 2, 1.5]


def test_a_gate_of_a_lora_differs_between_texts():
    x = torch.randn(2, 3, 4)
    A, B = torch.randn(2, 4), torch.randn(6, 2)
    found = gated_lora(x, A, B, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    plain = x @ A.T @ B.T
    torch.testing.assert_close(found[0, :, :3], plain[0, :, :3])
    torch.testing.assert_close(found[1, :, 3:], 2 * plain[1, :, 3:])
    assert not found[0, :, 3:].any() and not found[1, :, :3].any()


def test_a_gated_prefix_has_gated_keys_and_values():
    keys, values = torch.ones(2, 1, 1, 1), torch.full((2, 1, 1, 1), 4.0)
    keys, values = gated_prefix(keys, values, torch.tensor([[0.5], [0.25]]))
    assert keys.flatten().tolist() == [0.5, 0.25] and values.flatten().tolist() == [2, 1]


CAUSAL = torch.ones(3, 3).tril()


@pytest.mark.parametrize(
    "mask, expected",
    [
        (CAUSAL * torch.tensor([1.0, 1, 0]), [True, True, False]),  # padded on the right
        (CAUSAL * torch.tensor([0.0, 1, 1]), [False, True, True]),  # on the left
        (torch.tensor([[1.0, 1, 0]]), [True, True, False]),  # BERT's, the same for all queries
        (torch.cat([CAUSAL, torch.zeros(3, 2)], dim=1), [True, True, True]),  # with empty places of a cache
    ],
)
def test_real_tokens_are_those_that_may_be_looked_at(mask, expected):
    seen = mask.bool()[None, None]  # (1, 1, n, m)
    added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    assert real_tokens(seen, 3).tolist() == [expected]
    assert real_tokens(added, 3).tolist() == [expected]


def test_other_masks():
    assert real_tokens(None, 3) is None
    assert real_tokens(torch.tensor([[0, 1, 1]]), 3).tolist() == [[False, True, True]]
    with pytest.raises(ValueError, match="UniPELT finds no padding in a str: use the attention 'sdpa' or 'eager'"):
        real_tokens("mask", 3)


def test_counts():
    assert mam_num_params(12, 768, hidden=None) == 552_960 + 7_091_712
    assert mam_num_params(12, 768) == 15_402_272 + 7_091_712
    assert unipelt_num_params(12, 768) == 1_410_672
    small = {"num_virtual_tokens": 5, "hidden": 8, "modules_to_save": ()}
    adapter = attach(small_model("opt"), MAM(**small))
    assert sum(p.numel() for p in adapter.parameters()) == mam_num_params(2, 32, 5, 8)
    adapter = attach(small_model("bert"), UniPELT(size=4, r=3, **small))
    assert sum(p.numel() for p in adapter.parameters()) == unipelt_num_params(2, 32, 5, 8, size=4, r=3)


# -------------------------------------------------------------------------------------- AdapterHub's library

LIBRARY = ("bert", "roberta", "gpt2", "llama")
MIX = MAM(num_virtual_tokens=3, hidden=6, reduction=4, reads="residual", modules_to_save=())
GATED = UniPELT(num_virtual_tokens=3, hidden=6, reduction=4, r=2, modules_to_save=())
LORA = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B"}


def own_tensors(architecture, model, adapter):
    """(the library's name, our tensor, what makes a tensor of theirs one of ours) of everything that is trained."""
    (family,) = family_of(model, "the test")
    pool = f"{family.layers(model)[0]}.{family.attention}.prefix_tuning.pool.prefix_tunings.x.self_prefix"
    for path, part in adapter.parts.items():
        for key, tensor in part.tensors().items():
            if path == "":
                slot = re.search(r"pairs\.(\d+)", key)
                width = 2 * model.config.hidden_size
                rows = slice(int(slot[1]) * width, (int(slot[1]) + 1) * width) if slot else slice(None)
                name = {"embedding": "wte.weight"}.get(key, key)
                name = re.sub(r"pairs\.\d+", "control_trans.2", name).replace("inner", "control_trans.0")
                yield f"{pool}.{name}", tensor, lambda t, rows=rows: t[rows]
            elif path.endswith("." + family.attention):
                yield f"{path}.prefix_tuning.prefix_gates.x.{key.removeprefix('gate.')}", tensor, lambda t: t
            elif "lora_A.weight" in part.tensors():
                yield f"{path}.loras.x.{LORA.get(key, key)}", tensor, FUSED[key] if "c_attn" in path else lambda t: t
            elif key.startswith("gate."):
                name = their_name(architecture, model, path, "up.bias")
                yield name.replace("adapter_up.bias", key), tensor, lambda t: t
            else:
                yield their_name(architecture, model, path, key), tensor, lambda t: t


def fused(part):
    """A tensor of theirs for q and v as one for q, k and v: nothing for k."""
    q, v = part.chunk(2)
    return torch.cat([q, torch.zeros_like(q), v])


def fused_b(B):
    """Their B (2 d, r), by parts, as ours (3 d, 2 r), block by block."""
    q, v = B.chunk(2)
    none = torch.zeros_like(q)
    return torch.cat([torch.cat([q, none], 1), torch.cat([none, none], 1), torch.cat([none, v], 1)])


FUSED = {"lora_A.weight": lambda A: A, "lora_B.weight": fused_b, "gate.weight": fused, "gate.bias": fused}


def with_their_numbers(method, architecture, config):
    """(model, adapter, what was recorded of the base, of the method, [(name, ours, how theirs becomes ours)])."""
    model, base = base_model(architecture)
    theirs, _ = recorded(f"{method}_{architecture}")
    if architecture == "gpt2" and method == "unipelt":
        config = replace(config, r=4)  # for q and v together
    adapter = attach(model, config)
    own = list(own_tensors(architecture, model, adapter))
    assert {name for name, *_ in own} == theirs["tensor"].keys()
    with torch.no_grad():
        for name, tensor, taken in own:
            assert tensor.shape == taken(theirs["tensor"][name]).shape, name
            tensor.copy_(taken(theirs["tensor"][name]))
    return model, base, theirs, own


def compare(model, base, theirs, own):
    found = model(**base["input"]).logits
    assert (found - base["logits"][""]).abs().max() > 0.05
    assert_near(found, theirs["logits"][""])
    (found * base["loss_weights"][""]).sum().backward()
    for name, tensor, taken in own:
        expected = taken(theirs["gradient"][name])
        there = expected != 0  # where GPT-2's fused LoRA has blocks that theirs has not
        assert_near(tensor.grad[there], expected[there])


@pytest.mark.parametrize("architecture", LIBRARY)
def test_mam_is_theirs(architecture):
    compare(*with_their_numbers("mam", architecture, MIX))


@pytest.mark.parametrize("architecture", LIBRARY)
def test_unipelt_is_theirs_where_nothing_is_padded(architecture):
    """The first text of the recorded batch has no padding; the second has, and they count it."""
    model, base, theirs, _ = with_their_numbers("unipelt", architecture, GATED)
    with torch.no_grad():
        found, expected = model(**base["input"]).logits, theirs["logits"][""]
    assert base["input"]["attention_mask"].sum(1).tolist() == [7, 5]
    assert_near(found[0], expected[0])
    assert (found[1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("architecture", LIBRARY)
def test_unipelt_is_theirs_but_for_the_padding(architecture, monkeypatch):
    monkeypatch.setattr("utils.methods.unipelt.real_tokens", lambda mask, n: None)
    compare(*with_their_numbers("unipelt", architecture, GATED))


# ------------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [a for a in OPEN_ATTENTION if a not in ("llama", "qwen2")])
def test_padding_changes_no_text(architecture, implementation):
    """On the right, and for language models on the left, with the positions that `generate` gives them."""
    model = small_model(architecture)
    model.set_attn_implementation(implementation)
    attach(model, UNIPELT)
    ids = torch.randint(3, 64, (1, 6))
    more = {"decoder_input_ids": ids} if architecture == "t5" else {}
    none, mask = torch.zeros(1, 3, dtype=torch.long), torch.ones(1, 6, dtype=torch.long)
    alone = model(input_ids=ids, **more).logits
    padded = {"input_ids": torch.cat([ids, none], 1), "attention_mask": torch.cat([mask, none], 1)}
    found = model(**padded, **more).logits
    torch.testing.assert_close(found[:, : alone.shape[1]], alone, rtol=0, atol=1e-5)
    if architecture in DECODERS:
        padded = {"input_ids": torch.cat([none, ids], 1), "attention_mask": torch.cat([none, mask], 1)}
        positions = torch.cat([none, torch.arange(6)[None]], 1)
        found = model(**padded, position_ids=positions).logits
        torch.testing.assert_close(found[:, 3:], alone, rtol=0, atol=1e-5)


def test_two_batches_with_other_padding_under_checkpointing():
    """The first batch is computed again after the second has left other gates behind."""
    model = small_model("llama")
    adapter = attach(model, UNIPELT)
    first, second = batch(model), {k: v[1:, :5] for k, v in batch(model).items()}

    def gradients():
        model.zero_grad()
        (model(**first).logits.square().mean() + model(**second).logits.square().mean()).backward()
        return [p.grad for p in adapter.parameters()]

    expected = gradients()
    with warnings.catch_warnings():  # transformers 5.23 would have another name for it
        warnings.simplefilter("ignore", FutureWarning)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for grad, other in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------- generation

SOME = [a for a in ("llama_gqa", "gpt2", "opt", "t5") if a in OPEN_ATTENTION]
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize("architecture", ["llama_gqa", "gemma", "gpt2", "opt"])
def test_a_text_keeps_the_gates_of_its_prompt(architecture, monkeypatch):
    """A step with a cache is a pass over all tokens with the prompt's gates."""
    model = small_model(architecture)
    attach(model, UNIPELT)
    inputs = {k: v.flip(1) for k, v in batch(model).items()}
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        start = model(**inputs, position_ids=positions, use_cache=True)
        kept = dict(start.past_key_values.unipelt_gates)
        assert all(0 < g.min() and g.max() < 1 for g in kept.values()) and len(kept) >= 6
        copied = copy.deepcopy(start.past_key_values)
        token = start.logits[:, -1:].argmax(-1)
        longer = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], dim=1)
        step = {"input_ids": token, "attention_mask": longer, "position_ids": positions[:, -1:] + 1}
        found = model(**step, past_key_values=start.past_key_values).logits[:, -1]
        again = model(**step, past_key_values=copied).logits[:, -1]
        everything = {
            "input_ids": torch.cat([inputs["input_ids"], token], 1),
            "attention_mask": longer,
            "position_ids": torch.cat([positions, positions[:, -1:] + 1], 1),
            "use_cache": False,
        }
        other = model(**everything).logits[:, -1]
        monkeypatch.setattr(Gate, "forward", lambda gate, x: kept[gate.name])
        expected = model(**everything).logits[:, -1]
    assert_near(found, expected)
    assert torch.equal(found, again)
    assert (other - expected).abs().max() > 1e-6  # the new token would have moved the gates


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("architecture", SOME)
def test_a_text_is_the_same_in_a_batch_and_alone(architecture, beams):
    model = small_model(architecture)
    attach(model, UNIPELT)
    inputs = {k: v for k, v in batch(model).items() if k != "decoder_input_ids"}
    if architecture != "t5":  # padding on the left, but in an encoder
        inputs = {k: v.flip(1) for k, v in inputs.items()}
    settings = SETTINGS | {"max_new_tokens": 6, "num_beams": beams}
    together = model.generate(**inputs, **settings)[:, -6:]
    for row, n in enumerate((11, 11, 8)):
        text = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert len(text) == n
        alone = model.generate(input_ids=text[None], **settings)[:, -6:]
        assert together[row].tolist() == alone[0].tolist()


@pytest.mark.parametrize("architecture", SOME)
def test_mam_generates_the_same_with_and_without_a_cache(architecture):
    model = small_model(architecture)
    attach(model, MAM(num_virtual_tokens=3, hidden=None, init="bert"))
    inputs = {k: v.flip(1) for k, v in batch(model).items() if k != "decoder_input_ids"}
    cached = model.generate(**inputs, **SETTINGS, max_new_tokens=8)
    assert cached.tolist() == model.generate(**inputs, **SETTINGS, max_new_tokens=8, use_cache=False).tolist()


# ------------------------------------------------------------------------------------------ the rest of it


def test_how_it_starts():
    """The adapters and LoRAs do nothing yet; every gate is near a half; positions are not moved."""
    torch.manual_seed(0)
    model = small_model("llama")
    adapter = attach(model, UniPELT(num_virtual_tokens=3))
    assert not any(isinstance(part, PositionShift) for part in adapter.parts.values())
    cache = model(**batch(model), use_cache=True).past_key_values
    gates = torch.cat([g.flatten() for g in cache.unipelt_gates.values()])
    assert len(gates) == 2 * 4 * 3 and (gates - 0.5).abs().max() < 0.1
    prefix = {p: part for p, part in adapter.parts.items() if p == "" or p.endswith("self_attn")}
    for path, part in adapter.parts.items():
        part.active = path in prefix
    alone = output(model)
    adapter.activate()
    assert torch.equal(output(model), alone)


@pytest.mark.skipif("t5" not in OPEN_ATTENTION, reason="T5's attention is in one piece here")
def test_every_self_attention_of_t5_has_a_pair():
    for config in (MAM(num_virtual_tokens=3), UniPELT(num_virtual_tokens=3)):
        adapter = attach(small_model("t5"), config)
        hosts = [p for p in adapter.parts if p.endswith("SelfAttention")]
        assert len(hosts) == 4 and not any("EncDec" in p for p in adapter.parts)
        assert adapter.parts[""].used == [0, 1, 2, 3]
        adapter.detach()


@pytest.mark.parametrize("config", [MIX, GATED], ids=["mam", "unipelt"])
def test_the_file_is_of_our_own_format(config, tmp_path):
    model = small_model("llama")
    adapter = attach(model, config)
    move(adapter)
    adapter.save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["format"] == "peft-from-scratch" and fields["method"] == type(config).__name__
    assert "peft_type" not in fields and fields["settings"]["num_virtual_tokens"] == 3
    (tmp_path / STATE).unlink()  # the prefix goes on without the network that made it
    other = small_model("llama")
    loaded = load_adapter(other, tmp_path)
    assert_near(output(other), output(model))
    assert len(loaded.parameters()) < len(adapter.parameters())


@pytest.mark.parametrize(
    "config, sentence",
    [
        (MIX, r"is no change of a weight|has a non-linearity"),
        (GATED, "q_proj: a GatedLoRALinear has a gate that depends on the text, so it cannot be merged"),
    ],
    ids=["mam", "unipelt"],
)
def test_merging_is_refused_with_the_reason(config, sentence):
    adapter = attach(small_model("llama"), config)
    with pytest.raises(ValueError, match=sentence):
        adapter.merge()
    assert not adapter.merged


@pytest.mark.parametrize("kind", [MAM, UniPELT])
@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is 0; it must be a whole number from 1 up"),
        ({"hidden": 0}, "hidden is 0"),
        ({"dropout": 1.0}, "dropout is 1.0; it is a probability"),
        ({"reduction": -1}, "reduction is -1; it must be a positive number"),
        ({"dtype": "float"}, "dtype is 'float'"),
    ],
)
def test_bad_settings(kind, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**settings)


@pytest.mark.parametrize(
    "kind, settings, sentence",
    [
        (MAM, {"scale": 0}, "scale is 0; it must be a positive number"),
        (MAM, {"reads": "attention"}, "reads is 'attention'"),
        (MAM, {"init": "zero"}, "init is 'zero'"),
        (UniPELT, {"r": 0}, "the rank is 0; it must be a whole number from 1 up"),
        (UniPELT, {"lora_init": "zero"}, "lora_init is 'zero'"),
        (UniPELT, {"adapter_init": "zero"}, "init is 'zero'"),
    ],
)
def test_bad_settings_of_one(kind, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        kind(**settings)


@pytest.mark.parametrize("kind", [MAM, UniPELT])
def test_what_does_not_fit_leaves_the_model_alone(kind):
    model = small_model("llama")
    with pytest.raises(ValueError, match="model.layers.1.mlp is trained whole"):
        attach(model, kind(modules_to_save=("layers.1.mlp",)))
    with pytest.raises(ValueError, match="reduction=64 leaves nothing of a width of 32"):
        attach(model, kind(reduction=64))
    assert not adapters(model)
    model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match=f"{kind.__name__} does not know where the family 'unheard-of' has its parts"):
        attach(model, kind())
