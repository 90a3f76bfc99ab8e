"""Our LoRA and PEFT's on the same weights: outputs, gradients, files in both directions, and generated text.

Half of each comparison is whether the same configuration means the same modules in both: the names in the two
adapters must be equal before any number is compared.
"""

import copy
import json
from dataclasses import replace

import peft
import pytest
import torch
import transformers as tf
from peft_pair import QUIET, assert_near, output_and_gradient, task, their_tensors
from peft_pair import pair as pair_of
from small_models import ALL, DECODERS, ENCODERS, WITH_BIASES, backward, batch, logits, move, names, small_model

from utils import LoRA, attach, load_adapter
from utils.checkpoint import CONFIG, WEIGHTS, file_tensors
from utils.methods.lora import DEFAULT_TARGETS

pytestmark = QUIET


@pytest.fixture(autouse=True)
def same_masks(monkeypatch):
    """Dropout draws as nn.Dropout does: a mask of the same shape, made at the same moment, is then the same mask."""

    def drawn_like_torch(x, p):
        return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p)

    monkeypatch.setattr("utils.methods.lora.dropout_mask", drawn_like_torch)


def options(architecture):
    """name -> (our settings, PEFT's settings), for one architecture."""
    n = names(architecture)
    usual = {"targets": n.attention}
    whole = (n.norm, "classifier") if architecture in ENCODERS else (n.norm,)
    dotted = [f".{w}" if w == "norm" else w for w in whole]  # to PEFT, "norm" means input_layernorm as well
    short = n.attention[0]
    table = {
        "default targets": ({}, {}),
        "dropout": (usual | {"dropout": 0.3}, {"lora_dropout": 0.3}),
        "nested targets": ({"targets": (n.nested, *n.attention)}, {}),
        "regex": ({"targets": rf".*\.1\..*({n.attention[0]}|{n.mlp.replace('.', '[.]')})"}, {}),
        "all-linear": ({"targets": "all-linear"}, {}),
        "layers": (usual | {"layers": (1,)}, {"layers_to_transform": [1]}),
        "regex and layers": ({"targets": rf".*\.{short}", "layers": (0,)}, {"target_modules": rf"\D*\.0\..*\.{short}"}),
        "exclude": ({"targets": (*n.attention, n.mlp), "exclude": (n.mlp,)}, {"exclude_modules": [n.mlp]}),
        "exclude by regex": (usual | {"exclude": r".*\.0\..*"}, {"exclude_modules": r".*\.0\..*"}),
        "rank and alpha per module": (
            {
                "targets": (*n.attention, n.mlp),
                "rank_pattern": {n.mlp: 5, rf".*\.0\..*{short}": 3},
                "alpha_pattern": {n.mlp: 7.5},
            },
            {"rank_pattern": {n.mlp: 5, rf".*\.0\..*{short}": 3}, "alpha_pattern": {n.mlp: 7.5}},
        ),
        "rslora": (usual | {"scaling": "rslora"}, {"use_rslora": True}),
        "modules_to_save": (usual | {"modules_to_save": whole}, {"modules_to_save": dotted}),
        "embedding": ({"targets": (n.embedding, *n.attention)}, {}),
    }
    if architecture in WITH_BIASES:
        table["bias all"] = (usual | {"bias": "all"}, {"bias": "all"})
        table["bias lora_only"] = (usual | {"bias": "lora_only"}, {"bias": "lora_only"})
        both = {"bias": "lora_only", "lora_dropout": 0.3}
        table["bias and dropout"] = (usual | {"bias": "lora_only", "dropout": 0.3}, both)
    return table


def pair(architecture, ours, extra, dtype=torch.float32, **settings):
    """(our model, its adapter, PEFT's model) for our settings and PEFT's extra ones."""
    targets = ours.get("targets")
    fields = {"target_modules": list(targets) if isinstance(targets, tuple) else targets} | extra
    whole = {} if "modules_to_save" in fields or architecture not in ENCODERS else {"modules_to_save": ["classifier"]}
    theirs = peft.LoraConfig(task_type=task(architecture), r=4, lora_alpha=6, **fields | whole)
    return pair_of(architecture, LoRA(r=4, alpha=6, **ours, **settings), theirs, dtype)


BRIEFLY = ("llama", "mistral")  # as llama_gqa in all but the numbers of heads
CASES = [
    pytest.param(a, o, id=f"{a}-{o}")
    for a in ALL
    for o in (("default targets", "all-linear") if a in BRIEFLY else options(a))
]


