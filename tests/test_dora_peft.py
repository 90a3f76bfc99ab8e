"""Our DoRA and PEFT's on the same weights: outputs, gradients, files in both directions, and generated text."""

import json

import peft
import pytest
import torch
from peft_pair import QUIET, assert_near, output_and_gradient, task, their_tensors
from peft_pair import pair as pair_of
from small_models import ALL, DECODERS, ENCODERS, WITH_BIASES, backward, batch, logits, names, small_model

from utils import DoRA, LoRA, attach, load_adapter
from utils.checkpoint import CONFIG, WEIGHTS, file_tensors

pytestmark = QUIET


@pytest.fixture(autouse=True)
def same_masks(monkeypatch):
    """Dropout draws as nn.Dropout does: a mask of the same shape, made at the same moment, is then the same mask."""

    def drawn_like_torch(x, p):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)

    monkeypatch.setattr("utils.methods.dora.dropout_mask", drawn_like_torch)


def options(architecture):
    """name -> (our settings, PEFT's settings), for one architecture."""
    n = names(architecture)
    usual = {"targets": n.attention}
    table = {
        "all-linear": ({"targets": "all-linear"}, {}),
        "dropout": (usual | {"dropout": 0.3}, {"lora_dropout": 0.3}),
        "rslora and ranks": (
            {"targets": (*n.attention, n.mlp), "scaling": "rslora", "rank_pattern": {n.mlp: 5}},
            {"use_rslora": True, "rank_pattern": {n.mlp: 5}},
        ),
        "embedding": ({"targets": (n.embedding, *n.attention)}, {}),
    }
    if architecture in WITH_BIASES:
        both = {"bias": "lora_only", "lora_dropout": 0.3}
        table["biases and dropout"] = (usual | {"bias": "lora_only", "dropout": 0.3}, both)
    return table


def pair(architecture, ours, extra, dtype=torch.float32):
    """(our model, its adapter, PEFT's model) for our settings and PEFT's extra ones."""
    targets = ours["targets"]
    fields = {"target_modules": list(targets) if isinstance(targets, tuple) else targets, "use_dora": True} | extra
    whole = {"modules_to_save": ["classifier"]} if architecture in ENCODERS else {}
    theirs = peft.LoraConfig(task_type=task(architecture), r=4, lora_alpha=6, **fields | whole)
    return pair_of(architecture, DoRA(r=4, alpha=6, **ours), theirs, dtype)


BRIEFLY = ("llama", "mistral")  # as llama_gqa in all but the numbers of heads
CASES = [pytest.param(a, o, id=f"{a}-{o}") for a in ALL for o in (("all-linear",) if a in BRIEFLY else options(a))]


@pytest.mark.parametrize("architecture, option", CASES)
def test_outputs_gradients_and_files(architecture, option, tmp_path):
    model, adapter, reference = pair(architecture, *options(architecture)[option])
    with torch.no_grad():
        expected = logits(reference)
        assert_near(logits(model), expected)
        with adapter.disabled():
            assert (logits(model) - expected).abs().max() > 0.01  # the adapter does something

    outputs = []
    for m in (model, reference):  # training mode, the same mask drawn from the same seed
        m.train()
        torch.manual_seed(0)
        outputs.append(logits(m))
        backward(outputs[-1])
        m.eval()
    assert_near(outputs[0].detach(), outputs[1].detach())
    gradients = {n: p.grad for n, p in their_tensors(reference).items()}
    for name, parameter in file_tensors(adapter).items():
        assert parameter.grad is not None, name
        assert_near(parameter.grad, gradients[name])

    adapter.save(tmp_path / "ours")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "ours")
        assert_near(logits(loaded), expected)
        reference.save_pretrained(tmp_path / "theirs")
        model = small_model(architecture)
        assert type(load_adapter(model, tmp_path / "theirs").config) is DoRA
        assert_near(logits(model), expected)


# As in test_lora_peft: the part of the vector of all logits, and of that of all gradients, that rounding may cost.
HALF_LOGITS, HALF_GRADIENT = 0.03, 0.15


