"""Adapter files: PEFT's format, read and written strictly.

A folder with two files, which `peft.PeftModel.from_pretrained` reads as well:
    adapter_config.json          the method and its settings
    adapter_model.safetensors    the trained tensors, named base_model.model.<module path>.<tensor>
and for methods that train through an encoder, of which PEFT keeps only the result, a third one:
    training_state.safetensors   what is needed to go on training

A method that PEFT does not have is written in a format of our own: the same two files, but the configuration says
"format": "peft-from-scratch", its version, and the method's own settings instead of a peft_type.

Only safetensors are read: a pickle can run code when it is opened. A file must hold exactly the tensors that its
configuration means on this model. Too few, too many, another shape or a number that is not finite is an error that
names them, and the model stays as it was.
"""

import json
import os
import re
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from utils.attach import adapters, attach
from utils.methods.parts import Guest, TrainedCopy, Wrapper
from utils.methods.registry import HOME, method, peft_method
from utils.paths import ROOT
from utils.quantization.linear import QuantizedLinear
from utils.targeting import base_parameters, inside, module_tree, used_names

CONFIG, WEIGHTS, STATE = "adapter_config.json", "adapter_model.safetensors", "training_state.safetensors"
PREFIX = "base_model.model."
FORMAT, VERSION = "peft-from-scratch", 1
TASKS = {
    "CausalLM": "CAUSAL_LM",
    "LMHead": "CAUSAL_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "ConditionalGeneration": "SEQ_2_SEQ_LM",
    "QuestionAnswering": "QUESTION_ANS",
}


# ------------------------------------------------------------------------------------------------- writing


def save_adapter(adapter, path):
    """Write an adapter's two files into the folder `path`, and return it as a Path.

    raises ValueError for tensors that are not finite, OSError if the folder cannot be written; then no file changes
    """
    contents = {WEIGHTS: {to_file(n, adapter.config): t for n, t in file_tensors(adapter).items()}}
    if state := state_tensors(adapter):
        contents[STATE] = state
    files = {}
    for file, tensors in contents.items():
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        broken = [n for n, t in tensors.items() if not torch.isfinite(t).all()]
        if broken:
            raise ValueError(f"{len(broken)} tensors hold NaN or infinity, {broken[0]} among them: nothing was written")
        files[file] = save(tensors, metadata={"format": "pt"})
    files[CONFIG] = json.dumps(config_fields(adapter), indent=2).encode()
    path = Path(path)
    parts = {path / (name + ".part"): path / name for name in files}
    try:
        path.mkdir(parents=True, exist_ok=True)
        for part, content in zip(parts, files.values(), strict=True):  # a full disk must not leave half a file
            part.write_bytes(content)
        for part, file in parts.items():
            os.replace(part, file)
        if STATE not in files:  # another adapter's, which was in this folder before
            (path / STATE).unlink(missing_ok=True)
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
    if any(isinstance(m, QuantizedLinear) for m in model.modules()):
        raise ValueError("the base is in 4 bits, which a plain checkpoint is not: call dequantize_base(model) first")
    if path.exists() and not path.is_dir():
        raise OSError(f"the model could not be written to {path}: it is a file")
    was_merged = adapter.merged
    if not was_merged:
        adapter.merge()
    wrappers = {spot: m for spot, m in module_tree(model) if isinstance(m, Wrapper)}
    guests = [(spot, p) for a in adapters(model).values() for spot, p in a.parts.items() if isinstance(p, Guest)]
    try:
        for spot, guest in guests:
            guest.leave(model, spot)
        for spot, wrapper in wrappers.items():
            own = adapter.parts.get(spot)
            model.set_submodule(spot, own.copy if isinstance(own, TrainedCopy) else wrapper.core)
        model.save_pretrained(path)
    except OSError as error:
        raise OSError(f"the model could not be written to {path}: {error.strerror or error}") from None
    finally:
        for spot, wrapper in wrappers.items():
            model.set_submodule(spot, wrapper)
        for spot, guest in guests:
            guest.enter(model, spot)
        if not was_merged:
            adapter.unmerge()
    return path


def file_tensors(adapter):
    """Name in the file, without the prefix -> tensor. Biases of adapted layers live in PEFT's `base_layer`."""
    tensors = {}
    for path, part in adapter.parts.items():
        for key, tensor in part.exported().items():
            tensors[key if part.nameless or not path else f"{path}.{key}"] = tensor
    for name, tensor in adapter.bias_values().items():
        module = name.rsplit(".", 1)[0]
        tensors[f"{module}.base_layer.bias" if module in adapter.parts else name] = tensor
    return tensors


