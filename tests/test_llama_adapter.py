"""LLaMA-Adapter: numbers done by hand, the equation written out a second time, generation, and what is refused."""

import json
import math

import pytest
import torch
import transformers as tf
from peft_pair import assert_near
from small_models import COMMON, DECODERS, TOKENS, batch, logits, move, output, same_bits, small_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from utils import LlamaAdapter, LoRA, adapters, attach, load_adapter
from utils.checkpoint import CONFIG, file_tensors
from utils.methods.llama_adapter import gate_factor, gated_prompt_attention, llama_adapter_num_params, upper_layers

# ------------------------------------------------------------------------------------------------ by hand


def test_one_query_and_two_prompt_vectors():
    """q k_P is (0, ln 3), so the weights are 1/4 and 3/4: 4/4 + 3 * 8/4 = 7, and half of it. For q = 0 the mean, 6."""
    q = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    k_P, v_P = torch.tensor([0.0, math.log(3)]).view(1, 2, 1), torch.tensor([4.0, 8.0]).view(1, 2, 1)
    found = gated_prompt_attention(q, k_P, v_P, torch.tensor([0.5]), scaling=1.0)
    torch.testing.assert_close(found, torch.tensor([3.5, 3.0]).view(1, 1, 2, 1))


def test_scores_are_divided_by_the_root_of_the_head_dim():
    """hd = 4: scores 2 ln 3 / 2 against 0 give the weights 3/4 and 1/4."""
    q = torch.tensor([2.0, 0, 0, 0]).view(1, 1, 1, 4)
    k_P = torch.tensor([[[math.log(3), 0, 0, 0], [0, 9, 9, 9]]])
    v_P = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0]]])
    found = gated_prompt_attention(q, k_P, v_P, torch.ones(1))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.75, 0.25, 0, 0]))


def test_queries_in_a_row_share_a_key_and_have_gates_of_their_own():
    """Four heads on two keys: heads 0 and 1 get value 10, heads 2 and 3 get 20, each times its gate."""
    k_P, v_P = torch.zeros(2, 1, 1), torch.tensor([10.0, 20.0]).view(2, 1, 1)
    found = gated_prompt_attention(torch.ones(1, 4, 1, 1), k_P, v_P, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found.flatten().tolist() == [10, 20, 60, 80]


def test_the_two_rules_of_the_gate():
    """tanh(x) = (e^2x - 1) / (e^2x + 1), so that ln 3 / 2 gives (3 - 1) / (3 + 1)."""
    gate = torch.tensor([0.0, math.log(3) / 2, 100])
    assert gate_factor(gate, "scalar") is gate
    torch.testing.assert_close(gate_factor(gate, "tanh-per-head"), torch.tensor([0, 0.5, 1]))
    with pytest.raises(ValueError, match="can be 'scalar' or 'tanh-per-head'"):
        gate_factor(gate, "sigmoid")


def test_which_layers():
    assert upper_layers(32) == range(2, 32)
    assert upper_layers(32, 30) == range(2, 32)
    assert [upper_layers(n) for n in (1, 2, 3)] == [range(0, 1), range(1, 2), range(2, 3)]
    with pytest.raises(ValueError, match="adapter_layers is 3, and this model has 2 layers"):
        upper_layers(2, 3)


def test_counts_of_the_paper_and_of_a_model():
    assert llama_adapter_num_params(30, 4096) == 1_228_830
    assert llama_adapter_num_params(30, 4096, gates=32) == 1_229_760
    for gate, gates in (("scalar", 1), ("tanh-per-head", 4)):
        adapter = attach(small_model("llama"), LlamaAdapter(adapter_len=3, adapter_layers=2, gate=gate))
        found = sum(p.numel() for p in adapter.parameters())
        assert found == llama_adapter_num_params(2, 32, adapter_len=3, gates=gates)


# ------------------------------------------------------------------------------------------------ in a model


def wide(family):
    """A model whose heads together are wider than its hidden states: 4 heads of 16 over a width of 32."""
    shape = COMMON | TOKENS | {"num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    if family == "qwen3":
        return tf.Qwen3ForCausalLM(tf.Qwen3Config(**shape)).eval()
    return tf.LlamaForCausalLM(tf.LlamaConfig(**shape)).eval()


@pytest.mark.parametrize("gate", ["scalar", "tanh-per-head"])
@pytest.mark.parametrize("family", ["llama_gqa", "gemma", "wide llama", "qwen3"])
def test_the_equation_written_out(family, gate):
    """Head by head, from the attention's input, for models with rotated queries."""
    model = small_model(family) if family in DECODERS else wide(family)
    adapter = attach(model, LlamaAdapter(adapter_len=3, gate=gate))
    move(adapter, by=1.0)
    host = model.model.layers[1].self_attn
    seen = {}
    host.register_forward_hook(lambda _, args, kwargs, out: seen.update(kwargs, out=out[0]), with_kwargs=True)
    with torch.no_grad():
        logits(model)
        with_prompt = seen["out"]
        with adapter.disabled():
            without = host(**{k: v for k, v in seen.items() if k != "out"} | {"past_key_values": None})[0]
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    part = adapter.parts["model.layers.1.self_attn"]
    hd = host.head_dim
    q = host.q_proj(x).view(3, 11, 4, hd)
    k_P, v_P = (p(part.adaption_prompt)[0].view(3, -1, hd) for p in (host.k_proj, host.v_proj))
    if family == "qwen3":
        q, k_P = host.q_norm(q), host.k_norm(k_P)
    q, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), cos, sin)
    heads = []
    for h in range(4):
        shared = h * k_P.shape[1] // 4
        weights = (q[:, h] @ k_P[:, shared].T / math.sqrt(hd)).softmax(-1)
        g = part.adaption_gate[0] if gate == "scalar" else torch.tanh(part.adaption_gate[h])
        heads.append(g * weights @ v_P[:, shared])
    expected = host.o_proj(torch.cat(heads, -1)).detach()
    assert expected.abs().max() > 0.1
    assert_near(with_prompt - without, expected)


