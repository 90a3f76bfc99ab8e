"""Adapters that cannot be written, and files that cannot be read: one clear sentence each, and nothing changed (see
wrong.py). A loader that skips what it does not understand gives a model that is quietly not the trained one."""

import json
import math
import struct
from functools import partial

import pytest
import torch
import transformers as tf
from method_table import config_of
from safetensors.torch import load_file, save_file
from small_models import move, small_model
from torch import nn
from wrong import OTHERS, Table, attached, attached_other, check

from utils import LoRA, attach, load_adapter
from utils.checkpoint import CONFIG, STATE, WEIGHTS, to_file

TABLE = Table()
KEY = r"model\.layers\.\d\.self_attn\.._proj\.lora_"
FIT = r"the adapter in .* does not fit this LlamaForCausalLM: "
UNFIT = r"the adapter in .* does not fit this \w+: "
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


@damaged("NaN in float8", r"1 tensors in .* hold NaN or infinity, .*lora_A\.weight among them")
def _(tmp):
    name = min(load_file(tmp / WEIGHTS))
    edit_tensors(tmp, lambda n, t: (n, (t * math.nan).to(torch.float8_e4m3fn) if n == name else t))


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


# ------------------------------------------------------------------------------------------ the same, method by method

WITH_STATE = ("adalora", "p-tuning", "prefix through a network", "mam", "unipelt")
OWN_FORMAT = ("houlsby", "pfeiffer", "parallel", "bitfit", "mam", "unipelt")


def resized(architecture, **sizes):
    """A model of the same architecture in another size."""
    model = small_model(architecture)
    settings = model.config.to_dict() | sizes
    return type(model)(type(model.config)(**settings))


def spare_bert(kind, classes=3):
    """BERT of the small model's size under another head: tf.BertForMaskedLM, ..."""
    config = small_model("bert").config
    config.num_labels = classes
    return kind(config)


def saved(tmp, method, model=None):
    """A folder with an adapter that is not the identity."""
    adapter = attached_other(method, model)
    move(adapter, by=0.01)
    adapter.save(tmp)


def damaged_other(method, name, says):
    """`damaged` for an adapter of another method, on its model of OTHERS."""

    def put(spoil):
        @TABLE.row(f"{method}: {name}", says)
        def run(model, tmp):
            saved(tmp, method)
            spoil(tmp)
            model = small_model(OTHERS[method])
            yield model
            load_adapter(model, tmp)

    return put


def first(change):
    """Change the first tensor of a file: change(tensor) -> tensor, or None to drop it."""

    def spoil(tmp, file=WEIGHTS):
        tensors = load_file(tmp / file)
        name = min(tensors)
        tensors[name] = change(tensors[name])
        save_file({n: t.contiguous() for n, t in tensors.items() if t is not None}, tmp / file)

    return spoil


TENSORS = {
    "a tensor missing": (UNFIT + r"1 tensors are missing: \S+", lambda t: None),
    "a tensor of another shape": (
        UNFIT + r"1 tensors have another shape: \S+",
        lambda t: t.repeat(2, *[1] * (t.ndim - 1)),
    ),
    "a tensor of whole numbers": (UNFIT + r"1 tensors hold another kind of numbers: \S+", lambda t: t.to(torch.int8)),
    "NaN in the file": (r"1 tensors in \S+ hold NaN or infinity, \S+ among them", lambda t: t * math.nan),
}
for method in OTHERS:
    for what, (says, change) in TENSORS.items():
        damaged_other(method, what, says)(first(change))

    @damaged_other(method, "a tensor too many", UNFIT + r"1 tensors have no place: \S+")
    def _(tmp, method=method):
        extra = to_file("lm_head.extra", config_of(method, OTHERS[method]))
        save_file(load_file(tmp / WEIGHTS) | {extra: torch.zeros(1)}, tmp / WEIGHTS)

    @TABLE.row(f"{method}: NaN saved", r"\d+ tensors hold NaN or infinity, \S+ among them: nothing was written")
    def _(model, tmp, method=method):
        adapter = attached_other(method)
        adapter.save(tmp)
        adapter.parameters()[0].data.fill_(math.nan)
        yield adapter.model
        adapter.save(tmp)


SPOILED = {"cut off": lambda content: content[:-9], "a pickle": lambda content: b"PK\3\4" + content}
for method in WITH_STATE:
    for what, change in SPOILED.items():
        says = rf".*{STATE} is damaged or not a safetensors file: .*"

        @damaged_other(method, f"training state {what}", says)
        def _(tmp, change=change):
            (tmp / STATE).write_bytes(change((tmp / STATE).read_bytes()))

    @damaged_other(method, "training state of another method", UNFIT + rf"\d+ tensors are missing in {STATE}: .*")
    def _(tmp):
        save_file({"other": torch.zeros(1)}, tmp / STATE)

    @damaged_other(method, "training state with a tensor more", UNFIT + rf"1 tensors have no place in {STATE}: other")
    def _(tmp):
        save_file(load_file(tmp / STATE) | {"other": torch.zeros(1)}, tmp / STATE)


for method in ("mam", "unipelt"):
    says = UNFIT + rf"the network in {STATE} makes another prefix than .*"

    @damaged_other(method, "training state of another run", says)
    def _(tmp, method=method):
        kept = (tmp / WEIGHTS).read_bytes()
        saved(tmp, method)
        (tmp / WEIGHTS).write_bytes(kept)


@damaged_other("adalora", "training state of a longer run", UNFIT + r"the file for .* is at step 99 of a schedule of 9")
def _(tmp):
    save_file(load_file(tmp / STATE) | {"step": torch.tensor(99)}, tmp / STATE)