def state_tensors(adapter):
    """Name -> tensor of what only further training needs."""
    return {
        f"{path}.{key}" if path else key: tensor
        for path, part in adapter.parts.items()
        for key, tensor in part.training_state().items()
    }


def to_file(name, config):
    """A tensor's name in the file. Prompt methods have a shorter prefix in PEFT, and none before their one tensor."""
    if name in getattr(config, "bare_names", ()):
        return name
    return getattr(config, "file_prefix", PREFIX) + name


def config_fields(adapter):
    """The fields of adapter_config.json. A dict with sorted lists, so that the same adapter writes the same bytes."""
    config, model = adapter.config, adapter.model
    base = {"base_model_name_or_path": base_name(getattr(model, "config", None))}
    if not getattr(config, "peft_type", None):
        kind = {"format": FORMAT, "format_version": VERSION, "method": type(config).__name__}
        return kind | base | {"settings": own_settings(config)}
    whole = sorted(p for p, part in adapter.parts.items() if isinstance(part, TrainedCopy))
    default = getattr(config, "default_task", None)
    fields = {
        "peft_type": config.peft_type,
        "task_type": next((t for part, t in TASKS.items() if part in type(model).__name__), default),
        **base,
        "inference_mode": True,
    }
    if whole:  # PEFT's configuration of some methods has no such field, and warns of it
        fields["modules_to_save"] = whole
    if hasattr(config, "targets"):
        wrappers = [p for p, part in adapter.parts.items() if isinstance(part, Wrapper)]
        adapted = [p for p in wrappers if p not in whole]
        fields["target_modules"] = peft_targets(config, model, adapted)
        fields["fan_in_fan_out"] = any(type(adapter.parts[p].core).__name__ == "Conv1D" for p in adapted)
    return fields | config.to_peft(adapter)


def peft_targets(config, model, adapted):
    """`target_modules` for PEFT's file: names or a regular expression that mean exactly the paths in `adapted`."""
    targets = config.targets
    if targets is None:
        targets = config.default_targets(model.config.model_type)
    if targets == "all-linear" or config.exclude or config.layers is not None:
        # Written out, so that every reader means the same modules: PEFT counts layers in another way than we do.
        targets = shortest_names(adapted, [p for p, _ in module_tree(model)])
    return targets if isinstance(targets, str) else sorted(targets)


def own_settings(config):
    """The settings of a method that PEFT has not, as JSON has them. A dtype is how a run computes, not what it made."""
    return {f.name: getattr(config, f.name) for f in dataclass_fields(config) if f.name != "dtype"}


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
    try:
        config = read_method(fields, model)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    tensors = read_tensors(folder / WEIGHTS, config)
    state = read_state(folder / STATE)
    adapter = None
    try:
        adapter = attach(model, config, name)
        fill(adapter, tensors, state, trainable)
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
        return Path(snapshot_download(str(path), allow_patterns=[CONFIG, WEIGHTS, STATE]))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {path} here, and the hub did not give it ({type(error).__name__})"
        ) from None


def read_config(file):
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {CONFIG}: is it an adapter's folder?")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds no settings but a {type(fields).__name__}")
    return fields


def read_method(fields, model):
    """The configuration that an adapter_config.json describes for this model.

    raises ValueError for a method, a version or a setting that this package does not know
    """
    if fields.get("format") == FORMAT:
        return read_own(fields)
    try:
        config = peft_method(fields).from_peft(fields)
    except TypeError as error:
        raise ValueError(f"a setting has the wrong type: {error}") from None
    return in_peft_terms(config, [p for p, _ in module_tree(model) if p])


