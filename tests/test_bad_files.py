"""Adapters that cannot be written, and files that cannot be read: one clear sentence each, and nothing changed (see
wrong.py). A loader that skips what it does not understand gives a model that is quietly not the trained one."""

import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_model
from torch import nn
from wrong import Table, attached, check

from utils import LoRA, attach, load_adapter
from utils.checkpoint import CONFIG, WEIGHTS

TABLE = Table()
KEY = r"model\.layers\.\d\.self_attn\.._proj\.lora_"
FIT = r"the adapter in .* does not fit this LlamaForCausalLM: "
DAMAGED = r".*adapter_model\.safetensors is damaged or not a safetensors file: .*"

# ------------------------------------------------------------------------------------------------- writing


@TABLE.row("NaN saved", rf"1 tensors hold NaN or infinity, base_model\.model\.{KEY}A\.weight among them: nothing .*")
def _(model, tmp):
    adapter = attached(model)
    adapter.save(tmp)  # there is something to lose
    adapter.parameters()[0].data[0, 0] = math.nan
    yield
    adapter.save(tmp)


for verb in ("save", "export"):

    @TABLE.row(f"{verb} into a file", r"the (adapter|model) could not be written to .*/file: .*", OSError)
    def _(model, tmp, verb=verb):
        adapter = attached(model)
        (tmp / "file").write_text("mine")
        yield
        getattr(adapter, verb)(tmp / "file")

    @TABLE.row(f"{verb} below a file", r"the (adapter|model) could not be written to .*: Not a directory", OSError)
    def _(model, tmp, verb=verb):
        adapter = attached(model)
        (tmp / "file").write_text("mine")
        yield
        getattr(adapter, verb)(tmp / "file" / "folder")


@TABLE.row("full disk", r"the adapter could not be written to .*: No space left on device", OSError)
def _(model, tmp):
    adapter = attached(model)
    adapter.save(tmp)
    adapter.parameters()[0].data += 1
    write = type(tmp).write_bytes

    def until_full(self, content):
        write(self, content[:100])
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(tmp), "write_bytes", until_full)
        yield
        adapter.save(tmp)


@TABLE.row("export of a model of no library", r"Plain is not a transformers model: save its state_dict yourself")
def _(model, tmp):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = nn.Linear(4, 4)

    adapter = attach(Plain(), LoRA(targets=("q_proj",)))
    yield
    adapter.export(tmp / "plain")


# ------------------------------------------------------------------------------------------------- reading


def damaged(name, says, error=ValueError, architecture="llama", **options):
    """Put a row into the table: an adapter is saved, the decorated function spoils the folder, loading it raises."""

    def put(spoil):
        @TABLE.row(name, says, error)
        def run(model, tmp):
            attached(small_model(architecture), **options).save(tmp)
            spoil(tmp)
            yield
            load_adapter(model, tmp)

    return put


def edit(tmp, **fields):
    (tmp / CONFIG).write_text(json.dumps(json.loads((tmp / CONFIG).read_text()) | fields))


def edit_tensors(tmp, change):
    """Write the tensors again after change(name, tensor) -> (name, tensor) or None."""
    changed = [change(n, t) for n, t in load_file(tmp / WEIGHTS).items()]
    save_file(dict(c for c in changed if c), tmp / WEIGHTS)


def leave(tmp):
    """The file is fine; it is the model that it does not fit."""


damaged("base of another width", FIT + rf"4 tensors have another shape: {KEY}B.*", architecture="gemma")(leave)
damaged("base of another architecture", FIT + r"no .* c_attn in .*", architecture="gpt2", targets=("c_attn",))(leave)


@damaged("weights cut off", DAMAGED)
def _(tmp):
    (tmp / WEIGHTS).write_bytes((tmp / WEIGHTS).read_bytes()[:-100])


@damaged("weights empty", DAMAGED)
def _(tmp):
    (tmp / WEIGHTS).write_bytes(b"")


@damaged("header that claims to be huge", DAMAGED)
def _(tmp):
    (tmp / WEIGHTS).write_bytes(struct.pack("<Q", 2**62) + b"{}")


@damaged("header that is no JSON", DAMAGED)
def _(tmp):
    (tmp / WEIGHTS).write_bytes(struct.pack("<Q", 8) + b"not json")


@damaged("header that points outside the file", DAMAGED)
def _(tmp):
    header = b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'
    (tmp / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


@damaged("a pickle under the name of weights", DAMAGED)
def _(tmp):
    torch.save({"a": torch.zeros(1)}, tmp / WEIGHTS)


@damaged("a pickle only", r".*/adapter_model\.bin is a pickle: opening one can run code, so only .* is read")
def _(tmp):
    (tmp / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(1)}, tmp / "adapter_model.bin")


@damaged("no weights", r".* holds no adapter_model\.safetensors", FileNotFoundError)
def _(tmp):
    (tmp / WEIGHTS).unlink()


@damaged("no config", r".* holds no adapter_config\.json: is it an adapter's folder\?", FileNotFoundError)
def _(tmp):
    (tmp / CONFIG).unlink()


@damaged("config no JSON", r".*adapter_config\.json is not JSON: .*")
def _(tmp):
    (tmp / CONFIG).write_text("r: 8")


@damaged("config no text", r".*adapter_config\.json is not JSON: .*")
def _(tmp):
    (tmp / CONFIG).write_bytes(b"\xff\xfe\x00")


