"""Quantizing the base of a model: which layers, one after the other, and back again.

    model = quantize_base(model, NF4(block_size=64, double_quant=True))     in place
    print(quantization_report(model))
    adapter = attach(model, LoRA(r=16, targets="all-linear"))               after it, not before
    ...
    dequantize_base(model, torch.bfloat16); adapter.merge()                 the base that the adapter was trained on
"""

from dataclasses import dataclass

import torch
from torch import nn

from utils.attach import adapters
from utils.methods import settings
from utils.methods.layers import dense_weight, hooked, is_conv1d, is_linear4bit
from utils.methods.parts import core_of, size_of
from utils.quantization.blocks import bits_per_number
from utils.quantization.linear import NF4Linear, QuantizedLinear
from utils.quantization.weights import QuantizedWeight, check_weight, quantize_weight
from utils.targeting import called, module_tree, select, shared_parameters


@dataclass(frozen=True)
class FourBit:
    """How to quantize, for every kind of 4 bits.

    block_size     numbers per scale                     double_quant   the scales in 8 bits (QLoRA, section 3)
    targets        as LoRA's; "all-linear": every linear layer but the output embedding, the classification head
                   (transformers' BitsAndBytesConfig spares it only if its last parameter is a weight, not a bias),
                   what shares its weight, and what the model's authors keep in float32
    exclude        names or a regular expression to leave out
    compute_dtype  of the products; None: the dtype of a layer's input
    """

    block_size: int = 64
    double_quant: bool = False
    targets: tuple[str, ...] | str = "all-linear"
    exclude: tuple[str, ...] | str = ()
    compute_dtype: torch.dtype | None = None

    kind = None
    layer = QuantizedLinear
    layers = modules_to_save = None  # `select` asks for them: all layers, and the classification head left alone

    def __post_init__(self):
        settings.whole("block_size", self.block_size)
        settings.float_dtype("compute_dtype", self.compute_dtype)
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant is {self.double_quant!r}, not True or False")
        if not self.targets:
            raise ValueError("targets is empty: name at least one module, or say 'all-linear'")
        object.__setattr__(self, "targets", settings.names("targets", self.targets))  # the dataclass is frozen
        object.__setattr__(self, "exclude", settings.names("exclude", self.exclude) or ())

    @property
    def bits(self):
        """Bits per weight, scales included."""
        return bits_per_number(4, self.block_size, self.double_quant)

    def to_bitsandbytes(self):
        """The arguments of transformers' BitsAndBytesConfig that mean the same. raises ValueError if there are none"""
        if self.kind not in ("nf4", "fp4") or self.block_size != 64:
            raise ValueError(f"bitsandbytes has no {self.kind} in blocks of {self.block_size} for whole models")
        return bitsandbytes_fields(self.kind, self.double_quant, self.compute_dtype or torch.float32)


def bitsandbytes_fields(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    """The arguments of transformers' BitsAndBytesConfig for a base in 4 bits; the defaults are QLoRA's.

    kind: "nf4" or "fp4"   double_quant: whether the scales are quantized too   compute_dtype: of the products
    returns a dict
    """
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_compute_dtype": compute_dtype,
    }


@dataclass(frozen=True)
class NF4(FourBit):
    """Normal floats with double quantized scales: 4.127 bits per weight (Dettmers et al. 2023, arXiv:2305.14314)."""

    double_quant: bool = True

    kind, layer = "nf4", NF4Linear


@dataclass(frozen=True)
class FP4(FourBit):
    """bitsandbytes' 4-bit floats, which `load_in_4bit=True` alone gives: 4.5 bits per weight."""

    kind = "fp4"


@dataclass(frozen=True)
class INT4(FourBit):
    """The whole numbers -7 ... 7 times a scale: 4.5 bits per weight."""

    kind = "int4"


