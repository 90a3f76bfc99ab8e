"""Which modules of a model a configuration means, and an error that helps when it means none."""

import difflib
import re

from torch import nn

from utils.methods.lora import is_conv1d
from utils.methods.wrapper import Wrapper


def match_targets(names, targets):
    """The names that the targets mean: a name matches a target if it equals it or ends with "." and the target.

    names: module paths in the model's order   targets: short names or whole paths
    returns the matching names, in the model's order, each once
    raises ValueError that lists every target that matches nothing
    """
    names = list(names)
    unmatched = [t for t in targets if not any(n == t or n.endswith("." + t) for n in names)]
    if unmatched:
        raise ValueError(f"no module is called {', '.join(unmatched)}")
    return [n for n in names if any(n == t or n.endswith("." + t) for t in targets)]


def matches(name, pattern):
    """Whether a module path fits a tuple of names, or, for a str, a regular expression over the whole path."""
    if isinstance(pattern, str):
        return re.fullmatch(pattern, name) is not None
    return any(name == p or name.endswith("." + p) for p in pattern)


def module_tree(module, prefix=""):
    """(path, module) of every module, with a wrapper standing for what it wraps."""
    yield prefix, module
    if not isinstance(module, Wrapper):
        for name, child in module.named_children():
            yield from module_tree(child, f"{prefix}.{name}" if prefix else name)


def task_head(model):
    """The name of a classification head, which a task trains whole, or None for a language model."""
    if "Classification" not in type(model).__name__:
        return None
    return next((n for n in ("classifier", "score") if hasattr(model, n)), None)


def select(model, config):
    """The paths of the modules that `config` means in `model`, or ValueError with the reason and the nearest names."""
    modules = {path: m.core if isinstance(m, Wrapper) else m for path, m in module_tree(model)}
    kept_whole = whole_modules(model, config)
    open_to_all = [p for p in modules if p and not any(p == k or p.startswith(k + ".") for k in kept_whole)]
    targets = config.targets
    if targets is None:
        family = getattr(getattr(model, "config", None), "model_type", "")
        targets = config.default_targets(family)
        if targets is None:
            raise ValueError(f"no usual targets are known for the model family {family!r}: name them with targets=")
    if targets == "all-linear":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = [p for p in open_to_all if is_linear(modules[p]) and modules[p] is not core_of(output)]
    elif isinstance(targets, str):
        try:
            found = [p for p in open_to_all if re.fullmatch(targets, p)]
        except re.error as error:
            raise ValueError(f"targets is not a regular expression: {targets!r} ({error})") from None
    else:
        try:
            found = match_targets(open_to_all, targets)
        except ValueError as error:
            raise ValueError(f"{error} in this {type(model).__name__}. {near_names(open_to_all, targets)}") from None
    if not found:
        raise ValueError(f"targets={targets!r} matches no module of this {type(model).__name__}")
    found = [p for p in found if not matches(p, config.exclude)]
    if config.layers is not None:
        numbers = {int(n) for p in modules for n in re.findall(r"\.(\d+)(?=\.|$)", p)[:1]}
        missing = sorted(set(config.layers) - numbers)
        if missing:
            raise ValueError(f"layers {missing} do not exist; this model's layers are 0 to {max(numbers, default=-1)}")
        found = [p for p in found if (n := re.search(r"\.(\d+)\.", p)) and int(n[1]) in config.layers]
    if not found:
        raise ValueError("exclude and layers together leave no module to adapt")
    return found


def is_linear(module):
    return isinstance(module, nn.Linear) or is_conv1d(module)


def core_of(module):
    return module.core if isinstance(module, Wrapper) else module


def near_names(paths, targets):
    """A sentence with the module names that resemble what was asked for."""
    last = sorted({p.rsplit(".", 1)[-1] for p in paths if not p.rsplit(".", 1)[-1].isdigit()})
    near = sorted({n for t in targets for n in difflib.get_close_matches(t.rsplit(".", 1)[-1], last, 3, 0.5)})
    return f"Near in name: {', '.join(near)}." if near else f"It has: {', '.join(last)}."


def whole_modules(model, config):
    """The paths of the modules that are trained whole (`modules_to_save`)."""
    names = config.modules_to_save
    if names is None:
        names = (head,) if (head := task_head(model)) else ()
    paths = [p for p, _ in module_tree(model)]
    try:
        return match_targets(paths, names)
    except ValueError as error:
        raise ValueError(f"modules_to_save: {error}. {near_names(paths, names)}") from None


def pattern_value(pattern, path, default):
    """The value for `path` in a {name or regex: value} dict; a key may mean the end of the path, as in PEFT."""
    return next((v for k, v in pattern.items() if re.match(rf"(.*\.)?({k})$", path)), default)


def base_parameters(model):
    """(name, parameter) of the model's own parameters, named as without any adapter."""
    for path, module in module_tree(model):
        for name, parameter in core_of(module).named_parameters(recurse=isinstance(module, Wrapper)):
            yield (f"{path}.{name}" if path else name), parameter


def shared_parameters(model):
    """id of a parameter -> all the names under which the model holds it."""
    names = {}
    for name, parameter in base_parameters(model):
        names.setdefault(id(parameter), []).append(name)
    return names
