"""A weight in 4 bits, with all that is needed to get it back, and the file format it shares with bitsandbytes."""

import json
import math
from dataclasses import dataclass

import torch

from utils.kernels.four_bit import dequantize, scales_reference
from utils.methods import settings
from utils.quantization.blocks import nearest_code, pack, quantize_blockwise, quantize_scales
from utils.quantization.codebooks import dynamic_codebook, fp4_codebook, int4_codebook, nf4_codebook

CODEBOOKS = {"nf4": nf4_codebook, "fp4": fp4_codebook, "int4": int4_codebook}
GROUP = 256  # scales per second scale: bitsandbytes has this number built in
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class QuantizedWeight:
    """A weight of 4-bit numbers.

    packed      (ceil(n / 2), 1) uint8, the first of two numbers in the high four bits
    absmax      (blocks,) float32, or uint8 if the scales are double quantized
    code        (16,) float32                kind        "nf4", "fp4" or "int4": which code book it is
    shape       of the weight                dtype       that it had, and gets when nothing else is asked for
    block_size  numbers per scale            nested      (offset, absmax2, code2) of double quantized scales, or None
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    kind: str
    shape: torch.Size
    dtype: torch.dtype
    block_size: int
    nested: tuple | None = None

    def dequantize(self, dtype=None):
        """The weight, in `dtype` or the one it had: computed in float32 and rounded once."""
        dtype = dtype or self.dtype
        return dequantize(self.packed, self.absmax, self.code, self.shape, self.block_size, dtype, self.nested)

    def scales(self):
        """(blocks,) float32."""
        return scales_reference(self.absmax, self.nested)

    def tensors(self):
        """Its tensors by bitsandbytes' names, without the one that holds words and numbers."""
        tensors = {"weight": self.packed, "weight.absmax": self.absmax, "weight.quant_map": self.code}
        if self.nested:
            tensors |= {"weight.nested_absmax": self.nested[1], "weight.nested_quant_map": self.nested[2]}
        return tensors

    def nbytes(self):
        """Bytes of the codes and scales, without the code books, which all weights could share."""
        scales = [self.absmax] + ([self.nested[1]] if self.nested else [])
        return sum(t.numel() * t.element_size() for t in (self.packed, *scales))

    def to_state(self):
        """{key: tensor} as in the state dict of bitsandbytes' Linear4bit."""
        words = {"quant_type": self.kind, "blocksize": self.block_size, "dtype": DTYPES[self.dtype],
                 "shape": list(self.shape)}  # fmt: skip
        if self.nested:
            words |= {"nested_blocksize": GROUP, "nested_dtype": "float32", "nested_offset": self.nested[0].item()}
        words = torch.frombuffer(bytearray(json.dumps(words).encode()), dtype=torch.uint8)
        return self.tensors() | {f"weight.quant_state.bitsandbytes__{self.kind}": words}

    @classmethod
    def from_state(cls, state):
        """What `to_state`, or bitsandbytes, wrote, with the same tensors.

        raises ValueError, in one sentence, for anything missing, unexpected or of the wrong shape
        """
        state = dict(state)
        described = [k for k in state if k.startswith("weight.quant_state.bitsandbytes__")]
        if len(described) != 1:
            raise ValueError(f"the state has {len(described)} keys weight.quant_state.bitsandbytes__..., not one")
        words = read_words(state.pop(described[0]))
        kind = described[0].rpartition("__")[2]
        if words["quant_type"] != kind or kind not in CODEBOOKS:
            found = words["quant_type"]
            raise ValueError(f"the code book is {found!r} in {described[0]}; known: {', '.join(CODEBOOKS)}")
        names = ["weight", "weight.absmax", "weight.quant_map"]
        if "nested_offset" in words:
            names += ["weight.nested_absmax", "weight.nested_quant_map"]
        if set(names) != set(state):
            wrong = sorted(set(names) ^ set(state))
            raise ValueError(f"the state has not just {', '.join(names)}: it differs in {', '.join(wrong)}")
        packed, absmax, code, *nested = (state[n].reshape(-1).contiguous() for n in names)
        shape, block = torch.Size(words["shape"]), words["blocksize"]
        n = math.prod(shape)  # shape.numel() is 0 for 2^40 x 2^40
        blocks, bytes_ = -(-n // block), -(-n // 2)
        if packed.dtype != torch.uint8:  # bitsandbytes may store the bytes as another dtype, for FSDP
            packed = packed.view(torch.uint8)
        expected = [("weight", packed, bytes_), ("weight.absmax", absmax, blocks), ("weight.quant_map", code, 16)]
        if nested:
            expected += [("weight.nested_absmax", nested[0], -(-blocks // GROUP)),
                         ("weight.nested_quant_map", nested[1], 256)]  # fmt: skip
        for name, tensor, count in expected:
            if tensor.numel() != count:
                raise ValueError(f"{name} has {tensor.numel()} numbers; a weight of {tuple(shape)} needs {count}")
        for name, tensor, _ in expected[1:]:
            kind_wanted = torch.uint8 if nested and name == "weight.absmax" else torch.float32
            if tensor.dtype != kind_wanted:
                raise ValueError(f"{name} is {tensor.dtype}, not {kind_wanted}")
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name} has numbers that are not finite")
        if nested:
            nested = (torch.tensor(words["nested_offset"], dtype=torch.float32, device=absmax.device), *nested)
        return cls(packed.view(-1, 1), absmax, code, kind, shape, words["dtype"], block, nested or None)

    @classmethod
    def from_bitsandbytes(cls, weight):
        """The same codes and scales as in a Params4bit of bitsandbytes."""
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes has rearranged this weight for generation on a CPU, with scales of 16 bits: "
                "convert the model before it has run in eval mode"
            )
        tensors = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
        return cls.from_state({"weight": weight.data} | tensors)


def read_words(tensor):
    """The words and numbers of a 4-bit weight's state: JSON in a uint8 tensor. raises ValueError if they are unfit"""
    try:
        words = json.loads(bytes(tensor.tolist()))
        words = {**words, "blocksize": settings.whole("blocksize", words["blocksize"]), "shape": list(words["shape"])}
        for side in words["shape"]:
            settings.whole("a side of the shape", side)
        words["dtype"] = {name: dtype for dtype, name in DTYPES.items()}[words["dtype"]]
        if "nested_offset" in words:
            words["nested_offset"] = float(words["nested_offset"])
            if not abs(words["nested_offset"]) <= torch.finfo(torch.float32).max:  # NaN, which Python's JSON has, too
                raise ValueError(f"nested_offset is {words['nested_offset']}")
            if words["nested_blocksize"] != GROUP:
                raise ValueError(f"nested_blocksize is {words['nested_blocksize']}, not {GROUP}")
        words["quant_type"] = str(words["quant_type"])
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"the description of the 4-bit weight cannot be read: {error!r}") from None
    return words


