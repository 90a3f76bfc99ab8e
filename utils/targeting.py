"""Which modules of a model a configuration means, and an error that helps when it means none."""

import difflib
import re

from torch import nn

from utils.methods.layers import is_conv1d
from utils.methods.parts import Guest, TrainedCopy, Wrapper, adapter_dtype, core_of


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
    """(path, module) of every module, with a wrapper standing for what it wraps, and without guests."""
    yield prefix, module
    if not isinstance(module, Wrapper):
        for name, child in module.named_children():
            if not isinstance(child, Guest):
                yield from module_tree(child, f"{prefix}.{name}" if prefix else name)


def task_head(model):
    """The name of the head that a task trains whole, for classes or for answers in a text, or None without one."""
    if not any(task in type(model).__name__ for task in ("Classification", "QuestionAnswering")):
        return None
    heads = ("classifier", "score", "classification_head", "qa_outputs")  # T5 has the third
    return next((n for n in heads if hasattr(model, n)), None)


def select(model, config):
    """The paths of the modules that `config` means in `model`, or ValueError with the reason and the nearest names."""
    modules = {path: core_of(m) for path, m in module_tree(model) if path}
    kept_whole = whole_modules(model, config)
    open_to_all = [p for p in modules if not any(inside(p, whole) for whole in kept_whole)]
    targets = config.targets
    if targets is None:
        family, name = getattr(getattr(model, "config", None), "model_type", ""), type(model).__name__
        targets = config.default_targets(family)
        if targets is None:
            raise ValueError(
                f"no usual targets are known for the model family {family or name!r}: name them with targets="
            )
    if targets == "all-linear":
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        found = [p for p in open_to_all if is_linear(modules[p]) and modules[p] is not core_of(output)]
    elif isinstance(targets, str):
        found = [p for p in open_to_all if matches(p, targets)]
    else:
        try:
            found = match_targets(open_to_all, targets)
        except ValueError as error:
            taken = [p for p in kept_whole if matches(p, targets)]
            hint = f"{taken[0]} is trained whole (modules_to_save)." if taken else near_names(open_to_all, targets)
            raise ValueError(f"{error} in this {type(model).__name__}. {hint}") from None
    if not found:
        hint = f"; if it is a name, write ({targets!r},)" if any(matches(p, (targets,)) for p in modules) else ""
        raise ValueError(f"targets={targets!r} matches no module of this {type(model).__name__}{hint}")
    return narrow(found, modules, config)


def narrow(found, paths, config):
    """What `exclude` and `layers` leave of the paths in `found`. paths: of all modules of the model"""
    used = used_names(paths, config.exclude)
    if used != config.exclude:
        unused = repr(config.exclude) if isinstance(config.exclude, str) else sorted(set(config.exclude) - set(used))
        raise ValueError(f"exclude: no module fits {unused}")
    left = [p for p in found if not matches(p, config.exclude)]
    if config.layers is not None:
        numbers = {layer_number(p) for p in paths} - {None}
        missing = sorted(set(config.layers) - numbers)
        if missing:
            known = f"this model's layers are 0 to {max(numbers)}" if numbers else "this model has no numbered layers"
            raise ValueError(f"layers {missing} do not exist; {known}")
        left = [p for p in left if layer_number(p) in config.layers]
    if not left:
        raise ValueError(f"exclude and layers together leave none of the {len(found)} matched modules")
    return left


def used_names(paths, names):
    """Those of the names that fit a path. A regular expression that fits none counts as no names, ()."""
    if isinstance(names, str):
        return names if any(matches(p, names) for p in paths) else ()
    return tuple(n for n in names if any(matches(p, (n,)) for p in paths))


def layer_number(path):
    """The first number in a module's path, or None: "model.layers.3.mlp.experts.0.up_proj" is in layer 3."""
    number = re.search(r"(?:^|\.)(\d+)(?=\.|$)", path)
    return int(number[1]) if number else None


