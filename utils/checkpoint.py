"""Adapter files: PEFT's format, read and written strictly.

A folder with two files, which `peft.PeftModel.from_pretrained` reads as well:
    adapter_config.json          the method and its settings
    adapter_model.safetensors    the trained tensors, named base_model.model.<module path>.<tensor>

Only safetensors are read: a pickle can run code when it is opened. A file must hold exactly the tensors that its
configuration means on this model. Too few, too many, another shape or a number that is not finite is an error that
names them, and the model stays as it was.
"""

import json
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from utils.attach import adapters, attach
from utils.methods.lora import LoRA
from utils.methods.wrapper import TrainedCopy
from utils.targeting import base_parameters, module_tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
TASKS = {
    "CausalLM": "CAUSAL_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
    "QuestionAnswering": "QUESTION_ANS",
}
# Settings of PEFT's that change the computation and are not LoRA's: a file that sets one is not ours to read.
OTHER_METHODS = (
    "use_dora", "lora_bias", "target_parameters", "trainable_token_indices", "layer_replication", "megatron_config",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "velora_config", "monteclora_config",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------- writing


def save_adapter(adapter, path):
    """Write an adapter's two files into the folder `path`, and return it as a Path.

    raises ValueError for tensors that are not finite, OSError if the folder cannot be written; then no file changes
    """
    tensors = {PREFIX + n: p.detach().cpu().contiguous().clone() for n, p in file_tensors(adapter).items()}
    broken = [n for n, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors hold NaN or infinity, {broken[0]} among them: nothing was written")
    files = {WEIGHTS: save(tensors, metadata={"format": "pt"}), CONFIG: json.dumps(to_peft(adapter), indent=2).encode()}
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():  # whole or not at all: a full disk must not leave half a file
            (path / (name + ".part")).write_bytes(content)
        for name in files:
            os.replace(path / (name + ".part"), path / name)
    except OSError as error:
        raise OSError(f"the adapter could not be written to {path}: {error.strerror or error}") from None
    return path


def file_tensors(adapter):
    """Name in the file, without the prefix -> tensor. Biases of adapted layers live in PEFT's `base_layer`."""
    tensors = {}
    for name, tensor in adapter.named_parameters():
        module = name.rsplit(".", 1)[0]
        wrapped = name in adapter.biases and module in adapter.wrappers
        tensors[f"{module}.base_layer.bias" if wrapped else name] = tensor
    return tensors


def to_peft(adapter):
    """The fields of adapter_config.json. A dict with sorted lists, so that the same adapter writes the same bytes."""
    config, model = adapter.config, adapter.model
    adapted = [p for p, w in adapter.wrappers.items() if not isinstance(w, TrainedCopy)]
    whole = sorted(p for p, w in adapter.wrappers.items() if isinstance(w, TrainedCopy))
    targets, layers = config.targets, config.layers
    if targets is None:
        targets = config.default_targets(model.config.model_type)
    if targets == "all-linear" or config.exclude:  # written out, so that every reader means the same modules
        targets, layers = shortest_names(adapted, [p for p, _ in module_tree(model)]), None
    if getattr(model, "config", None) is None:
        task, base = None, None
    else:
        task = next((t for part, t in TASKS.items() if part in type(model).__name__), None)
        base = model.config._name_or_path or None
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "layers_to_transform": None if layers is None else sorted(layers),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": whole or None,
        "bias": config.bias,
        "fan_in_fan_out": any(type(adapter.wrappers[p].core).__name__ == "Conv1D" for p in adapted),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def shortest_names(chosen, everything):
    """The last parts of the chosen paths if they mean exactly these modules; else the whole paths."""
    last = {p.rsplit(".", 1)[-1] for p in chosen}
    meant = [p for p in everything if p.rsplit(".", 1)[-1] in last]
    return sorted(last) if sorted(meant) == sorted(chosen) else sorted(chosen)


# ------------------------------------------------------------------------------------------------- reading


def load_adapter(model, path, name="default", trainable=True):
    """Attach the adapter saved in the folder `path` (or in that repository of the hub) to `model`.

    trainable: False freezes what is loaded
    returns the Adapter, active
    raises FileNotFoundError, ValueError or OSError, with the model unchanged
    """
    before = [a for a in adapters(model).values() if a.active]
    folder = find_folder(path)
    fields = read_config(folder / CONFIG)
    tensors = read_tensors(folder)
    # PEFT lists every head a classifier might have ("classifier", "score"): the file's tensors tell which there was.
    saved = [m for m in fields.get("modules_to_save") or () if any(f".{m}." in f".{t}" for t in tensors)]
    config = from_peft(fields | {"modules_to_save": saved})
    try:
        adapter = attach(model, config, name)
    except ValueError as error:
        raise ValueError(f"the adapter in {path} does not fit this {type(model).__name__}: {error}") from None
    try:
        fill(adapter, tensors)
    except ValueError as error:
        adapter.detach()
        for other in before:
            other.activate()
        raise ValueError(f"the adapter in {path} does not fit this {type(model).__name__}: {error}") from None
    for parameter in adapter.parameters():
        parameter.requires_grad_(trainable)
    return adapter


def find_folder(path):
    """The local folder, or, for a name like "org/adapter", the two files fetched from the hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") != 1:
        raise FileNotFoundError(f"there is no folder {path}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=[CONFIG, WEIGHTS]))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {path} here, and the hub did not give it ({type(error).__name__})"
        ) from None


def read_config(file):
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} holds no {CONFIG}: is it an adapter's folder?")
    try:
        fields = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds no settings but a {type(fields).__name__}")
    return fields


def from_peft(fields):
    """The LoRA that an adapter_config.json describes, or ValueError for what is not plain LoRA."""
    kind = fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"peft_type is {kind!r}; this version reads 'LORA'")
    others = [name for name in OTHER_METHODS if fields.get(name)]
    if others:
        raise ValueError(f"the file uses {', '.join(others)}, which is not plain LoRA")
    layers = fields.get("layers_to_transform")
    try:
        return LoRA(
            r=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            targets=fields.get("target_modules"),
            scaling="rslora" if fields.get("use_rslora") else "standard",
            dropout=fields.get("lora_dropout", 0.0),
            layers=(layers,) if isinstance(layers, int) else layers,
            exclude=fields.get("exclude_modules") or (),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            bias=fields.get("bias", "none"),
            modules_to_save=fields.get("modules_to_save") or (),
        )
    except TypeError as error:
        raise ValueError(f"a setting in {CONFIG} is of the wrong kind: {error}") from None


def read_tensors(folder):
    """The tensors of a folder's safetensors file, names without PEFT's prefix."""
    file = folder / WEIGHTS
    if not file.exists():
        pickles = [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
        if pickles:
            raise ValueError(f"{folder / pickles[0]} is a pickle: opening one can run code, so only {WEIGHTS} is read")
        raise FileNotFoundError(f"{folder} holds no {WEIGHTS}")
    try:
        tensors = load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None
    strangers = [n for n in tensors if not n.startswith(PREFIX)]
    if strangers:
        raise ValueError(f"{file} names its tensors in another way than PEFT: {strangers[0]}")
    broken = [n for n, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors in {file} hold NaN or infinity, {broken[0]} among them")
    # With bias="all" PEFT also writes the biases inside its wrapper of a head: of two copies the trained one counts.
    tensors = {n: t for n, t in tensors.items() if ".original_module." not in n}
    return {re.sub(r"\.(modules_to_save|default)(?=\.)", "", n.removeprefix(PREFIX)): t for n, t in tensors.items()}


def fill(adapter, tensors):
    """Copy tensors into an adapter's parameters; ValueError unless names and shapes are exactly the adapter's."""
    own = file_tensors(adapter)
    base = dict(base_parameters(adapter.model))
    extra = []
    for name in tensors.keys() - own.keys():
        # PEFT writes the frozen base weight of an adapted embedding into the file: fine, if it is this base's.
        twin = base.get(name.replace(".base_layer.", "."))
        if twin is None or ".base_layer." not in name:
            extra.append(name)
        elif twin.shape != tensors[name].shape or not torch.equal(twin.cpu(), tensors[name].to(twin.dtype)):
            raise ValueError(f"{name} in the file differs from the model's: it was trained on another base")
    problems = [
        (f"{len(names)} tensors {what}: {', '.join(sorted(names)[:3])}")
        for what, names in (
            ("are missing", own.keys() - tensors.keys()),
            ("have no place", extra),
            ("have another shape", [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]),
        )
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