@pytest.mark.parametrize("architecture, option", CASES)
def test_outputs_gradients_and_files(architecture, option, tmp_path):
    model, adapter, reference = pair(architecture, *options(architecture)[option])
    with torch.no_grad():
        expected = logits(reference)
        assert_near(logits(model), expected)
        with adapter.disabled():
            assert (logits(model) - expected).abs().max() > 0.01  # the adapter does something

    # training mode, the same mask drawn from the same seed
    outputs = []
    for m in (model, reference):
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

    # files, both ways
    adapter.save(tmp_path / "ours")
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(small_model(architecture), tmp_path / "ours")
        assert_near(logits(loaded), expected)
        reference.save_pretrained(tmp_path / "theirs")
        model = small_model(architecture)
        load_adapter(model, tmp_path / "theirs")
        assert_near(logits(model), expected)


# A bfloat16 number carries 8 bits: one rounding is worth up to 0.4 %, and numbers here go through some dozens of them.
# Of the length of the vector of all logits, and of that of all gradients, this part may be lost. PEFT loses as much:
# with other seeds 0.7 to 2 % of the logits and 2 to 10 % of the gradients, where a ReLU or a softmax tips over.
HALF_LOGITS, HALF_GRADIENT = 0.03, 0.15


@pytest.mark.parametrize("architecture", ALL)
def test_bfloat16(architecture):
    """The base in bfloat16, the adapters in float32 on both sides: PEFT computes its branch in float32, we do not."""
    ours, extra = options(architecture)["all-linear"]
    _, _, exact = pair(architecture, ours, extra)
    model, adapter, reference = pair(architecture, ours, extra, torch.bfloat16)
    exact = output_and_gradient(exact, their_tensors(exact))
    reference = output_and_gradient(reference, their_tensors(reference))
    found = output_and_gradient(model, file_tensors(adapter))
    for tolerance, own, theirs, true in zip((HALF_LOGITS, HALF_GRADIENT), found, reference, exact, strict=True):
        assert (own - theirs).norm() < tolerance * true.norm()
        assert (own - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("architecture", [*DECODERS, "t5"])
def test_generation_token_for_token(architecture):
    ours, extra = options(architecture)["all-linear"]
    model, adapter, reference = pair(architecture, ours, extra)
    inputs = {k: v for k, v in batch(model).items() if k != "decoder_input_ids"}
    inputs = {k: v.flip(1) for k, v in inputs.items()}  # padding on the left
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, **settings)
    assert found.tolist() == reference.generate(**inputs, **settings).tolist()
    adapted = logits(model)
    with adapter.disabled():  # else the comparison above would prove nothing
        assert not torch.allclose(adapted, logits(model), atol=0.1)
    adapter.merge()
    assert found.tolist() == model.generate(**inputs, **settings).tolist()


def test_usual_targets_are_pefts():
    table = peft.utils.constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    for targets, families in DEFAULT_TARGETS.items():
        for family in families:
            assert sorted(targets) == sorted(table[family]), family


# ------------------------------------------------------------------------------------------------- PEFT's files


def peft_folder(path, architecture="llama", **fields):
    """A folder that PEFT wrote, with random A and B, and the model it wrote it from."""
    fields = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False} | fields
    config = peft.LoraConfig(r=4, **fields)
    model = peft.get_peft_model(small_model(architecture), config)
    model.save_pretrained(path)
    return model


def edit(folder, **fields):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_settings_that_peft_only_warns_of(tmp_path):
    expected = logits(peft_folder(tmp_path))
    edit(tmp_path, exclude_modules=["no_such_module"], a_field_of_the_future=None)
    model = small_model("llama")
    load_adapter(model, tmp_path)
    assert_near(logits(model).detach(), expected.detach())
    edit(tmp_path, exclude_modules=".*no_such_module", layers_to_transform=[])
    model = small_model("llama")
    load_adapter(model, tmp_path)
    assert_near(logits(model).detach(), expected.detach())


def test_one_layer_as_a_number(tmp_path):
    expected = logits(peft_folder(tmp_path, layers_to_transform=1))
    model = small_model("llama")
    adapter = load_adapter(model, tmp_path)
    assert adapter.config.layers == (1,)
    assert_near(logits(model).detach(), expected.detach())


