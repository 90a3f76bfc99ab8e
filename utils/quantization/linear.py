"""A linear layer whose frozen weight is kept in 4 bits (QLoRA, Dettmers et al. 2023, arXiv:2305.14314, equation 5).

    y = x W'^T + b        dL/dx = dL/dy W'        W' = the weight that the 4-bit codes stand for

W' is unpacked for the forward pass, thrown away, and unpacked again for the backward pass: it exists for one layer at a
time, and autograd keeps neither W' nor x, since a frozen weight needs no gradient. The codes are the storage format;
the products are computed in x's dtype, or in `compute_dtype`.

Worked example: Llama-2-7B's q_proj, 4096 x 4096 weights, takes 33.6 MB in 16 bits. In NF4 with blocks of 64 the codes
take 8.4 MB and the 262,144 scales 1.05 MB in float32, or 0.27 MB double quantized.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.kernels import runs_triton
from utils.kernels.four_bit import matmul
from utils.quantization.weights import QuantizedWeight


class QuantizedProduct(torch.autograd.Function):
    """x W'^T + b, which keeps the codes for its backward pass, and neither W' nor x.

    apply(x, bias, weight) -> (..., d_out), in x's dtype
    x: (..., d_in)   bias: (d_out,) in x's dtype, or None   weight: a QuantizedWeight of shape (d_out, d_in)
    """

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight = weight  # holds what the layer holds anyway
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        dx = grad @ ctx.weight.dequantize(grad.dtype) if ctx.needs_input_grad[0] else None
        dbias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[1] else None
        return dx, dbias, None


def multiply_codes(x, bias, weight):
    """x W'^T + b without a backward pass, by the kernel that suits the number of rows. Arguments: QuantizedProduct's"""
    return matmul(x, weight.packed, weight.absmax, weight.code, weight.shape, weight.block_size, bias, weight.nested)


class QuantizedLinear(nn.Linear):
    """nn.Linear over a QuantizedWeight. The bias stays as it was.

    weight         the codes: (ceil(d_out d_in / 2), 1) uint8, frozen
    quantized      the whole QuantizedWeight
    compute_dtype  what x is cast to for the product (and the output back); None: x's own, or autocast's
    Its state dict has the keys of bitsandbytes' Linear4bit, and it loads that layer's.
    """

    def __init__(self, quantized, bias=None, compute_dtype=None):
        nn.Module.__init__(self)  # not nn.Linear's, which would draw a weight of full size
        self.out_features, self.in_features = quantized.shape
        self.compute_dtype = compute_dtype
        self.register_parameter("bias", bias)
        self._hold(quantized)

    def _hold(self, quantized):
        self.weight = nn.Parameter(quantized.packed, requires_grad=False)
        self.kind, self.block_size, self.dense_dtype = quantized.kind, quantized.block_size, quantized.dtype
        offset, absmax2, code2 = quantized.nested or (None, None, None)
        scales = {"absmax": quantized.absmax, "code": quantized.code, "offset": offset, "absmax2": absmax2,
                  "code2": code2}  # fmt: skip
        for name, tensor in scales.items():
            self.register_buffer(name, tensor, persistent=False)  # saved under bitsandbytes' names instead

    @property
    def quantized(self):
        nested = None if self.offset is None else (self.offset, self.absmax2, self.code2)
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedWeight(self.weight.detach(), self.absmax, self.code, self.kind, shape, self.dense_dtype,
                               self.block_size, nested)  # fmt: skip

    @property
    def double_quant(self):
        return self.offset is not None

    def dequantize(self, dtype=None):
        """The weight W' (d_out, d_in), a new tensor in `dtype`, or in the dtype it had before."""
        return self.quantized.dequantize(dtype)

    def forward(self, x):
        asked, device = x.dtype, "cpu" if x.is_meta else x.device.type  # autocast knows no meta device
        dtype = self.compute_dtype or (torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else asked)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            x = x.to(dtype)
            # Without a backward pass to come, a kernel can multiply with the codes and never form W'.
            multiply = multiply_codes if runs_triton(x) and not torch.is_grad_enabled() else QuantizedProduct.apply
            y = multiply(x, bias, self.quantized)
        return y if self.compute_dtype is None else y.to(asked)

    def stored(self, quantized):
        """The layer's own tensors, by name, that hold such a weight."""
        own = {"weight": quantized.packed, "absmax": quantized.absmax, "code": quantized.code}
        if quantized.nested:
            own["offset"], own["absmax2"], own["code2"] = quantized.nested
        return own

    def extra_repr(self):
        scales = "8-bit scales" if self.double_quant else "float32 scales"
        bias = self.bias is not None
        return f"{self.in_features}, {self.out_features}, {bias=}, {self.kind}, blocks of {self.block_size}, {scales}"

    def _apply(self, fn, recurse=True):
        # model.half() must not round the scales: seen as whole numbers they are moved, and never cast.
        held = {name: t for name, t in self._buffers.items() if t is not None and t.dtype == torch.float32}
        for name, tensor in held.items():
            self._buffers[name] = tensor.view(torch.int32)
        try:
            return super()._apply(fn, recurse)
        finally:  # also when a GPU is full
            for name in held:
                self._buffers[name] = self._buffers[name].view(torch.float32)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, tensor in self.quantized.to_state().items():
            if key != "weight":
                destination[prefix + key] = tensor

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        own = {k[len(prefix):]: t for k, t in state_dict.items() if k.startswith(prefix + "weight")}  # fmt: skip
        if not own:
            missing.append(prefix + "weight")
            return
        device = self.weight.device
        if not (metadata.get("assign_to_params_buffers") or device.type == "meta"):
            own = {k: t.to(device, copy=True) for k, t in own.items()}
        try:
            new = QuantizedWeight.from_state(own)
            if new.shape != (self.out_features, self.in_features):
                raise ValueError(f"it is a weight of {tuple(new.shape)}, not {(self.out_features, self.in_features)}")
        except ValueError as error:
            errors.append(f"{prefix}weight: {error}")
            return
        self._hold(new)
        rest = {k: t for k, t in state_dict.items() if k.startswith(prefix) and not k.startswith(prefix + "weight")}
        super()._load_from_state_dict(
            rest | {prefix + "weight": self.weight}, prefix, metadata, strict, missing, unexpected, errors
        )


class NF4Linear(QuantizedLinear):
    """A QuantizedLinear whose code book is NF4."""