@pytest.mark.parametrize("architecture", ALL)
def test_bfloat16(architecture):
    """The base in bfloat16, the adapters in float32 on both sides: PEFT computes its branch in float32, we do not."""
    settings = options(architecture)["all-linear"]
    _, _, exact = pair(architecture, *settings)
    model, adapter, reference = pair(architecture, *settings, torch.bfloat16)
    exact = output_and_gradient(exact, their_tensors(exact))
    reference = output_and_gradient(reference, their_tensors(reference))
    found = output_and_gradient(model, file_tensors(adapter))
    for tolerance, own, theirs, true in zip((HALF_LOGITS, HALF_GRADIENT), found, reference, exact, strict=True):
        assert (own - theirs).norm() < tolerance * true.norm()
        assert (own - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("architecture", [*DECODERS, "t5"])
def test_generation_token_for_token(architecture):
    model, adapter, reference = pair(architecture, *options(architecture)["all-linear"])
    inputs = {k: v.flip(1) for k, v in batch(model).items() if k != "decoder_input_ids"}  # padding on the left
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, **settings)
    assert found.tolist() == reference.generate(**inputs, **settings).tolist()
    adapter.merge()
    assert found.tolist() == model.generate(**inputs, **settings).tolist()


def test_steps_of_training_stay_together():
    """The norm follows A and B: after some steps of the same optimizer both are still the same."""
    model, adapter, reference = pair("llama", *options("llama")["all-linear"])
    for m, parameters in ((model, adapter.parameters()), (reference, their_tensors(reference).values())):
        optimizer = torch.optim.SGD(parameters, lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            logits(m).square().mean().backward()
            logits(m).square().mean().backward()  # accumulated
            optimizer.step()
    with torch.no_grad():
        assert_near(logits(model), logits(reference), 1e-4)


def test_the_start_has_pefts_magnitudes():
    torch.manual_seed(0)
    reference = peft.get_peft_model(
        small_model("gpt2"), peft.LoraConfig(r=4, target_modules=["c_attn", "wte"], use_dora=True)
    )
    model = small_model("gpt2")
    adapter = attach(model, DoRA(r=4, targets=("c_attn", "wte")))
    theirs = their_tensors(reference)
    for name, tensor in file_tensors(adapter).items():
        if "magnitude" in name:
            torch.testing.assert_close(tensor, theirs[name])


def test_zero_rows_are_nan_in_peft_and_not_here():
    models = [small_model("llama") for _ in range(2)]
    for model in models:
        with torch.no_grad():
            model.model.layers[0].self_attn.o_proj.weight[3] = 0
    base = logits(models[0]).detach()
    reference = peft.get_peft_model(models[1], peft.LoraConfig(r=4, target_modules=["o_proj"], use_dora=True))
    assert logits(reference).isnan().any()
    attach(models[0], DoRA(r=4, targets=("o_proj",)))
    assert_near(logits(models[0]).detach(), base)


def test_names_in_the_file(tmp_path):
    attach(small_model("llama"), DoRA(r=4, targets=("embed_tokens", "q_proj"), layers=None)).save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["peft_type"] == "LORA" and fields["use_dora"] is True
    header = (tmp_path / WEIGHTS).read_bytes()
    assert b'"base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector"' in header
    assert b'"base_model.model.model.embed_tokens.lora_magnitude_vector"' in header


def test_a_file_is_of_one_of_the_two(tmp_path):
    """A file without use_dora is plain LoRA; with it, the magnitudes must be there."""
    attach(small_model("llama"), LoRA(r=4, targets=("q_proj",))).save(tmp_path)
    assert type(load_adapter(small_model("llama"), tmp_path).config) is LoRA
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(fields | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"2 tensors are missing: .*q_proj\.lora_magnitude_vector"):
        load_adapter(small_model("llama"), tmp_path)


def test_config_goes_through_the_file_unchanged(tmp_path):
    config = DoRA(r=3, alpha=5, targets=("q_proj",), scaling="rslora", dropout=0.25, modules_to_save=())
    attach(small_model("llama"), config).save(tmp_path)
    assert load_adapter(small_model("llama"), tmp_path).config == config
