"""Attaching a method to a model: which modules, what is frozen, and the handle that does the rest.

    adapter = attach(model, LoRA(r=8, targets=("q_proj", "v_proj")))
    print(adapter)                       what matched, what is trained
    adapter.parameters()                 what an optimizer should get
    with adapter.disabled(): ...         the base model, exactly
    adapter.merge(); adapter.unmerge()   there and back, to the bit
    adapter.save(path); adapter.detach()

Nothing here changes a model before everything has been checked: after an error it is what it was.
"""

import contextlib

import torch
from torch import nn

from utils.methods.layers import unpacked_numbers
from utils.methods.parts import TrainedCopy, size_of
from utils.quantization.linear import QuantizedLinear
from utils.quantization.weights import requantized_merge
from utils.targeting import shared_parameters, whole_modules

REGISTRY = "_attached_adapters"  # name -> Adapter, kept on the model itself

# ---------------------------------------------------------------------------------- freezing and counting


def freeze(model, keep=()):
    """Freeze every parameter of a model except those under the names in `keep`.

    keep: names of parameters, or of modules, whose parameters go on being trained
    returns the names of the parameters that are still trained, in the model's order
    """
    trained = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(name == k or name.startswith(k + ".") for k in keep)
        if parameter.requires_grad:
            trained.append(name)
    return trained


def count_parameters(model):
    """How many numbers a model trains and holds. A tensor used in two places (tied embeddings) counts once.

    returns (trainable, total), two ints
    """
    parameters = list(model.parameters())  # each tensor once, however many modules hold it
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(p.numel() for p in parameters)


# ------------------------------------------------------------------------------------------------ attaching


def adapters(model):
    """The adapters attached to a model, by name."""
    return dict(getattr(model, REGISTRY, {}))