def linear_names(model):
    """The short names of a model's linear layers, for `targets`: all but the output embedding and a task's head.

    A short name is the last part of a path: "model.layers.3.mlp.up_proj" is called "up_proj". Layers in 4 bits and
    GPT-2's Conv1D are linear layers too.
    model: a transformers model   returns the names, each once, in alphabetical order, as a tuple
    """
    output, head = core_of(model.get_output_embeddings()), task_head(model)
    found = [
        path
        for path, module in module_tree(model)
        if is_linear(core_of(module)) and core_of(module) is not output and not (head and inside(path, head))
    ]
    return tuple(sorted({path.rsplit(".", 1)[-1] for path in found}))


def inside(path, module):
    """Whether a path is a module's own or that of something in it."""
    return path == module or path.startswith(module + ".")


def is_linear(module):
    return isinstance(module, nn.Linear) or is_conv1d(module)


def near_names(paths, targets):
    """A sentence with the module names that resemble what was asked for."""
    last = sorted({p.rsplit(".", 1)[-1] for p in paths if not p.rsplit(".", 1)[-1].isdigit()})
    near = sorted({n for t in targets for n in difflib.get_close_matches(t.rsplit(".", 1)[-1], last, 3, 0.5)})
    return f"Near in name: {', '.join(near)}." if near else f"It has: {', '.join(last) or 'nothing with a name'}."


def whole_modules(model, config):
    """The paths of the modules that are trained whole (`modules_to_save`)."""
    names = config.modules_to_save
    if names is None:
        names = (head,) if (head := task_head(model)) else ()
    modules = {path: core_of(m) for path, m in module_tree(model) if path}
    try:
        found = match_targets(modules, names)
    except ValueError as error:
        raise ValueError(f"modules_to_save: {error}. {near_names(modules, names)}") from None
    for path in found:
        above = [other for other in found if other != path and inside(path, other)]
        if above:
            raise ValueError(f"modules_to_save: {path} is a part of {above[0]}, which is trained whole already")
        if any(isinstance(m, (Wrapper, Guest)) for m in modules[path].modules()):
            raise ValueError(f"modules_to_save: another adapter is attached inside {path}; detach it first")
        if not all(p.is_floating_point() for p in modules[path].parameters()):
            raise ValueError(f"modules_to_save: {path} holds a weight of 4 or 8 bits, which cannot be trained")
    return found


def wrap_targets(model, config):
    """The wrappers of a method that works on single modules: {path: wrapper}.

    config: has `targets`, `layers`, `exclude`, `dtype`, `default_targets` and `wrap(module, path, dtype)`
    raises ValueError, which names the module, for one that the method cannot adapt
    """
    wrappers = {}
    for path in select(model, config):
        if not called(model, path):
            method = type(config).__name__
            raise ValueError(
                f"{path}: torch reads its weight without calling it, so a {method} beside it would do nothing"
            )
        module = model.get_submodule(path)
        try:
            wrappers[path] = config.wrap(module, path, config.dtype or adapter_dtype(core_of(module)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return wrappers


def all_used(patterns, paths):
    """Raise ValueError unless every key of these {name or regex: value} dicts fits one of the paths."""
    for pattern in patterns:
        unused = [k for k in pattern if not any(pattern_value({k: True}, p, False) for p in paths)]
        if unused:
            raise ValueError(f"no adapted module fits the pattern {', '.join(map(repr, unused))}")


def chosen_biases(model, parts, kind):
    """{name: parameter} of the model's own biases that are trained beside the parts.

    kind: "none", "all", or "lora_only" for those of the wrapped layers
    raises ValueError when there is none to train
    """
    if kind == "none":
        return {}
    # by identity first: a bias in two places (BERT's output layer) is one parameter
    once = {id(p): (n, p) for n, p in base_parameters(model) if n.rsplit(".", 1)[-1] == "bias"}
    names = dict(once.values())
    if kind == "lora_only":
        names = {n: p for n, p in names.items() if n.rsplit(".", 1)[0] in parts}
    whole = tuple(p + "." for p, part in parts.items() if isinstance(part, TrainedCopy))
    names = {n: p for n, p in names.items() if not n.startswith(whole)}
    if not names:
        raise ValueError(f"bias={kind!r}, but there is no bias to train here: Llama-like layers have none")
    return names


def called(model, path):
    """Whether the module at `path` is called in the forward pass. Two of torch's read their layers' weights instead."""
    parent = model.get_submodule(path.rpartition(".")[0])
    return not isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))


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
