"""Our (IA)^3 and PEFT's on the same weights: outputs, gradients, files in both directions, and generated text."""

import json

import peft
import pytest
import torch
from peft_pair import QUIET, assert_near, output_and_gradient, task, their_tensors
from peft_pair import pair as pair_of
from small_models import ALL, DECODERS, ENCODERS, backward, batch, logits, move, names, small_model

from utils import IA3, attach, load_adapter
from utils.checkpoint import CONFIG, file_tensors
from utils.measure import saved_bytes
from utils.methods.ia3 import USUAL, usual_modules

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")]


def options(architecture):
    """name -> (our settings, PEFT's settings), for one architecture."""
    n = names(architecture)
    both = {"targets": (*n.attention, n.mlp), "feedforward": (n.mlp,)}
    whole = (n.norm, "classifier") if architecture in ENCODERS else (n.norm,)
    return {
        # the usual targets leave GPT-2's queries alone, unlike PEFT's
        "default targets": ({"queries": True}, {}),
        "default feedforward": ({"targets": (*n.attention, n.mlp)}, {}),
        "outputs only": ({"targets": n.attention, "feedforward": ()}, {}),
        "inputs only": ({"targets": (n.mlp,), "feedforward": (n.mlp,)}, {}),
        "regex": (
            {"targets": rf".*\.1\..*({_either(both['targets'])})", "feedforward": rf".*{_either((n.mlp,))}"},
            {},
        ),
        "all-linear": ({"targets": "all-linear", "feedforward": (n.mlp,)}, {"feedforward_modules": rf".*\.{n.mlp}"}),
        "layers": (both | {"layers": (1,)}, {"target_modules": rf"\D*\.1\..*({_either(both['targets'])})"}),
        "exclude": (both | {"exclude": r".*\.0\..*"}, {"exclude_modules": r".*\.0\..*"}),
        "modules_to_save": (both | {"modules_to_save": whole}, {}),
    }


def _either(targets):
    return "|".join(t.replace(".", "[.]") for t in targets)


def pair(architecture, ours, extra, dtype=torch.float32):
    """(our model, its adapter, PEFT's model) for our settings and PEFT's extra ones."""
    fields = {"target_modules": ours.get("targets"), "feedforward_modules": ours.get("feedforward")} | extra
    fields = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
    whole = [f".{w}" if w == "norm" else w for w in ours.get("modules_to_save", ())]
    if "modules_to_save" not in ours and architecture in ENCODERS:
        whole = ["classifier"]
    theirs = peft.IA3Config(task_type=task(architecture), **fields, modules_to_save=whole or None)
    return pair_of(architecture, IA3(**ours), theirs, dtype)


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
    for m in (model, reference):
        backward(logits(m))
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


HALF_LOGITS, HALF_GRADIENT = 0.03, 0.15  # as for LoRA: what rounding to 8 bits may cost


@pytest.mark.parametrize("architecture", ALL)
def test_bfloat16(architecture):
    """The base in bfloat16, the vectors in float32 on both sides: PEFT multiplies in float32, we in bfloat16."""
    settings = options(architecture)["default targets"]
    _, _, exact = pair(architecture, *settings)
    model, adapter, reference = pair(architecture, *settings, torch.bfloat16)
    exact = output_and_gradient(exact, their_tensors(exact))
    reference = output_and_gradient(reference, their_tensors(reference))
    found = output_and_gradient(model, file_tensors(adapter))
    for tolerance, own, theirs, true in zip((HALF_LOGITS, HALF_GRADIENT), found, reference, exact, strict=True):
        assert (own - theirs).norm() < tolerance * true.norm()
        assert (own - true).norm() < tolerance * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_keeps_no_more_for_backward(dtype):
    model, adapter, reference = pair("llama", {}, {}, dtype)
    ours = saved_bytes(lambda: logits(model), [model])
    theirs = saved_bytes(lambda: logits(reference), [reference])
    assert ours <= theirs if dtype == torch.float32 else ours < 0.97 * theirs  # PEFT keeps a float32 copy of the input


