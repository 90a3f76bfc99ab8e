"""Our AdaLoRA and PEFT's on the same weights: outputs, gradients with the regulariser, whole runs, files, and text."""

import json

import peft
import pytest
import torch
from peft_pair import QUIET, assert_near, output_and_gradient, peft_model, task, their_tensors
from small_models import ALL, DECODERS, ENCODERS, batch, logits, names, small_model

from utils import AdaLoRA, attach, load_adapter
from utils.checkpoint import CONFIG, STATE, WEIGHTS, file_tensors
from utils.methods.lora import LoRA

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),  # PEFT of its own files
    pytest.mark.filterwarnings("ignore:.*have invalid shape"),  # and of layers of rank 0
]
BUDGET = {"init_r": 4, "target_r": 2}


@pytest.fixture(autouse=True)
def same_masks(monkeypatch):
    """Dropout draws as nn.Dropout does: a mask of the same shape, made at the same moment, is then the same mask."""

    def drawn_like_torch(x, p):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)

    monkeypatch.setattr("utils.methods.lora.dropout_mask", drawn_like_torch)


def pair(architecture, targets, dtype=torch.float32, dropout=0.0, total=12, **schedule):
    """(our model, its adapter, PEFT's model). targets: None for the usual ones   schedule: tinit, tfinal, delta_t"""
    common = {"targets": targets, "dropout": dropout, "total_steps": total, "orth_weight": 0.3}
    ours = AdaLoRA(alpha=6, **common, **BUDGET, **schedule)
    if "delta_t" in schedule:
        schedule["deltaT"] = schedule.pop("delta_t")
    theirs = peft.AdaLoraConfig(
        task_type=task(architecture),
        lora_alpha=6,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        lora_dropout=dropout,
        total_step=total,
        orth_reg_weight=0.3,
        modules_to_save=["classifier"] if architecture in ENCODERS else None,
        **BUDGET,
        **schedule,
    )
    reference = peft_model(architecture, theirs, dtype)
    with torch.no_grad():
        for name, divisor in reference.named_parameters():
            if "ranknum" in name:
                divisor.requires_grad_(False).fill_(BUDGET["init_r"])
    model = small_model(architecture, dtype)
    adapter = attach(model, ours)
    own, other = file_tensors(adapter), their_tensors(reference)
    assert {n: p.shape for n, p in own.items()} == {n: p.shape for n, p in other.items()}
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(other[name])
    return model, adapter, reference


def labelled(model):
    """The keyword arguments of `batch`, with labels."""
    inputs = batch(model)
    return inputs | {"labels": torch.tensor([0, 2, 1]) if hasattr(model, "classifier") else inputs["input_ids"]}


TARGETS = {"usual": None, "attention": "attention", "all-linear": "all-linear"}
CASES = [
    pytest.param(a, t, id=f"{a}-{t}")
    for a in ALL
    for t in TARGETS
    if (a, t) != ("mistral", "usual")  # PEFT knows no usual targets there
]


def targets_of(architecture, kind):
    return names(architecture).attention if kind == "attention" else TARGETS[kind]


@pytest.mark.parametrize("architecture, targets", CASES)
def test_outputs_gradients_and_files(architecture, targets, tmp_path):
    dropout = 0.3 if targets == "attention" else 0.0
    model, adapter, reference = pair(architecture, targets_of(architecture, targets), dropout=dropout)
    with torch.no_grad():
        expected = logits(reference)
        assert_near(logits(model), expected)
        with adapter.disabled():
            assert (logits(model) - expected).abs().max() > 0.01  # the adapter does something

    losses = []
    for m in (model, reference):
        m.train()
        torch.manual_seed(0)
        losses.append(m(**labelled(model)).loss)
        losses[-1].backward()
        m.eval()
    assert_near(losses[0].detach(), losses[1].detach())
    gradients = {n: p.grad for n, p in their_tensors(reference).items()}
    for name, parameter in file_tensors(adapter).items():
        assert_near(parameter.grad, gradients[name])

    adapter.save(tmp_path / "ours")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "ours")
        assert_near(logits(loaded), expected)
        reference.save_pretrained(tmp_path / "theirs")
        model = small_model(architecture)
        load_adapter(model, tmp_path / "theirs")
        assert_near(logits(model), expected)


