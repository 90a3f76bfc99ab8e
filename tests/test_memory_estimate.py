"""The predicted peak of a training step against live bytes counted on a CPU; states and shards by hand."""

import itertools

import pytest
import torch
import transformers as tf

from utils import LoRA, attach
from utils.architectures import architecture, known
from utils.memory.estimate import estimate
from utils.memory.instruments import LiveBytes, saved_by_module
from utils.memory.states import RECIPES, kv_cache, model_states, nf4_bytes, shard

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
BATCH, LENGTH = 4, 64


def llama(vocab, d):
    config = tf.LlamaConfig(
        vocab_size=vocab, hidden_size=d, intermediate_size=d * 11 // 4, num_hidden_layers=4, num_attention_heads=4,
        use_cache=False,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def gpt2(vocab, d):
    config = tf.GPT2Config(
        vocab_size=vocab, n_embd=d, n_layer=4, n_head=4, n_positions=LENGTH, use_cache=False, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


METHODS = {"full": None, "lora": LoRA(r=4, targets="all-linear")}
SIZES = {"small": (200, 64), "wide vocabulary": (4000, 64), "wide": (300, 256)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("make, method, size", list(itertools.product((llama, gpt2), METHODS, SIZES)))
def test_peak_of_a_step(make, method, size, checkpointing, dtype):
    torch.manual_seed(0)
    config = METHODS[method]
    model = make(*SIZES[size]).to(dtype).train()
    half = "pure bf16" if config is None else "adapters in fp32"
    recipe = "fp32" if dtype == torch.float32 else half
    predicted = estimate(model, config, recipe=recipe, batch=BATCH, length=LENGTH, checkpointing=checkpointing)
    if config is not None:
        attach(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    ids = torch.randint(3, 200, (BATCH, LENGTH))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # makes the optimizer's state
    state = [t for kept in optimizer.state.values() for t in kept.values()]
    there = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *state)}
    with LiveBytes([*model.parameters(), *model.buffers(), *state, ids]) as live:
        step()
    assert sum(predicted.states.values()) == pytest.approx(sum(there.values()), rel=0.005)
    assert predicted.peak == pytest.approx(sum(there.values()) + live.peak, rel=0.04)


@pytest.mark.parametrize("name", [n for n in known() if not known()[n]["model"].startswith("T5")])
def test_every_decoder_and_encoder_of_the_table_has_an_estimate(name):
    predicted = estimate(name, LoRA(), batch=2, length=128)
    assert predicted.total > predicted.trained > 0 and predicted.peak > 2 * predicted.total
    assert predicted.total - predicted.trained == sum(p.numel() for p in architecture(name).parameters())


def test_the_model_is_not_changed():
    model = llama(200, 64)
    before = {n: p.clone() for n, p in model.named_parameters()}
    estimate(model, LoRA())
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)
    assert all(p.requires_grad and p.device.type == "cpu" for p in after.values())


def test_bytes_per_parameter_by_recipe():
    per = {name: recipe.per_trained for name, recipe in RECIPES.items()}
    assert per["fp32"] == per["bf16 + master"] == 16
    assert per["bf16 + master, fp32 gradients"] == 18
    assert per["pure bf16"] == 8 and per["bf16, fp32 moments"] == 12
    assert per["8-bit Adam"] == 6.03125


def test_states_by_hand():
    states = model_states(trained=10, frozen=100, recipe=RECIPES["adapters in fp32"])
    assert states == {
        "weights, frozen": 200, "weights, trained": 40, "master copy": 0, "gradients": 40, "optimizer": 80
    }  # fmt: skip
    assert nf4_bytes(64, double_quant=False) == 36  # 4.5 bits each
    assert nf4_bytes(64 * 256) * 8 / (64 * 256) == pytest.approx(4.127, abs=5e-4)


def test_shards():
    states = model_states(trained=8, frozen=0, recipe=RECIPES["bf16 + master"])
    assert [sum(shard(states, 4, stage).values()) for stage in (0, 1, 2, 3)] == [128, 56, 44, 32]
    with pytest.raises(ValueError, match="stage is 4; ZeRO has the stages 0, 1, 2 and 3"):
        shard(states, 2, 4)


def test_kv_cache_of_llama_2_7b():
    """2 tensors, 32 layers, 4096 numbers, 2 bytes: half a mebibyte per token."""
    assert kv_cache(layers=32, kv_heads=32, head_dim=128, batch=1, length=1) == 2**19


def test_where_the_bytes_are_kept():
    model = llama(200, 64)
    ids = torch.randint(3, 200, (2, 8))
    found = saved_by_module(model, lambda: model(input_ids=ids, labels=ids).loss, [ids])
    assert found["model.layers.0.mlp"] >= found["model.layers.0.mlp.act_fn"] == 4 * 16 * 176
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_bad_input():
    with pytest.raises(ValueError, match="recipe is 'fp8'; it can be 'fp32'"):
        estimate("Llama-2-7B", recipe="fp8")
    with pytest.raises(ValueError, match="'Llama-7' is not in data/architectures.json; there are: Llama"):
        estimate("Llama-7")