def quantize_base(model, setting):
    """Put the linear layers of a model into 4 bits, in place, one after the other.

    The model has to be in memory unquantized first. One that is too large for that: let transformers load it with
    BitsAndBytesConfig(**NF4().to_bitsandbytes()), which quantizes while it reads, and call `from_bitsandbytes`, or
    attach to its layers as they are.
    model: any nn.Module without adapters   setting: NF4(), FP4() or INT4()   returns the model, all of it frozen
    raises ValueError, before anything has changed, for what cannot be quantized
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model is a {type(model).__name__}; quantize_base needs a torch.nn.Module")
    if not isinstance(setting, FourBit) or setting.kind is None:
        raise TypeError(f"the setting is a {type(setting).__name__}; quantize_base needs one such as NF4()")
    if adapters(model):
        raise ValueError(f"the model has the adapter {next(iter(adapters(model)))!r}: quantize first, then attach")
    layers = {path: model.get_submodule(path) for path in layers_to_quantize(model, setting)}
    for path, layer in layers.items():
        try:
            check_weight(layer.weight)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    model.requires_grad_(False)
    while layers:  # each layer is let go of before the next: never more than one of them is there twice
        path, layer = layers.popitem()
        W = layer.weight.T.contiguous() if is_conv1d(layer) else layer.weight
        new = setting.layer(quantize_weight(W, setting.kind, setting.block_size, setting.double_quant), layer.bias,
                            setting.compute_dtype)  # fmt: skip
        model.set_submodule(path, new.train(layer.training))
    return model


def layers_to_quantize(model, setting):
    """The paths of the layers that a setting means. raises ValueError, which names it, for one that cannot be meant"""
    shared, found, skipped = shared_parameters(model), [], ""
    for path in select(model, setting):
        layer = model.get_submodule(path)
        if isinstance(layer, QuantizedLinear) or is_linear4bit(layer):
            raise ValueError(f"{path} is in 4 bits already")
        reason = why_not(model, path, shared)
        if reason is None and hooked(layer):
            raise ValueError(f"{path} has hooks, or a forward of its own, which would be lost: remove them first")
        if reason is None:
            found.append(path)
        elif setting.targets != "all-linear":
            raise ValueError(f"{path} cannot be put into 4 bits: {reason}")
        else:
            skipped = f" ({path}: {reason})"
    if not found:
        raise ValueError(f"this {type(model).__name__} has no linear layer to quantize{skipped}")
    return found


def why_not(model, path, shared):
    """The reason why a layer keeps its weight as it is, or None. shared: as `shared_parameters` gives it"""
    layer = model.get_submodule(path)
    if not (type(layer) is nn.Linear or is_conv1d(layer)):
        return f"it is a {type(layer).__name__}"
    if not called(model, path):
        return "torch reads its weight without calling it"
    if not isinstance(layer.weight, nn.Parameter):  # weight_norm, pruning
        return "its weight is computed anew in each forward pass"
    twins = [name for name in shared[id(layer.weight)] if name != f"{path}.weight"]
    if twins:
        return f"its weight is the same tensor as {twins[0]}"
    wide = getattr(model, "_keep_in_fp32_modules", None) or ()
    if any(f".{name}." in f".{path}." for name in wide):  # T5 casts wo's input to the dtype of its weight: to bytes
        return "the model keeps it in float32"
    return None


def dequantize_base(model, dtype=None):
    """Put every layer of 4 bits, ours or bitsandbytes', back into an nn.Linear with the weight that it stands for.

    Adapters stay attached. It is the base they were trained on, to the last rounding; the weights from before the
    quantization are another base.
    dtype: of the weights; None: what each had before it was quantized   returns the model
    raises ValueError if there is no such layer, or an adapter is merged
    """
    merged = [n for n, a in adapters(model).items() if a.merged]
    if merged:
        raise ValueError(f"adapter {merged[0]!r} is merged into the codes: unmerge it before dequantizing")
    settings.float_dtype("dtype", dtype)

    def plain(layer):
        W = dense_weight(layer)
        bias = layer.bias
        linear = nn.Linear(layer.in_features, layer.out_features, device="meta")
        linear.weight = nn.Parameter(W.to(dtype or W.dtype), requires_grad=False)
        if bias is not None and dtype is not None:
            bias.data = bias.data.to(dtype)  # the parameter stays itself: an adapter may train it
        linear.bias = bias
        return linear

    return replace_layers(model, lambda layer: isinstance(layer, QuantizedLinear) or is_linear4bit(layer), plain)


def from_bitsandbytes(model):
    """Put this package's layers in place of bitsandbytes' Linear4bit, with the same codes and scales, in place.

    returns the model   raises ValueError if there is none
    """

    def ours(layer):
        quantized = QuantizedWeight.from_bitsandbytes(layer.weight)
        kind = NF4Linear if quantized.kind == "nf4" else QuantizedLinear
        return kind(quantized, layer.bias, layer.compute_dtype)

    return replace_layers(model, is_linear4bit, ours)


def save_quantized(model, path):
    """Write a model in NF4 or FP4 as transformers does, so that its from_pretrained reads it, in bitsandbytes' layers.

    model: a transformers model after `quantize_base`, without adapters   path: of the folder
    raises ValueError, with nothing written, for anything else
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    kinds = {(m.kind, m.double_quant, m.compute_dtype or m.dense_dtype) for m in layers}
    if adapters(model):
        raise ValueError(f"the model has the adapter {next(iter(adapters(model)))!r}: detach it, and save it by itself")
    if not hasattr(model, "save_pretrained") or len(kinds) != 1 or layers[0].kind not in ("nf4", "fp4"):
        raise ValueError(f"this {type(model).__name__} is no transformers model all of whose 4 bits are NF4, or FP4")
    from transformers import BitsAndBytesConfig

    dense = [p for p, m in model.named_modules() if type(m) is nn.Linear or is_conv1d(m)]
    fields = bitsandbytes_fields(*kinds.pop()) | {"llm_int8_skip_modules": dense}
    model.config.quantization_config = BitsAndBytesConfig(**fields)
    try:
        model.save_pretrained(path)
    finally:
        del model.config.quantization_config