def read_own(fields):
    """The configuration in a file of our own format."""
    if fields.get("format_version") != VERSION:
        raise ValueError(f"format_version is {fields.get('format_version')!r}; this version reads {VERSION}")
    name, values = fields.get("method"), fields.get("settings")
    if not isinstance(name, str) or name not in HOME:
        raise ValueError(f"method is {name!r}; this version reads {', '.join(HOME)}")
    if not isinstance(values, dict):
        raise ValueError("it holds no settings")
    known = {f.name for f in dataclass_fields(method(name))}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{name} has no setting {', '.join(unknown)}")
    return method(name)(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def in_peft_terms(config, paths):
    """The configuration with its names read as PEFT reads them, which is more loosely than `attach`.

    paths: of all modules of the model
    modules_to_save means every module whose path ends in one of the names, in the middle of a word too, and may list
    heads that the model has not. Targets may lie inside such a module, where they count for nothing. Names to exclude
    may fit nothing. A configuration with more such names reads them in its own `in_peft_terms`.
    """
    whole = tuple(p for p in paths if p.endswith(config.modules_to_save))
    if not hasattr(config, "targets"):
        return replace(config, modules_to_save=whole)
    targets = config.targets
    if isinstance(targets, tuple):
        outside = [p for p in paths if not any(inside(p, w) for w in whole)]
        useless = set(used_names(paths, targets)) - set(used_names(outside, targets))
        targets = tuple(t for t in targets if t not in useless)
    config = replace(config, targets=targets, modules_to_save=whole, exclude=used_names(paths, config.exclude))
    return config.in_peft_terms(paths) if hasattr(config, "in_peft_terms") else config


def read_tensors(file, config):
    """The tensors of an adapter's safetensors file, names without PEFT's prefix."""
    if not file.is_file():
        pickles = [f.name for f in file.parent.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".pkl")]
        if pickles:
            raise ValueError(
                f"{file.parent / pickles[0]} is a pickle: opening one can run code, so only {WEIGHTS} is read"
            )
        raise FileNotFoundError(f"{file.parent} holds no {WEIGHTS}")
    tensors = open_tensors(file)
    prefix, bare = getattr(config, "file_prefix", PREFIX), getattr(config, "bare_names", ())
    strangers = [n for n in tensors if not n.startswith(prefix) and n not in bare]
    if strangers:
        raise ValueError(f"{file} names its tensors in another way than PEFT: {strangers[0]}")
    # With bias="all" PEFT also writes the biases inside its wrapper of a head: of two copies the trained one counts.
    tensors = {n: t for n, t in tensors.items() if ".original_module." not in n}
    return {re.sub(r"\.(modules_to_save|default)(?=\.)", "", n.removeprefix(prefix)): t for n, t in tensors.items()}


def read_state(file):
    """The tensors of the file for further training, {} if there is none."""
    return open_tensors(file) if file.is_file() else {}


def open_tensors(file):
    """What a safetensors file holds; ValueError for a damaged one, or one with NaN or infinity."""
    try:
        tensors = load(file.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not a safetensors file: {error}") from None
    # torch has no isfinite for float8; whatever has one byte fits into float32
    broken = [n for n, t in tensors.items() if not torch.isfinite(t.float() if t.itemsize == 1 else t).all()]
    if broken:
        raise ValueError(f"{len(broken)} tensors in {file} hold NaN or infinity, {broken[0]} among them")
    return tensors


def fill(adapter, tensors, state, trainable):
    """Copy tensors into an adapter's parameters; ValueError unless names and shapes are exactly the adapter's.

    tensors: of the main file   state: of the file for further training, {} if there was none
    trainable: whether the adapter is to be trained further
    """
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
    demand(own, {n: t for n, t in tensors.items() if n not in base or n in own}, extra)
    own_state = state_tensors(adapter)
    if state and own_state:
        demand(own_state, state, state.keys() - own_state.keys(), f" in {STATE}")
    with torch.no_grad():
        for path, part in adapter.parts.items():
            start = "" if part.nameless or not path else path + "."
            rest = path + "." if path else ""
            part.load(
                {key: tensors[start + key] for key in part.exported()},
                {key: state[rest + key] for key in part.training_state()} if state else None,
                trainable,
            )
        for name, parameter in adapter.bias_values().items():
            module = name.rsplit(".", 1)[0]
            parameter.copy_(tensors[f"{module}.base_layer.bias" if module in adapter.parts else name])


def demand(own, found, extra, where=""):
    """Raise ValueError unless the tensors found are the own ones by name, shape and kind of numbers.

    extra: names that have no place
    """
    both = own.keys() & found.keys()
    problems = [
        (f"{len(names)} tensors {what}{where}: {', '.join(sorted(names)[:3])}")
        for what, names in (
            ("are missing", own.keys() - found.keys()),
            ("have no place", extra),
            ("have another shape", [n for n in both if own[n].shape != found[n].shape]),
            ("hold another kind of numbers", [n for n in both if kind_of(own[n]) != kind_of(found[n])]),
        )
        if names
    ]
    if problems:
        raise ValueError("; ".join(problems))


def kind_of(tensor):
    """The dtype, where a floating-point one is as good as another."""
    return "float" if tensor.is_floating_point() else tensor.dtype
