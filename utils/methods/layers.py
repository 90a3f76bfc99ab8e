"""Linear layers as models have them: which way round the weight is stored, and whether it may be used directly."""

from torch import nn

from utils.methods.parts import Part


def is_conv1d(module):
    """GPT-2's Conv1D: a linear layer that stores its weight as (d_in, d_out). Told by name, to import nothing."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def linear_shape(module):
    """(d_out, d_in) of a linear layer, whichever way round its weight is stored."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    return module.out_features, module.in_features


def plain_weight(layer):
    """The (d_out, d_in) weight of a layer that is a matrix product and nothing more, else None.

    A layer with hooks, or a forward put on the instance (device maps do that), must be called, not read. The hooks of
    another adapter that is switched off do nothing.
    """
    kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    owners = [getattr(hook, "__self__", None) for hooks in kinds for hook in hooks.values()]
    if any(not isinstance(owner, Part) or owner.on for owner in owners) or "forward" in layer.__dict__:
        return None
    if type(layer) is nn.Linear:
        return layer.weight
    return layer.weight.T if is_conv1d(layer) else None


def mergeable_weight(layer):
    """`plain_weight`, or ValueError with the reason why there is none to merge into."""
    weight = plain_weight(layer)
    if weight is None and (type(layer) is nn.Linear or is_conv1d(layer)):
        raise ValueError(f"this {type(layer).__name__} has hooks, which would see another output: remove them first")
    if weight is None:
        raise ValueError(f"a {type(layer).__name__} cannot take an update into its weight: dequantize it first")
    return weight