def replace_layers(model, wanted, make):
    """Put make(layer) in the place of every wanted layer, under the adapters that are on it."""
    spots = [(path, module) for path, module in module_tree(model) if wanted(core_of(module))]
    if not spots:
        raise ValueError(f"this {type(model).__name__} has no such layer in 4 bits")
    for path, module in spots:
        for name, guest in core_of(module).named_children():
            raise ValueError(f"{path}: {type(guest).__name__} {name!r} lives in this layer; detach its adapter first")
        if hooked(core_of(module)):
            raise ValueError(f"{path} has hooks, or a forward of its own, which would be lost: remove them first")
    for path, module in spots:
        old = core_of(module)
        new = make(old).train(old.training)
        if module is old:
            model.set_submodule(path, new)
            continue
        while module.base is not old:
            module = module.base
        module.base = new
    if getattr(model, "hf_quantizer", None) is not None:  # what it wrote into the configuration is no longer so
        model.hf_quantizer.remove_quantization_config(model)
    return model


def quantization_report(model):
    """What is in 4 bits and what is not, with the largest of the rest by name: a table in text.

    model: any nn.Module   returns a str
    """
    groups, numbers, packed, rest, seen = {}, 0, 0, {}, set()
    for path, module in module_tree(model):
        layer, name = core_of(module), path.rsplit(".", 1)[-1]
        if isinstance(layer, QuantizedLinear):
            quantized = layer.quantized
            key = (name, tuple(quantized.shape), layer.kind)
            groups[key] = groups.get(key, 0) + 1
            numbers, packed = numbers + quantized.shape.numel(), packed + quantized.nbytes()
        elif is_linear4bit(layer):
            return f"{type(model).__name__}: in 4 bits by bitsandbytes; from_bitsandbytes(model) puts ours in place"
        else:
            own = [p for p in layer.parameters(recurse=False) if id(p) not in seen]  # tied ones count once
            seen.update(map(id, own))
            rest[name] = rest.get(name, 0) + sum(p.numel() for p in own)
    if not groups:
        return f"{type(model).__name__}: nothing is in 4 bits"
    width = max(len(name) for name, _, _ in groups)
    lines = [f"{name:<{width}}  {count:>3} x {shape}  {kind}" for (name, shape, kind), count in groups.items()]
    total, size = size_of(p for p in model.parameters() if p.dtype != torch.uint8)
    largest = ", ".join(f"{name} {rest[name]:,}" for name in sorted(rest, key=rest.get, reverse=True)[:3])
    lines.append(f"in 4 bits: {numbers:,} numbers, {packed:,} bytes, {8 * packed / numbers:.3f} bits each")
    lines.append(f"beside it: {total:,} numbers, {size:,} bytes ({largest})")
    return "\n".join(lines)