def test_names_that_peft_reads_loosely(tmp_path):
    """Its modules_to_save match in the middle of a word; its "all-linear" lists what lies inside them."""
    expected = logits(peft_folder(tmp_path / "norm", modules_to_save=["norm"])).detach()
    model = small_model("llama")
    adapter = load_adapter(model, tmp_path / "norm")
    assert "model.layers.0.input_layernorm" in adapter.config.modules_to_save
    assert_near(logits(model).detach(), expected)

    fields = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    expected = logits(peft_folder(tmp_path / "head", "roberta", **fields)).detach()
    assert "classifier.dense" in json.loads((tmp_path / "head" / CONFIG).read_text())["target_modules"]
    model = small_model("roberta")
    load_adapter(model, tmp_path / "head")
    assert_near(logits(model).detach(), expected)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_that_need_another_base_are_refused(init, tmp_path):
    """PEFT takes the start away from the base weights and does so again on loading: not this base plus s B A."""
    peft_folder(tmp_path, init_lora_weights=init)
    with pytest.raises(ValueError, match=f"the file uses init_lora_weights='{init}', which is not plain LoRA"):
        load_adapter(small_model("llama"), tmp_path)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", True])
def test_files_with_a_plain_start_are_read(init, tmp_path):
    expected = logits(peft_folder(tmp_path, init_lora_weights=init)).detach()
    model = small_model("llama")
    load_adapter(model, tmp_path)
    assert_near(logits(model).detach(), expected)


def test_a_minimal_config_loads_in_both(tmp_path):
    expected = logits(peft_folder(tmp_path)).detach()
    (tmp_path / CONFIG).write_text('{"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}')  # alpha is 8 then
    model = small_model("llama")
    load_adapter(model, tmp_path)
    assert_near(logits(model).detach(), expected)
    assert_near(logits(peft.PeftModel.from_pretrained(small_model("llama"), tmp_path)).detach(), expected)


def test_our_file_is_the_same_bytes_each_time_and_holds_no_base_weight(tmp_path):
    for folder in ("first", "second"):
        torch.manual_seed(0)
        model = small_model("llama")
        adapter = attach(model, LoRA(r=4, targets={"embed_tokens", "q_proj", "v_proj"}))
        adapter.save(tmp_path / folder)
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    trained = sum(p.numel() for p in adapter.parameters())
    assert (tmp_path / "first" / WEIGHTS).stat().st_size < 4 * trained + 4096  # the header; PEFT adds 64 x 32 numbers


@pytest.mark.parametrize("architecture", ALL)
def test_layers_of_a_model_without_head(architecture, tmp_path):
    """In the bare model the path begins with the layers' own name, where PEFT finds no layer number."""
    model = small_model(architecture)
    bare = model.base_model
    inputs = batch(model)
    adapter = attach(bare, LoRA(r=4, targets=names(architecture).attention, layers=(1,), init="random_b"))
    adapter.save(tmp_path)
    fresh = small_model(architecture).base_model
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
        assert_near(loaded(**inputs)[0], bare(**inputs)[0])


@pytest.mark.parametrize("targets", [("query", "value"), "all-linear"], ids=str)
def test_answers_in_a_text_train_their_head(targets, tmp_path):
    """PEFT wants that head in the file of every such task."""
    settings = small_model("bert").config
    settings.num_labels = 2
    model = tf.BertForQuestionAnswering(settings).eval()
    fresh = copy.deepcopy(model)
    adapter = attach(model, LoRA(r=4, targets=targets, init="random_b"))
    move(adapter)
    adapter.save(tmp_path)
    inputs = batch(model)
    with torch.no_grad():
        assert_near(peft.PeftModel.from_pretrained(fresh, tmp_path).eval()(**inputs)[0], model(**inputs)[0])


def test_config_goes_through_the_file_unchanged(tmp_path):
    config = LoRA(
        r=3, alpha=5, targets=("q_proj", "down_proj"), scaling="rslora", dropout=0.25, rank_pattern={"down_proj": 2},
        alpha_pattern={r".*\.1\..*": 7}, modules_to_save=("norm",),
    )  # fmt: skip
    attach(small_model("llama"), config).save(tmp_path)
    loaded = load_adapter(small_model("llama"), tmp_path).config
    assert replace(loaded, targets=config.targets, modules_to_save=config.modules_to_save) == config
    assert set(loaded.targets) == set(config.targets) and loaded.modules_to_save == ("model.norm",)