@damaged("config a list", r".*adapter_config\.json holds no settings but a list")
def _(tmp):
    (tmp / CONFIG).write_text("[1, 2]")


FIELDS = {
    "another method": ({"peft_type": "OFT"}, r"peft_type is 'OFT'; this version reads .*'LORA'.*"),
    "no method": ({"peft_type": None}, r"peft_type is None; this version reads .*'LORA'.*"),
    "a bias of its own": ({"lora_bias": True}, r"the file uses lora_bias, which is not plain LoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, r"the file uses init_lora_weights='pissa', which is not plain LoRA"),
    "rank as text": ({"r": "8"}, r"the rank is '8'; it must be a whole number from 1 up"),
    "rank null": ({"r": None}, r"the rank is None; it must be a whole number from 1 up"),
    "alpha null": ({"lora_alpha": None}, r"alpha is None; it must be a positive number"),
    "dropout as text": ({"lora_dropout": "0"}, r"dropout is '0'; it is a probability from 0 up to, not including, 1"),
    "targets a number": ({"target_modules": 5}, r"targets is 5; it can be a tuple of names of modules, .*"),
    "targets with null": ({"target_modules": ["q_proj", None]}, r"targets is \['q_proj', None\]; it can be .*"),
    "targets empty": ({"target_modules": []}, r"targets is empty: name at least one module, .*"),
    "layers as text": ({"layers_to_transform": "0"}, r"layers is '0'; it can be None or a tuple of layer numbers"),
    "pattern a list": ({"rank_pattern": ["q"]}, r"rank_pattern is \['q'\]; it must be a dict .*"),
    "bias unknown": ({"bias": "some"}, r"bias is 'some'; it can be 'none', 'lora_only', 'all'"),
    "whole modules a number": ({"modules_to_save": 5}, r"modules_to_save is 5; it can be a tuple of names of modules"),
}
for kind, (fields, says) in FIELDS.items():
    damaged(f"config: {kind}", rf".*adapter_config\.json: {says}")(lambda tmp, fields=fields: edit(tmp, **fields))


@damaged("config names other targets", FIT + rf"4 tensors are missing: {KEY}.*; 4 tensors have no place: {KEY}.*")
def _(tmp):
    edit(tmp, target_modules=["q_proj", "k_proj"])


@damaged("config without targets", FIT + rf"4 tensors have no place: {KEY}.*", targets=("q_proj", "v_proj", "k_proj"))
def _(tmp):
    edit(tmp, target_modules=None)


@damaged("config of another rank", FIT + rf"8 tensors have another shape: {KEY}.*")
def _(tmp):
    edit(tmp, r=5)


@damaged("NaN in the file", r"1 tensors in .* hold NaN or infinity, .*lora_B\.weight among them")
def _(tmp):
    name = sorted(load_file(tmp / WEIGHTS))[1]
    edit_tensors(tmp, lambda n, t: (n, t.index_fill(0, torch.tensor(0), math.nan) if n == name else t))


@damaged("tensors missing", FIT + rf"4 tensors are missing: {KEY}B\.weight, .*")
def _(tmp):
    edit_tensors(tmp, lambda n, t: None if "lora_B" in n else (n, t))


@damaged("tensors too many", FIT + r"1 tensors have no place: model\.layers\.9\.lora_A\.weight")
def _(tmp):
    extra = {"base_model.model.model.layers.9.lora_A.weight": torch.zeros(1)}
    save_file(load_file(tmp / WEIGHTS) | extra, tmp / WEIGHTS)


@damaged("names without the prefix", r".*adapter_model\.safetensors names its tensors in another way than PEFT: .*")
def _(tmp):
    edit_tensors(tmp, lambda n, t: (n.removeprefix("base_model.model."), t))


@damaged("another base's embedding", FIT + r".* differs from the model's: it was .*", targets=("embed_tokens",))
def _(tmp):
    other = {"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(64, 32)}
    save_file(load_file(tmp / WEIGHTS) | other, tmp / WEIGHTS)


# ------------------------------------------------------------------------------------------------- finding


@TABLE.row("no such folder", r"there is no folder .*/nowhere", FileNotFoundError)
def _(model, tmp):
    yield
    load_adapter(model, tmp / "nowhere")


@TABLE.row("a file for a folder", r"there is no folder .*/adapter_model\.safetensors", FileNotFoundError)
def _(model, tmp):
    attached(small_model("llama")).save(tmp)
    yield
    load_adapter(model, tmp / WEIGHTS)


@TABLE.row("model and folder swapped", r"the model is a \w+Path; load_adapter needs the model first, .*", TypeError)
def _(model, tmp):
    attached(small_model("llama")).save(tmp)
    yield
    load_adapter(tmp, model)


HUB = r" here, and the hub did not give it \(.*\)"


@TABLE.row("hub name without a network", rf"there is no folder someone/adapter{HUB}", FileNotFoundError)
def _(model, tmp):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
        load_adapter(model, "someone/adapter")


@TABLE.row("hub name that cannot be one", rf"there is no folder my runs/adapter \(1\){HUB}", FileNotFoundError)
def _(model, tmp):
    yield
    load_adapter(model, "my runs/adapter (1)")


@TABLE.cases()
def test_says_it_in_one_sentence_and_changes_nothing(case, tmp_path):
    check(case, tmp_path)