def run(architecture, targets="attention", steps=12, **schedule):
    """Train both for some steps, PEFT's allocator called by hand, and compare loss and E after each one."""
    model, adapter, reference = pair(architecture, targets_of(architecture, targets), **schedule)
    theirs = their_tensors(reference)
    ours = file_tensors(adapter)
    inputs = labelled(model)
    # a large eps: else Adam turns rounding in gradients near zero into whole steps
    optimizers = [torch.optim.AdamW(t.values(), lr=0.02, eps=1e-3) for t in (ours, theirs)]
    for step in range(1, steps + 1):
        losses = []
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            losses.append(m.train()(**inputs).loss)
            losses[-1].backward()
            optimizer.step()
            if m is reference:
                m.base_model.update_and_allocate(step)
            optimizer.zero_grad()
        assert_near(losses[0].detach(), losses[1].detach(), 1e-4)
        for name in [n for n in ours if n.endswith("lora_E")]:
            assert_near(ours[name].detach(), theirs[name].detach(), 1e-4)
            assert torch.equal(ours[name] == 0, theirs[name] == 0)
    return model.eval(), adapter, reference.eval()


@pytest.mark.parametrize("architecture", ALL)
def test_a_whole_run_prunes_the_same_triplets(architecture, tmp_path):
    model, adapter, reference = run(architecture, tinit=2, tfinal=3)
    pattern = reference.peft_config["default"].rank_pattern
    layers = adapter.parts[""].layers
    assert {n.removesuffix(".lora_E.default"): sum(kept) for n, kept in pattern.items()} == {
        path: layer.rank for path, layer in layers.items()
    }
    assert sum(layer.rank for layer in layers.values()) == 2 * len(layers)
    assert len({layer.rank for layer in layers.values()}) > 1  # else a rank for all would have done

    expected = logits(reference).detach()
    adapter.save(tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")
    folders = [json.loads((tmp_path / f / CONFIG).read_text()) for f in ("ours", "theirs")]
    assert folders[0]["rank_pattern"] == folders[1]["rank_pattern"]
    assert not (tmp_path / "ours" / STATE).exists()
    loaded = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "ours")
    assert_near(logits(loaded).detach(), expected, 1e-4)
    for folder in ("ours", "theirs"):
        fresh = small_model(architecture)
        again = load_adapter(fresh, tmp_path / folder)
        assert {p: layer.rank for p, layer in again.parts[""].layers.items()} == {
            p: layer.rank for p, layer in layers.items()
        }
        assert_near(logits(fresh).detach(), expected, 1e-4)
    again.save(tmp_path / "again")
    found, before = (peft.utils.load_peft_weights(tmp_path / f, "cpu") for f in ("again", "theirs"))
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in before.items()}


def test_pruning_at_every_third_step():
    run("llama_gqa", tinit=1, tfinal=2, delta_t=3)


@pytest.mark.parametrize("steps", [1, 3, 7, 8, 10])
def test_a_file_of_any_moment_of_the_schedule_loads_in_peft(steps, tmp_path):
    model, adapter, reference = run("gpt2", steps=steps, tinit=2, tfinal=4, delta_t=2)
    adapter.save(tmp_path)
    loaded = peft.PeftModel.from_pretrained(small_model("gpt2"), tmp_path)
    assert_near(logits(loaded).detach(), logits(model).detach())
    assert_near(logits(loaded).detach(), logits(reference).detach(), 1e-4)


