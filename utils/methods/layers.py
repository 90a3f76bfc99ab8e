"""Linear layers as models have them: which way round the weight is stored, and whether it may be used directly."""

import torch.nn.functional as F
from torch import nn

from utils.methods.parts import Part
from utils.quantization.linear import QuantizedLinear, QuantizedProduct
from utils.quantization.weights import QuantizedWeight


def is_conv1d(module):
    """GPT-2's Conv1D: a linear layer that stores its weight as (d_in, d_out). Told by name, to import nothing."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_shape(module):
    """(d_out, d_in) of a linear layer, whichever way round its weight is stored."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def hooked(layer):
    """Whether a layer has hooks, or a forward put on the instance (device maps do that): it must be called, not read.

    The hooks of another adapter that is switched off do nothing.
    """
    kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    owners = [getattr(hook, "__self__", None) for hooks in kinds for hook in hooks.values()]
    return any(not isinstance(owner, Part) or owner.on for owner in owners) or "forward" in layer.__dict__


def plain_weight(layer):
    """The (d_out, d_in) weight of a layer that is a matrix product and nothing more, else None."""
    if hooked(layer):
        return None
    if type(layer) is nn.Linear:
        return layer.weight
    return layer.weight.T if is_conv1d(layer) else None


def is_linear4bit(module):
    """bitsandbytes' Linear4bit, quantized. Told by its weight's name, to import nothing."""
    weight = None if isinstance(module, Part) else getattr(module, "weight", None)  # a wrapper has its layer's weight
    return type(weight).__name__ == "Params4bit" and weight.quant_state is not None


def unpacked_numbers(module):
    """How many numbers a weight of 4 bits stands for beyond the bytes that hold it; 0 for any other module."""
    if isinstance(module, QuantizedLinear):
        return module.in_features * module.out_features - module.weight.numel()
    if is_linear4bit(module):
        return module.weight.quant_state.shape.numel() - module.weight.numel()
    return 0


def four_bits(layer):
    """The QuantizedWeight of a layer in 4 bits, ours or bitsandbytes', or None."""
    if isinstance(layer, QuantizedLinear):
        return layer.quantized
    return QuantizedWeight.from_bitsandbytes(layer.weight) if is_linear4bit(layer) else None


def dense_weight(layer):
    """The (d_out, d_in) weight that a linear layer multiplies with; of 4 bits, unpacked to the dtype it had before.

    raises ValueError for a layer that stores its weight in a form not known here
    """
    quantized = four_bits(layer)
    if quantized is not None:
        return quantized.dequantize()
    weight = layer.weight.T if is_conv1d(layer) else layer.weight
    if not weight.is_floating_point() or weight.shape != linear_shape(layer):
        raise ValueError(f"a {type(layer).__name__} holds its weight packed, in a form that is not known here")
    return weight


def product(layer, x):
    """x W^T of a linear layer, without its bias and hooks; a weight of 4 bits is not kept unpacked for backward."""
    quantized = four_bits(layer)
    if quantized is not None:
        return QuantizedProduct.apply(x, None, quantized)
    return F.linear(x, dense_weight(layer).to(x.dtype))


def mergeable_weight(layer):
    """The (d_out, d_in) weight to merge into, or ValueError with the reason why there is none."""
    kind = type(layer).__name__
    if not (type(layer) is nn.Linear or is_conv1d(layer) or isinstance(layer, QuantizedLinear)):
        raise ValueError(f"a {kind} cannot take an update into its weight: dequantize it first")
    if hooked(layer):
        raise ValueError(f"this {kind} has hooks, which would see another output: remove them first")
    return dense_weight(layer)
