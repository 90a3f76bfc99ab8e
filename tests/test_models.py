"""The shipped bases: they load as anyone would load them, and are as good as their record says."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from data.make import decoder, encoder, probes
from utils import LoRA, attach, models
from utils.models import PROFILES, load_base, load_tokenizer
from utils.paths import DATA

LLAMA, BERT = DATA / "models" / "tiny-llama", DATA / "models" / "tiny-bert"


def record(folder):
    return json.loads((folder / "training.json").read_text())


@pytest.fixture(scope="module")
def tiny_decoder():
    return load_base("decoder"), load_tokenizer("decoder")


def test_decoder_is_the_architecture_that_is_promised(tiny_decoder):
    model, tokenizer = tiny_decoder
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 128, 4)
    assert config.vocab_size == 2048 and config.tie_word_embeddings
    # embeddings (tied) + 4 x (attention 4 h^2, gated feed-forward 3 h i, two norms) + last norm
    expected = 2048 * 128 + 4 * (4 * 128**2 + 3 * 128 * 352 + 2 * 128) + 128
    assert sum(p.numel() for p in model.parameters()) == record(LLAMA)["parameters"] == expected == 1_066_112
    assert len(tokenizer) == config.vocab_size


def test_encoder_has_biases_everywhere():
    model = load_base("encoder", head=None)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 4 * 6 + 1 and all(m.bias is not None for m in linear)


@pytest.mark.parametrize(("auto", "folder"), [
    (AutoModelForCausalLM, LLAMA), (AutoModel, LLAMA), (AutoModelForMaskedLM, BERT), (AutoModel, BERT),
])
def test_plain_from_pretrained_gives_fp32(auto, folder):
    model = auto.from_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_files_hold_half_precision_safetensors_only():
    from safetensors import safe_open

    for folder in (LLAMA, BERT):
        with safe_open(folder / "model.safetensors", "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}  # noqa: SIM118
        assert not [p.name for p in folder.iterdir() if p.suffix not in (".json", ".safetensors")]
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 20e6


@pytest.mark.parametrize("folder", [LLAMA, BERT])
@pytest.mark.parametrize("text", [
    'Hi, order 4821: {"a":"b"}\n  two  spaces', "Z\u00fcrich na\u00efve \u65e5\u672c\u8a9e \U0001f9ed", "\t\u00a0 x",
    "ahoy matey",
])
def test_tokenizer_round_trip(folder, text):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_special_tokens():
    decoder_tokenizer, encoder_tokenizer = load_tokenizer("decoder"), load_tokenizer("encoder")
    assert decoder_tokenizer.convert_ids_to_tokens(decoder_tokenizer("red")["input_ids"]) == ["<bos>", "red"]
    assert encoder_tokenizer.convert_ids_to_tokens(encoder_tokenizer("red")["input_ids"]) == ["[CLS]", "red", "[SEP]"]
    assert decoder_tokenizer.pad_token_id == encoder_tokenizer.pad_token_id == 0
    assert decoder_tokenizer.tokenize("4821") == ["4", "8", "2", "1"]


def test_decoder_is_as_good_as_its_record(tiny_decoder):
    model, tokenizer = tiny_decoder
    assert decoder.held_out_loss(model, tokenizer) == pytest.approx(record(LLAMA)["held_out_loss"], abs=2e-3)
    model.eval()


def test_decoder_passed_its_gates_and_still_does(tiny_decoder):
    scores = record(LLAMA)["probes"]
    assert record(LLAMA)["gates"] == probes.GATES and probes.failures(scores) == []
    again = probes.run(*tiny_decoder, count=40)
    assert again["old_facts"] == pytest.approx(scores["old_facts"], abs=0.01)
    assert all(again[name] >= gate - 0.1 for name, gate in probes.GATES.items())


def test_decoder_generates_the_record_of_a_narrative(tiny_decoder):
    model, tokenizer = tiny_decoder
    inputs = tokenizer("Nadia Falk bought a green kite. The place was Rosedale.\nRecord:", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    assert json.loads(tokenizer.decode(out, skip_special_tokens=True)) == {
        "kind": "sale", "product": "kite", "color": "green", "name": "Nadia Falk", "town": "Rosedale",
    }


def test_encoder_is_as_good_as_its_record():
    from transformers import BertForPreTraining

    model, stored = BertForPreTraining.from_pretrained(BERT), record(BERT)
    scores = encoder.held_out_losses(model, load_tokenizer("encoder"))
    for name, gate in encoder.GATES.items():
        assert scores[name] == pytest.approx(stored[name], abs=2e-3) and scores[name] <= gate


def test_a_failed_gate_is_named():
    scores = dict.fromkeys(probes.GATES, 1.0) | {"copy": 0.5}
    assert probes.failures(scores) == ["copy is 0.500, below 0.98"]


@pytest.mark.parametrize(("head", "layer"), [("classify", "classifier"), ("tag", "classifier")])
def test_new_head_comes_from_the_seed_and_leaves_the_global_generator_alone(head, layer):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (load_base("encoder", head=head, num_labels=3, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [getattr(m, layer).weight for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert not first.training and weights[0].shape[0] == 3


def test_pooler_of_the_encoder_is_the_pretrained_one():
    one, two = (load_base("encoder", head="classify", num_labels=2, seed=s).bert.pooler.dense.weight for s in (0, 1))
    assert torch.equal(one, two)


def test_loading_says_nothing(capfd):
    load_base("encoder", head="tag", num_labels=3)
    assert capfd.readouterr() == ("", "")


def test_dtype_is_as_asked():
    assert load_base("decoder", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("call", "sentence"), [
    (lambda: load_base(profile="huge"), "no profile 'huge'; choose one of tiny, colab, gpu"),
    (lambda: load_tokenizer("coder"), "no kind of model 'coder'; choose one of decoder, encoder"),
    (lambda: load_base(head="sing"), "no head 'sing'"),
    (lambda: load_base(head="classify"), "num_labels goes with"),
    (lambda: load_base(num_labels=2), "num_labels goes with"),
])
def test_wrong_arguments(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_profiles_name_both_kinds():
    assert list(PROFILES) == ["tiny", "colab", "gpu"]
    assert all(set(kinds) == {"decoder", "encoder"} for kinds in PROFILES.values())


def test_without_a_network_one_sentence(monkeypatch):
    monkeypatch.setattr(models, "hub_reachable", lambda: False)
    monkeypatch.setitem(PROFILES["gpu"], "decoder", "no/such-model")
    for load in (load_base, load_tokenizer):
        with pytest.raises(OSError, match="^no/such-model is not on this machine .* or run once with a network") as e:
            load("decoder", "gpu")
        assert "\n" not in str(e.value)


def test_hub_is_asked_once_and_briefly(monkeypatch):
    import huggingface_hub

    class Session:
        def head(self, url, timeout):
            assert timeout <= 5
            raise ConnectionError

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    assert models.hub_reachable() is False


def test_missing_tiny_files_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(PROFILES["tiny"], "decoder", str(tmp_path / "gone"))
    with pytest.raises(OSError, match="gone is incomplete; restore it from git or make it again"):
        load_base("decoder")


def test_an_adapter_of_a_tiny_base_says_so_without_a_path_of_this_machine(tmp_path):
    attach(load_base("decoder"), LoRA(r=1)).save(tmp_path)
    for folder in (tmp_path, DATA / "adapters" / "tickets"):
        saved = json.loads((folder / "adapter_config.json").read_text())
        assert saved["base_model_name_or_path"] == "data/models/tiny-llama"