def attach(model, config, name="default"):
    """Attach a method to a model, freeze the rest, and return the handle.

    model: any nn.Module   config: LoRA(...)   name: how several adapters on one model are told apart
    The new adapter is the active one; those attached before stay, switched off (`Adapter.activate` switches).
    raises ValueError for anything that does not fit, with the model unchanged
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; attach needs a torch.nn.Module")
    if isinstance(config, type) or not hasattr(config, "parts"):
        raise TypeError(f"the configuration is a {type(config).__name__}; attach needs one such as LoRA(r=8)")
    others = adapters(model)
    if name in others:
        raise ValueError(f"the model has an adapter called {name!r} already: detach it, or give this one another name")
    merged = [n for n, a in others.items() if a.merged]
    if merged:
        raise ValueError(f"adapter {merged[0]!r} is merged into the weights: unmerge it before attaching another")
    whole = whole_modules(model, config)
    parts = config.parts(model)
    parts |= {path: TrainedCopy(model.get_submodule(path)) for path in whole}
    biases = config.biases(model, parts) if hasattr(config, "biases") else {}
    return Adapter(model, config, name, parts, biases)


class Adapter:
    """A method attached to a model. Made by `attach` or `load_adapter`."""

    def __init__(self, model, config, name, parts, biases):
        self.model, self.config, self.name = model, config, name
        self.parts = parts  # path in the model -> what was put there
        self.biases = biases  # parameters of the model itself that this adapter trains, by name
        self.active = self.merged = False
        self._was_trained = {n: p.requires_grad for n, p in model.named_parameters()} if not adapters(model) else None
        self._kept_weights = {}  # (path, name) -> the other of (base weight, merged weight)
        for other in adapters(model).values():
            other._set_active(False)  # before the base's biases are copied
        self._kept_biases = {n: p.detach().clone() for n, p in self.biases.items()}  # the values not in the model now
        self.trainable = True
        if not adapters(model):
            freeze(model)
        for path, part in parts.items():
            part.enter(model, path)
        model.__dict__.setdefault(REGISTRY, {})[name] = self
        self.activate()

    # ---- what it is

    def named_parameters(self):
        """(name as in the file, parameter) of everything that is trained."""
        for path, part in self.parts.items():
            for key, tensor in part.tensors().items():
                yield f"{path}.{key}" if path else key, tensor
        yield from self.biases.items()

    def bias_values(self):
        """This adapter's values of the biases it trains, by name: kept aside while it is switched off."""
        return self.biases if self.active else self._kept_biases

    def parameters(self):
        """What an optimizer should get, and nothing else."""
        return [p for _, p in self.named_parameters()]

    def __repr__(self):
        return f"Adapter({self.name!r}, {type(self.config).__name__}, {len(self.parts)} modules)"

    def __str__(self):
        trained, size = size_of(self.parameters())
        total = size_of(self.model.parameters())[0] + sum(map(unpacked_numbers, self.model.modules()))
        state = "merged" if self.merged else "active" if self.active else "switched off"
        lines = [f"{type(self.config).__name__} adapter {self.name!r} on {type(self.model).__name__}, {state}"]
        groups = {}
        for path, part in self.parts.items():
            groups.setdefault((path.rsplit(".", 1)[-1] or "model", part.facts()), []).append(part)
        width = max((len(last) for last, _ in groups), default=0)
        for (last, facts), found in groups.items():
            numbers, _ = size_of(t for part in found for t in part.tensors().values())
            lines.append(f"  {last:<{width}}  {len(found):>3} x {facts}  {numbers:>12,} numbers")
        if self.biases:
            lines.append(f"  biases {len(self.biases)}  {size_of(self.biases.values())[0]:,} numbers")
        lines.append(f"trains {trained:,} of {total:,} numbers ({100 * trained / total:.2f} %), {size:,} bytes")
        return "\n".join(lines)

    # ---- on and off

    def activate(self):
        """Make this the one adapter that is on; the others stay attached, switched off."""
        self._alive()
        merged = [n for n, a in adapters(self.model).items() if a.merged and a is not self]
        if merged:
            raise ValueError(f"adapter {merged[0]!r} is merged into the weights: unmerge it before switching")
        for other in sorted(adapters(self.model).values(), key=lambda a: a is self):  # itself last
            other._set_active(other is self)

    def _set_active(self, on):
        for part in self.parts.values():
            part.active = on
        if on == self.active:
            return  # the biases in the model now may be another adapter's
        for name, parameter in self.biases.items():
            parameter.data, self._kept_biases[name] = self._kept_biases[name].to(parameter), parameter.data
            parameter.requires_grad = on and self.trainable
        self.active = on

    @contextlib.contextmanager
    def disabled(self):
        """The base model, exactly, for the length of a `with`: whichever adapter is on goes off."""
        self._alive()
        on = [a for a in adapters(self.model).values() if a.active]  # one or none
        merged = [a for a in on if a.merged]
        for adapter in on:
            adapter._set_active(False)
        for adapter in merged:
            adapter._swap_weights()
        try:
            yield self.model
        finally:
            for adapter in on:
                if adapters(self.model).get(adapter.name) is adapter:  # not detached meanwhile
                    if adapter in merged:
                        adapter._swap_weights()
                    adapter.activate()

    # ---- merging

    def merge(self, requantize=False):
        """Write the update into the weights: the same output, and no extra work per token.

        The base weights are kept, so that `unmerge` is exact: while merged, each adapted weight is held twice.
        requantize: round merged weights of a base in 4 bits back to 4 bits. That costs accuracy, often more than the
        update itself is worth, so it is never done unasked; `dequantize_base` before merging costs none.
        returns {path: |what rounding changed| / |the update|}, for the layers that were rounded so
        raises ValueError, with nothing changed, if no merge exists or the result is not finite
        """
        self._alive()
        if self.merged:
            raise ValueError(f"adapter {self.name!r} is merged already")
        if not self.active:
            raise ValueError(f"adapter {self.name!r} is switched off: activate it before merging")
        merged, lost = {}, {}
        shared = shared_parameters(self.model)
        for path, part in self.parts.items():
            if isinstance(part, TrainedCopy):
                continue
            if not part.mergeable:
                where = path or type(self.model).__name__
                raise ValueError(f"{where}: a {type(part).__name__} {part.why_not}, so it cannot be merged")
            with torch.no_grad():
                try:
                    tensors = part.merged_tensors()
                    if "weight" in tensors and isinstance(part.core, QuantizedLinear):  # of BitFit only the bias
                        tensors, lost[path] = rounded(part.core, tensors, requantize)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from None
            for name, tensor in tensors.items():
                whole_name = f"{path}.{name}"
                twins = [n for n in shared.get(id(getattr(part.core, name)), []) if n != whole_name]
                if twins:
                    raise ValueError(
                        f"{whole_name} is the same tensor as {twins[0]}: merging would change both. Leave it "
                        f"unmerged, or give {path} a {name} of its own first "
                        f"(module.{name} = nn.Parameter(module.{name}.clone()))"
                    )
                if not torch.isfinite(tensor).all():
                    raise ValueError(f"{path}: the merged {name} would not be finite; nothing was merged")
                merged[path, name] = tensor
        self._kept_weights = merged
        self._swap_weights()
        return lost

    def unmerge(self):
        """Put the base weights back, to the bit, and compute the update beside them again."""
        self._alive()
        if not self.merged:
            raise ValueError(f"adapter {self.name!r} is not merged")
        self._swap_weights()
        self._kept_weights = {}

    def _swap_weights(self):
        for (path, name), kept in self._kept_weights.items():
            parameter = getattr(self.parts[path].core, name)
            # it may have moved meanwhile
            self._kept_weights[path, name], parameter.data = parameter.data, kept.to(parameter)
        self.merged = not self.merged
        for part in self.parts.values():
            if part.mergeable:
                part.merged = self.merged

    # ---- leaving

    def save(self, path):
        """Write the adapter as PEFT does: adapter_config.json and adapter_model.safetensors. See utils.checkpoint."""
        from utils.checkpoint import save_adapter

        self._alive()
        return save_adapter(self, path)

    def export(self, path):
        """Write the merged model, a plain checkpoint without any trace of the adapter, for tools that know none."""
        from utils.checkpoint import export_model

        self._alive()
        return export_model(self, path)

    def detach(self):
        """Take the adapter out: the model as it was before `attach`, weights, modules and requires_grad alike."""
        self._alive()
        if self.merged:
            self.unmerge()
        self._set_active(False)
        for path, part in self.parts.items():
            part.leave(self.model, path)
        registry = getattr(self.model, REGISTRY)
        del registry[self.name]
        if registry:
            heir = next(iter(registry.values()))
            heir._was_trained = heir._was_trained or self._was_trained
        else:
            delattr(self.model, REGISTRY)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad = self._was_trained.get(name, parameter.requires_grad)

    def _alive(self):
        if adapters(self.model).get(self.name) is not self:
            raise ValueError(f"adapter {self.name!r} was detached: attach or load it again")


def rounded(layer, tensors, allowed):
    """A merged weight for a layer of 4 bits: (its tensors by name, the share of the update that rounding undoes).

    tensors: {"weight": (d_out, d_in), ...}   allowed: False raises ValueError that says what to do instead
    """
    if not allowed:
        raise ValueError(
            "the weight is in 4 bits, and a merged one would be rounded to them again, which can undo the update: call "
            "dequantize_base(model) first, or merge(requantize=True) to have it rounded and see the error"
        )
    W = layer.dequantize().float()  # rounded as the merged weight is: else an update of zero would not be zero
    delta = tensors["weight"].float() - W
    if not delta.any():
        return tensors | layer.stored(layer.quantized), 0.0
    new, lost = requantized_merge(W, delta, layer.kind, layer.block_size, layer.double_quant)
    return tensors | layer.stored(new), lost