@pytest.mark.parametrize("architecture", [*DECODERS, "t5"])
def test_generation_token_for_token(architecture):
    model, adapter, reference = pair(architecture, *options(architecture)["default targets"])
    inputs = {k: v.flip(1) for k, v in batch(model).items() if k != "decoder_input_ids"}  # padding on the left
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, **settings)
    assert found.tolist() == reference.generate(**inputs, **settings).tolist()
    adapted = logits(model)
    with adapter.disabled():
        assert not torch.allclose(adapted, logits(model), atol=0.1)
    adapter.merge()
    assert found.tolist() == model.generate(**inputs, **settings).tolist()


def test_usual_modules_are_pefts():
    constants = peft.utils.constants
    for (outputs, inputs), families in USUAL.items():
        for family in families:
            targets = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[family]
            assert sorted(outputs + inputs) == sorted(targets), family
            assert list(inputs) == constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[family], family
    assert usual_modules("bloom") is None


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments .'queries'.")
def test_queries_left_alone_are_scaled_by_one_in_peft(tmp_path):
    model = small_model("gpt2")
    adapter = attach(model, IA3())
    move(adapter)
    adapter.save(tmp_path)
    with torch.no_grad():
        loaded = peft.PeftModel.from_pretrained(small_model("gpt2"), tmp_path)
        assert_near(logits(loaded), logits(model))


# ------------------------------------------------------------------------------------------------- PEFT's files


def peft_folder(path, architecture="llama", **fields):
    """A folder that PEFT wrote, with random vectors, and the model it wrote it from."""
    config = peft.IA3Config(task_type=task(architecture), init_ia3_weights=False, **fields)
    model = peft.get_peft_model(small_model(architecture), config)
    model.save_pretrained(path)
    return model


def loaded_logits(architecture, path):
    model = small_model(architecture)
    load_adapter(model, path)
    return logits(model).detach()


def test_a_file_that_peft_writes_and_refuses(tmp_path):
    """Without feedforward modules PEFT writes down the family's, targets or not, and then wants them to be targets."""
    expected = logits(peft_folder(tmp_path, target_modules=["k_proj"])).detach()
    with pytest.raises(ValueError, match="should be a subset"):
        peft.PeftModel.from_pretrained(small_model("llama"), tmp_path)
    assert_near(loaded_logits("llama", tmp_path), expected)


def test_feedforward_names_that_begin_in_the_middle_of_a_word(tmp_path):
    expected = logits(peft_folder(tmp_path / "theirs", "t5", target_modules=["o", "wo"], feedforward_modules=["o"]))
    model = small_model("t5")
    adapter = load_adapter(model, tmp_path / "theirs")
    assert all(part.feedforward for part in adapter.parts.values())
    assert_near(logits(model), expected)
    adapter.save(tmp_path / "ours")
    assert_near(logits(peft.PeftModel.from_pretrained(small_model("t5"), tmp_path / "ours")), expected)

    model = small_model("t5")  # and the other way: "o" alone
    adapter = attach(model, IA3(targets=("o", "wo"), feedforward=("o",)))
    move(adapter)
    adapter.save(tmp_path / "strict")
    assert_near(logits(peft.PeftModel.from_pretrained(small_model("t5"), tmp_path / "strict")), logits(model))


def test_a_minimal_file(tmp_path):
    expected = logits(peft_folder(tmp_path, "gpt2")).detach()
    (tmp_path / CONFIG).write_text('{"peft_type": "IA3"}')
    assert_near(loaded_logits("gpt2", tmp_path), expected)  # queries scaled, as PEFT does


def test_a_config_without_extras_writes_names(tmp_path):
    attach(small_model("llama"), IA3()).save(tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert fields["feedforward_modules"] == ["down_proj"] and "queries" not in fields


def test_several_adapters_of_peft_multiply_and_ours_do_not():
    reference = peft.get_peft_model(small_model("llama"), peft.IA3Config(task_type="CAUSAL_LM"))
    reference.add_adapter("second", peft.IA3Config(task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "ia3_l" in name:
                parameter.fill_(2 if name.endswith("second") else 3)
    reference.base_model.set_adapter(["default", "second"])
    expected = logits(reference)
    model = small_model("llama")
    for name, value in (("default", 3), ("second", 6)):
        for parameter in attach(model, IA3(), name).parameters():
            parameter.data.fill_(value)
    assert_near(logits(model), expected)  # six, not eighteen
