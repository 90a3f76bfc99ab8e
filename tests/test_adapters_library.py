"""Our bottleneck adapters against AdapterHub's `adapters` 1.3, as recorded in fixtures/adapters by record_adapters."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from peft_pair import assert_near
from safetensors import safe_open

from utils import HoulsbyAdapter, ParallelAdapter, PfeifferAdapter, attach
from utils.methods.families import family_of

FIXTURES = Path(__file__).parent / "fixtures" / "adapters"
MODELS = ("bert", "roberta", "gpt2", "llama", "t5")
METHODS = {
    "double_seq_bn": HoulsbyAdapter(reduction=4, activation="swish", layer_norms=False, modules_to_save=()),
    "seq_bn": PfeifferAdapter(reduction=4, modules_to_save=()),
    "par_bn": ParallelAdapter(reduction=4, reads="residual", modules_to_save=()),
    "scaled_par_bn": ParallelAdapter(reduction=4, scale="learned", reads="residual", modules_to_save=()),
}
PLACES = {  # where the library keeps a layer's adapters: behind attention, behind the feed-forward part
    "bert": ("attention.output", "output"),
    "roberta": ("attention.output", "output"),
    "gpt2": ("attention_adapters", "output_adapters"),
    "llama": ("attention_adapters", "output_adapters"),
    "t5": ("layer.0", "layer.1"),
}
TENSORS = {
    "down.weight": "adapter_down.0.weight",
    "down.bias": "adapter_down.0.bias",
    "up.weight": "adapter_up.weight",
    "up.bias": "adapter_up.bias",
    "scale": "scaling",
}


def recorded(name):
    """The groups of tensors in a file, {"weight": {name: tensor}, ...}, and what it says about itself."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        about, groups = json.loads(file.metadata()["about"]), {}
        for key in file.keys():
            group, _, rest = key.partition(".")
            groups.setdefault(group, {})[rest] = file.get_tensor(key)
    return groups, about


def base_model(name):
    """The recorded model, and what was recorded of it."""
    base, about = recorded(f"base_{name}")
    config = getattr(transformers, about["config_class"])(**about["config"])
    model = getattr(transformers, about["class"])(config).eval()
    missing, unexpected = model.load_state_dict(base["weight"], strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}  # tied
    return model, base


def their_name(architecture, model, path, key):
    """The library's name of the tensor `key` of our adapter at `path`."""
    layer, spot = re.fullmatch(r"(.*?\.\d+)\.(.*)", path).groups()
    attention, ffn = PLACES[architecture]
    if architecture == "t5" and layer.startswith("decoder"):
        ffn = "layer.2"  # layer.1 is its attention to the encoder
    place = attention if spot == family_of(model, "the test")[0].attention_out else ffn
    return f"{layer}.{place}.adapters.x.{TENSORS[key]}"


@pytest.mark.parametrize("architecture", MODELS)
def test_the_base_is_the_recorded_one(architecture):
    model, base = base_model(architecture)
    with torch.no_grad():
        assert_near(model(**base["input"]).logits, base["logits"][""])


@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_output_and_gradients_are_theirs(method, architecture):
    model, base = base_model(architecture)
    theirs, _ = recorded(f"{method}_{architecture}")
    adapter = attach(model, METHODS[method])
    own = {
        their_name(architecture, model, path, key): tensor
        for path, part in adapter.parts.items()
        for key, tensor in part.tensors().items()
    }
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in theirs["tensor"].items()}
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(theirs["tensor"][name])
    logits = model(**base["input"]).logits
    assert (logits - base["logits"][""]).abs().max() > 0.1
    assert_near(logits, theirs["logits"][""])
    (logits * base["loss_weights"][""]).sum().backward()
    for name, tensor in own.items():
        assert_near(tensor.grad, theirs["gradient"][name])


def test_the_fixtures_say_what_made_them():
    versions = json.loads((FIXTURES / "versions.json").read_text())
    assert versions["adapters"].startswith("1.3") and versions["transformers"].startswith("4.57")
    assert sum(file.stat().st_size for file in FIXTURES.iterdir()) < 1e6
