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
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from utils.attach import adapters, attach
from utils.methods.lora import LoRA
from utils.methods.wrapper import TrainedCopy, Wrapper
from utils.paths import ROOT
from utils.targeting import base_parameters, inside, module_tree, used_names

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
    "kasa_config",
)  # fmt: skip
# PEFT's other ways to begin (PiSSA, OLoRA, LoftQ, ...) change the base weights too, so such a file needs that base.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


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
    parts = {path / (name + ".part"): path / name for name in files}
    try:
        path.mkdir(parents=True, exist_ok=True)
        for part, content in zip(parts, files.values(), strict=True):  # a full disk must not leave half a file
            part.write_bytes(content)
        for part, file in parts.items():
            os.replace(part, file)
    except OSError as error:
        if path.is_dir():
            for part in parts:
                part.unlink(missing_ok=True)
        raise OSError(f"the adapter could not be written to {path}: {error.strerror or error}") from None
    return path


def export_model(adapter, path):
    """Write the model with the adapter merged in as a plain checkpoint into the folder `path`, and return it as a Path.

    Adapters on the model, this one and others, leave no trace in it.
    raises ValueError if the model is no transformers model or cannot be merged, OSError if the folder cannot be written
    """
    model, path = adapter.model, Path(path)
    if not hasattr(model, "save_pretrained"):
        raise ValueError(f"{type(model).__name__} is not a transformers model: save its state_dict yourself")
    if path.exists() and not path.is_dir():
        raise OSError(f"the model could not be written to {path}: it is a file")
    was_merged = adapter.merged
    if not was_merged:
        adapter.merge()
    wrappers = {spot: m for spot, m in module_tree(model) if isinstance(m, Wrapper)}
    try:
        for spot, wrapper in wrappers.items():
            own = adapter.wrappers.get(spot)
            model.set_submodule(spot, own.copy if isinstance(own, TrainedCopy) else wrapper.core)
        model.save_pretrained(path)
    except OSError as error:
        raise OSError(f"the model could not be written to {path}: {error.strerror or error}") from None
    finally:
        for spot, wrapper in wrappers.items():
            model.set_submodule(spot, wrapper)
        if not was_merged:
            adapter.unmerge()
    return path


def file_tensors(adapter):
    """Name in the file, without the prefix -> tensor. Biases of adapted layers live in PEFT's `base_layer`."""
    tensors = {}
    for name, tensor in (dict(adapter.named_parameters()) | adapter.bias_values()).items():
        module = name.rsplit(".", 1)[0]
        wrapped = name in adapter.biases and module in adapter.wrappers
        tensors[f"{module}.base_layer.bias" if wrapped else name] = tensor
    return tensors


def to_peft(adapter):
    """The fields of adapter_config.json. A dict with sorted lists, so that the same adapter writes the same bytes."""
    config, model = adapter.config, adapter.model
    adapted = [p for p, w in adapter.wrappers.items() if not isinstance(w, TrainedCopy)]
    whole = sorted(p for p, w in adapter.wrappers.items() if isinstance(w, TrainedCopy))
    settings, targets = getattr(model, "config", None), config.targets
    if targets is None:
        targets = config.default_targets(settings.model_type)
    if targets == "all-linear" or config.exclude or config.layers is not None:
        # Written out, so that every reader means the same modules: PEFT counts layers in another way than we do.
        targets = shortest_names(adapted, [p for p, _ in module_tree(model)])
    return {
        "peft_type": "LORA",
        "task_type": next((t for part, t in TASKS.items() if part in type(model).__name__), None),
        "base_model_name_or_path": base_name(settings),
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.scaling == "rslora",
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "modules_to_save": whole or None,
        "bias": config.bias,
        "fan_in_fan_out": any(type(adapter.wrappers[p].core).__name__ == "Conv1D" for p in adapted),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def base_name(settings):
    """What the file says about its base: the model's name, or its path, without this machine's part of it."""
    name = getattr(settings, "_name_or_path", None) or None
    if name and Path(name).is_relative_to(ROOT):
        return Path(name).relative_to(ROOT).as_posix()
    return name


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
    raises FileNotFoundError, ValueError, OSError or TypeError, with the model unchanged
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; load_adapter needs the model first, then the folder")
    before = [a for a in adapters(model).values() if a.active]
    folder = find_folder(path)
    fields = read_config(folder / CONFIG)
    tensors = read_tensors(folder)
    try:
        config = in_peft_terms(from_peft(fields), [p for p, _ in module_tree(model) if p])
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    adapter = None
    try:
        adapter = attach(model, config, name)
        fill(adapter, tensors)
    except ValueError as error:
        if adapter is not None:
            adapter.detach()
            for other in before:
                other.activate()
        raise ValueError(f"the adapter in {path} does not fit this {type(model).__name__}: {error}") from None
    adapter.trainable = trainable
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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=[CONFIG, WEIGHTS]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {path} here, and the hub did not give it ({type(error).__name__})"
        ) from None


def read_config(file):
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} holds no {CONFIG}: is it an adapter's folder?")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
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
    if fields.get("init_lora_weights") not in PLAIN_INITS:
        others.append(f"init_lora_weights={fields['init_lora_weights']!r}")
    if others:
        raise ValueError(f"the file uses {', '.join(others)}, which is not plain LoRA")
    layers = fields.get("layers_to_transform")
    return LoRA(
        r=fields.get("r", 8),
        alpha=fields.get("lora_alpha", 8),
        targets=fields.get("target_modules"),
        scaling="rslora" if fields.get("use_rslora") else "standard",
        dropout=fields.get("lora_dropout", 0.0),
        layers=((layers,) if isinstance(layers, int) else layers) or None,
        exclude=fields.get("exclude_modules") or (),
        rank_pattern=fields.get("rank_pattern") or {},
        alpha_pattern=fields.get("alpha_pattern") or {},
        bias=fields.get("bias", "none"),
        modules_to_save=fields.get("modules_to_save") or (),
    )


def in_peft_terms(config, paths):
    """The configuration with its names read as PEFT reads them, which is more loosely than `attach`.

    paths: of all modules of the model
    modules_to_save means every module whose path ends in one of the names, in the middle of a word too, and may list
    heads that the model has not. Targets may lie inside such a module, where they count for nothing. Names to exclude
    may fit nothing.
    """
    whole = tuple(p for p in paths if p.endswith(config.modules_to_save))
    targets = config.targets
    if isinstance(targets, tuple):
        outside = [p for p in paths if not any(inside(p, w) for w in whole)]
        useless = set(used_names(paths, targets)) - set(used_names(outside, targets))
        targets = tuple(t for t in targets if t not in useless)
    return replace(config, targets=targets, modules_to_save=whole, exclude=used_names(paths, config.exclude))


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