def test_peft_has_the_regulariser_in_evaluation_too():
    model, adapter, reference = pair("llama", ("q_proj",))
    inputs = labelled(model)
    ours, theirs = model(**inputs).loss, reference(**inputs).loss
    assert theirs - ours > 0.2
    with torch.no_grad():
        assert_near(ours + 0.3 * adapter.parts[""].regulariser(), theirs)
        found, wanted = logits(model)[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        assert_near(ours, torch.nn.functional.cross_entropy(found, wanted))


def test_peft_trains_the_scale_over_a_half_precision_base():
    """Its divisor, `ranknum`, which no file holds; ours is a constant."""
    config = peft.AdaLoraConfig(total_step=4, target_modules=["q_proj"])
    trained = {
        dtype: [n for n, p in peft.get_peft_model(small_model("llama", dtype), config).named_parameters()
                if p.requires_grad and "ranknum" in n]
        for dtype in (torch.float32, torch.bfloat16)
    }  # fmt: skip
    assert len(trained[torch.float32]) == 0 and len(trained[torch.bfloat16]) == 2
    adapter = attach(small_model("llama", torch.bfloat16), AdaLoRA(total_steps=4, targets=("q_proj",)))
    assert {n.rsplit(".", 1)[1] for n, _ in adapter.named_parameters()} == {"lora_A", "lora_B", "lora_E"}


def test_peft_fails_where_nothing_is_to_be_pruned():
    reference = peft.get_peft_model(
        small_model("llama"), peft.AdaLoraConfig(init_r=4, target_r=4, total_step=4, target_modules=["q_proj"])
    )
    reference(**labelled(reference)).loss.backward()
    with pytest.raises((RuntimeError, IndexError), match="out of range|k"):
        reference.base_model.update_and_allocate(1)


@pytest.mark.parametrize("architecture", ALL)
def test_bfloat16(architecture):
    """The base in bfloat16, the adapters in float32 on both sides: PEFT computes its branch in float32, we do not."""
    model, adapter, reference = pair(architecture, "all-linear", torch.bfloat16)
    _, _, exact = pair(architecture, "all-linear")
    with torch.no_grad():
        for name, parameter in their_tensors(exact).items():
            parameter.copy_(file_tensors(adapter)[name])
    exact = output_and_gradient(exact, their_tensors(exact))
    reference = output_and_gradient(reference, their_tensors(reference))
    found = output_and_gradient(model, file_tensors(adapter))
    for tolerance, own, theirs, true in zip((0.03, 0.15), found, reference, exact, strict=True):
        assert (own - theirs).norm() < tolerance * true.norm()
        assert (own - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("architecture", [*DECODERS, "t5"])
def test_generation_token_for_token(architecture):
    model, adapter, reference = pair(architecture, "all-linear")
    inputs = {k: v.flip(1) for k, v in batch(model).items() if k != "decoder_input_ids"}  # padding on the left
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, **settings)
    assert found.tolist() == reference.generate(**inputs, **settings).tolist()
    adapter.merge()
    assert found.tolist() == model.generate(**inputs, **settings).tolist()


def test_usual_targets_are_pefts():
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING
    known = [family for family in table if AdaLoRA.default_targets(family)]
    assert len(known) > 15
    for family in known:
        assert sorted(AdaLoRA.default_targets(family)) == sorted(table[family]), family
    assert AdaLoRA.default_targets("mistral") == LoRA.default_targets("mistral")  # PEFT's table lacks it


def test_defaults_are_pefts():
    ours, theirs = AdaLoRA(total_steps=5), peft.AdaLoraConfig(total_step=5)
    pairs = {
        "init_r": "init_r", "target_r": "target_r", "alpha": "lora_alpha", "tinit": "tinit", "tfinal": "tfinal",
        "delta_t": "deltaT", "beta1": "beta1", "beta2": "beta2", "orth_weight": "orth_reg_weight",
        "dropout": "lora_dropout", "bias": "bias", "total_steps": "total_step",
    }  # fmt: skip
    assert {name: getattr(ours, name) for name in pairs} == {n: getattr(theirs, other) for n, other in pairs.items()}


def test_a_file_with_layers_of_rank_0_goes_both_ways(tmp_path):
    _, _, reference = pair("llama", ("q_proj", "v_proj"))
    kept = {
        f"model.layers.{i}.self_attn.{n}_proj.lora_E": [i == 1 and n == "q"] * 3 + [False] for i in (0, 1) for n in "qv"
    }
    with torch.no_grad():
        for name, tensor in their_tensors(reference).items():
            if name.endswith("lora_E"):
                tensor *= torch.tensor(kept[name])[:, None]
    reference.peft_config["default"].rank_pattern = kept
    expected = logits(reference).detach()
    reference.save_pretrained(tmp_path / "theirs")
    model = small_model("llama")
    adapter = load_adapter(model, tmp_path / "theirs")
    assert sorted(layer.rank for layer in adapter.parts[""].layers.values()) == [0, 0, 0, 3]
    assert_near(logits(model).detach(), expected)
    adapter.save(tmp_path / "ours")
    assert_near(logits(peft.PeftModel.from_pretrained(small_model("llama"), tmp_path / "ours")).detach(), expected)
    assert (tmp_path / "ours" / WEIGHTS).exists()
    adapter.merge()
    assert_near(logits(model).detach(), expected)


def test_a_file_from_before_total_step_was_required(tmp_path):
    model = small_model("llama")
    attach(model, AdaLoRA(total_steps=9, targets=("q_proj",), init="random_e")).save(tmp_path)
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"total_step": None, "lora_alpha": 0}))
    adapter = load_adapter(small_model("llama"), tmp_path)
    assert adapter.config.total_steps == 1 and adapter.config.alpha == adapter.config.init_r == 12
    for fields in ({"use_dora": True}, {"megatron_config": {"a": 1}}):
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    with pytest.raises(ValueError, match="which is not plain AdaLoRA"):
        load_adapter(small_model("llama"), tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"rank_pattern": ["q"]}, "rank_pattern is .*; it must be a dict with a list of true and false per layer"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": 5}}, "must be a dict with a list of true"),
        ({"rank_pattern": {"model.layers.7.q_proj.lora_E": [True]}}, "no adapted module fits the pattern"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True]}}, "3 tensors have another shape"),
        ({"lora_alpha": None}, "alpha is None; it must be a positive number"),
        ({"init_r": "4"}, "the rank is '4'"),
        ({"tinit": None}, "tinit is None; it must be a whole number from 0 up"),
    ],
)
def test_bad_settings_in_a_file(fields, message, tmp_path):
    attach(small_model("llama"), AdaLoRA(total_steps=9, targets=("q_proj",))).save(tmp_path)
    file = tmp_path / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    model = small_model("llama")
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "guest0")