@damaged_other("adalora", "training state of numbers", UNFIT + rf"1 tensors hold another kind of .* in {STATE}: .*")
def _(tmp):
    first(lambda kept: kept.to(torch.int8))(tmp, STATE)


# ------------------------------------------------------------------------------------------ on another model


def unfit(method, what, says, other, base=None):
    """A row: what was saved on one model does not fit another. other, base: make these; None: the one of OTHERS."""

    @TABLE.row(f"{method}: {what}", UNFIT + says)
    def _(model, tmp):
        saved(tmp, method, base and base())
        model = other()
        yield model
        load_adapter(model, tmp)


HEAD = r"classifier\.bias, classifier\.weight"
SHAPES, LACKING = (
    r"\d+ tensors have another shape: .*",
    r"\d+ tensors (are missing|have no place|have another shape): .*",
)
bert, language_bert = partial(small_model, "bert"), partial(spare_bert, tf.BertForMaskedLM)
five_classes = partial(spare_bert, tf.BertForSequenceClassification, classes=5)
for method, architecture in OTHERS.items():
    width = {"hidden_size": 64} if architecture == "bert" else {"hidden_size": 64, "head_dim": 16}
    unfit(method, "a wider base", SHAPES, partial(resized, architecture, **width))
    if method not in ("prompt tuning", "p-tuning"):  # a prompt in front fits any depth, and any family of its width
        unfit(method, "fewer layers", LACKING, partial(resized, architecture, num_hidden_layers=1, layer_types=None))
        if method not in ("prefix through a network", "p-tuning v2"):
            says = rf"(no module is called .*|{LACKING})"
            unfit(method, "another family", says, partial(small_model, "gpt2"))
    if method != "llama-adapter":  # which is not for BERT
        says = rf"(.*; )?\d tensors have no place: .*{HEAD}"
        unfit(method, "a head where the model has none", says, language_bert, base=bert)
        unfit(method, "a head of other classes", rf"2 tensors have another shape: {HEAD}", five_classes, base=bert)
    if method in OWN_FORMAT:
        says = rf"\d tensors are missing: .*{HEAD}.*"
        unfit(method, "no head where the model has one", says, bert, base=language_bert)


# ------------------------------------------------------------------------------------------ configurations

READS = r"this version reads LoRA, DoRA, .*, UniPELT"
OWN_FIELDS = {
    "another version": ({"format_version": 2}, r"format_version is 2; this version reads 1"),
    "no version": ({"format_version": None}, r"format_version is None; this version reads 1"),
    "an unknown method": ({"method": "Compacter"}, rf"method is 'Compacter'; {READS}"),
    "two methods": ({"method": ["MAM"]}, rf"method is \['MAM'\]; {READS}"),
    "settings of another method": ({"method": "BitFit"}, r"BitFit has no setting activation, .*, size"),
    "an unknown setting": ({"settings": {"size": 3, "depth": 2}}, r"PfeifferAdapter has no setting depth"),
    "a setting of the wrong type": ({"settings": {"size": "3"}}, r"size is '3'; it must be a whole number from 1 up"),
    "settings in a list": ({"settings": [3]}, r"it holds no settings"),
    "no settings": ({"settings": None}, r"it holds no settings"),
    "another format": ({"format": "adapter-hub"}, r"peft_type is None; this version reads .*'LORA'.*"),
}
for what, (fields, says) in OWN_FIELDS.items():
    damaged_other("pfeiffer", f"config: {what}", rf".*adapter_config\.json: {says}")(
        lambda tmp, fields=fields: edit(tmp, **fields)
    )

WHOLE = r"must be a whole number from 1 up"
PEFT_FIELDS = {
    "dora": [
        ({"use_dora": "yes"}, r"use_dora is 'yes'; it can be None, False, True"),
        ({"use_rslora": "false"}, r"use_rslora is 'false'; it can be None, False, True"),
        ({"peft_type": ["LORA"]}, r"peft_type is \['LORA'\]; this version reads .*"),
    ],
    "adalora": [({"lora_alpha": "8"}, r"alpha is '8'; it must be a positive number")],
    "llama-adapter": [({"adapter_len": None}, rf"adapter_len is None; it {WHOLE}")],
    "prompt tuning": [({"num_transformer_submodules": True}, r"num_transformer_submodules is True; it can be 1, 2")],
    "p-tuning": [
        ({"encoder_reparameterization_type": None}, r"encoder is 'none'; it can be 'mlp', 'lstm'"),
        ({"encoder_hidden_size": "32"}, rf"hidden is '32'; it {WHOLE}"),
    ],
    "prefix through a network": [
        ({"num_virtual_tokens": 5.0}, rf"num_virtual_tokens is 5\.0; it {WHOLE}"),
        ({"encoder_hidden_size": 0}, rf"hidden is 0; it {WHOLE}"),
    ],
    "ia3": [
        ({"feedforward_modules": 3}, r"feedforward is 3; it can be a tuple of names of modules, .*"),
        ({"target_modules": []}, r"targets is empty: name at least one module, .*"),
    ],
}
for method, wrong in PEFT_FIELDS.items():
    for fields, says in wrong:
        damaged_other(method, f"config with {fields}", rf".*adapter_config\.json: {says}")(
            lambda tmp, fields=fields: edit(tmp, **fields)
        )


@damaged_other("dora", "read as LoRA", UNFIT + r"4 tensors have no place: \S+lora_magnitude_vector, .*")
def _(tmp):
    edit(tmp, use_dora=False)


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