def check_weight(W):
    """Raise ValueError, in one sentence, unless W can be quantized."""
    if W.dtype not in DTYPES:
        raise ValueError(f"a weight to quantize is float32, float16 or bfloat16, not {W.dtype}")
    if W.numel() == 0:
        raise ValueError("the weight is empty")
    if W.device.type != "meta" and not torch.isfinite(W).all():
        raise ValueError("the weight has numbers that are not finite; they would spoil their blocks")


def quantize_weight(W, kind="nf4", block_size=64, double_quant=False):
    """A weight in 4 bits.

    W: any shape, float32, float16 or bfloat16   kind: "nf4", "fp4" or "int4"   block_size: numbers per scale
    double_quant: the scales in 8 bits   returns a QuantizedWeight
    raises ValueError for another dtype, and for numbers that are not finite: they would spoil their whole block
    """
    check_weight(W)
    settings.one_of("kind", kind, tuple(CODEBOOKS))
    settings.whole("block_size", block_size)
    code = CODEBOOKS[kind]().to(W.device)
    index, absmax = quantize_blockwise(W.detach(), code, block_size)
    zero = nearest_code(torch.zeros(1), CODEBOOKS[kind]()).item()
    nested = None
    if double_quant:
        absmax, offset, absmax2 = quantize_scales(absmax, GROUP)
        nested = (offset, absmax2, dynamic_codebook().to(W.device))
    return QuantizedWeight(pack(index, zero), absmax, code, kind, W.shape, W.dtype, block_size, nested)


def requantized_merge(W, delta, kind="nf4", block_size=64, double_quant=False):
    """Merge an update into a weight and round the sum to 4 bits.

    W: (d_out, d_in), what the codes of the base stand for   delta: (d_out, d_in), the update, not zero everywhere
    returns (merged, lost): a QuantizedWeight, and |merged - (W + delta)| / |delta|, a float
    """
    merged = quantize_weight(W + delta, kind, block_size, double_quant)
    lost = (merged.dequantize() - (W + delta)).norm() / delta.norm()
    return merged, lost.item()