def test_under_gpt2_the_authors_prompt_goes_through_c_proj():
    """The scalar gate skips c_proj, as PEFT does. (That one is compared with PEFT's own.)"""
    model = small_model("gpt2")
    adapter = attach(model, LlamaAdapter(adapter_len=3, adapter_layers=1, gate="tanh-per-head", gate_init=1.0))
    model.transformer.h[1].attn.c_proj.weight.data.zero_()
    adapted = output(model)
    with adapter.disabled():
        assert torch.equal(output(model), adapted)
    adapter.detach()
    adapter = attach(model, LlamaAdapter(adapter_len=3, adapter_layers=1, gate_init=1.0))
    adapted = output(model)
    with adapter.disabled():
        assert not torch.allclose(output(model), adapted, atol=0.01)


@pytest.mark.parametrize("architecture", DECODERS)
def test_at_first_it_is_the_base_and_only_the_gate_moves(architecture):
    model = small_model(architecture)
    base = output(model)
    adapter = attach(model, LlamaAdapter())
    assert torch.equal(output(model), base)
    logits(model).square().sum().backward()
    for name, parameter in adapter.named_parameters():
        assert bool(parameter.grad.any()) == name.endswith("adaption_gate")


def test_the_prompt_starts_standard_normal():
    torch.manual_seed(0)
    adapter = attach(small_model("llama"), LlamaAdapter(adapter_len=200))
    prompt = adapter.parameters()[0].detach()
    assert prompt.shape == (1, 200, 32)
    assert abs(prompt.mean()) < 0.05 and abs(prompt.std() - 1) < 0.05


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_generation_with_a_cache_is_generation_without(architecture, implementation):
    model = small_model(architecture)
    model.set_attn_implementation(implementation)
    adapter = attach(model, LlamaAdapter(adapter_len=4, adapter_layers=2, gate_init=1.0))
    inputs = {k: v.flip(1) for k, v in batch(model).items()}  # padding on the left
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(**inputs, **settings)
    assert cached.tolist() == model.generate(**inputs, **settings, use_cache=False).tolist()
    found = model(**inputs, use_cache=True)
    assert found.past_key_values.get_seq_length() == 11  # nothing of the prompt is in it
    with adapter.disabled():
        assert (model(**inputs).logits - found.logits).abs().max() > 0.1


def test_the_queries_are_computed_once():
    model = small_model("llama")
    attach(model, LlamaAdapter(adapter_layers=2))
    rows = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.o_proj):
            projection.register_forward_hook(lambda _, args, out: rows.append(args[0].shape[:2].numel()))
    logits(model)
    assert rows == [33] * 4


def test_projections_with_a_lora_that_is_switched_off():
    """The prompt goes through k_proj and v_proj as they are, wrapped or not."""
    model = small_model("llama_gqa")
    config = LlamaAdapter(adapter_len=3, gate_init=1.0)
    torch.manual_seed(0)
    attach(model, config)
    expected = output(model)
    model = small_model("llama_gqa")
    attach(model, LoRA(targets=("k_proj", "v_proj"), init="random_b"), "lora")
    torch.manual_seed(0)
    attach(model, config, "prompts")
    assert torch.equal(output(model), expected)
    adapters(model)["lora"].activate()
    assert not torch.allclose(output(model), expected, atol=0.01)


# ------------------------------------------------------------------------------------------- files, refusals


def test_a_file_of_our_own_for_the_gate_that_peft_lacks(tmp_path):
    model = small_model("llama")
    adapter = attach(model, LlamaAdapter(adapter_len=3, gate="tanh-per-head", gate_init=0.5))
    move(adapter)
    adapter.save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["format"] == "peft-from-scratch" and fields["method"] == "LlamaAdapter"
    assert fields["settings"]["gate"] == "tanh-per-head" and "peft_type" not in fields
    other = small_model("llama")
    loaded = load_adapter(other, tmp_path)
    assert same_bits(file_tensors(loaded), file_tensors(adapter)) and torch.equal(output(other), output(model))
    fields["settings"]["gate"] = "scalar"
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="1 tensors have another shape: .*adaption_gate"):
        load_adapter(small_model("llama"), tmp_path)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "t5"])
def test_only_for_decoders(architecture):
    model = small_model(architecture)
    with pytest.raises(ValueError, match="LLaMA-Adapter is for decoders"):
        attach(model, LlamaAdapter())
    assert not adapters(model)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"adapter_len": 0}, "adapter_len is 0; it must be a whole number from 1 up"),
        ({"adapter_layers": 2.0}, "adapter_layers is 2.0; it must be a whole number"),
        ({"gate": "tanh"}, "gate is 'tanh'; it can be 'scalar', 'tanh-per-head'"),
        ({"gate_init": math.nan}, "gate_init is nan; it must be a number"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
    ],
)
def test_bad_settings(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LlamaAdapter(**settings)


def test_more_layers_than_there_are():
    model = small_model("llama")
    with pytest.raises(ValueError, match="adapter_layers is 3, and this model has 2 layers"):
        attach(model, LlamaAdapter(adapter_layers=3))
    assert not adapters(model)


def test_merging_is_refused_with_the_reason():
    adapter = attach(small_model("llama"), LlamaAdapter())
    with pytest.raises(ValueError, match="self_attn: a GatedPrompt adds what depends on the queries, so it cannot be"):
        adapter.merge()
