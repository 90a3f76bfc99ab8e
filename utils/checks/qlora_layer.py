"""Chapter 03, the product with a weight in 4 bits, what to ask transformers for, and the bytes of a base."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from utils.checks.compare import in_bytes
from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.memory import states
from utils.memory.instruments import LiveBytes
from utils.memory.states import nf4_bytes
from utils.quantization.base import bitsandbytes_fields
from utils.quantization.blocks import bits_per_number, dequantize_blockwise, unpack
from utils.quantization.linear import QuantizedProduct
from utils.quantization.weights import QuantizedWeight, quantize_weight

# ------------------------------------------------------------------------------------------------- QuantizedProduct


@dataclass(repr=False)
class Weight(QuantizedWeight):
    """A QuantizedWeight whose sentence is short, and which counts how often any is unpacked."""

    unpacked = 0  # no annotation: of the class, since a copy counts too

    def scales(self):
        Weight.unpacked += 1
        return super().scales()

    def dequantize(self, dtype=None):
        Weight.unpacked += 1
        return super().dequantize(dtype)

    def __repr__(self):
        return f"{self.kind} {tuple(self.shape)}"


def in_four_bits(rng, d_out, d_in, dtype=torch.float32, **options):
    W = normal(rng, d_out, d_in, std=d_in**-0.5, dtype=dtype)
    return Weight(**vars(quantize_weight(W, **options)))


def product_cases(rng):
    cases = []
    half = torch.bfloat16
    for leading, d_out, d_in, kinds, x_dtype, W_dtype in (
        ((6,), 16, 16, (), torch.float32, torch.float32),
        ((pick(rng, 3, 5),), 12, 32, ("rectangular",), torch.float32, torch.float32),
        ((pick(rng, 5, 7),), 24, 16, ("rectangular", "bias"), torch.float32, torch.float32),
        ((2, 3), 10, 32, ("leading", "rectangular"), torch.float32, torch.float32),
        ((2, 4), 20, 16, ("leading", "rectangular", "bias"), torch.float32, torch.float32),
        ((5,), 24, 32, ("rectangular", "bias", "x frozen"), torch.float32, torch.float32),
        ((5,), 12, 32, ("rectangular", "mixed"), half, torch.float32),
        ((3,), 40, 16, ("rectangular", "mixed"), torch.float32, half),
    ):
        kind, double = pick(rng, "nf4", "fp4"), pick(rng, True, False)
        weight = in_four_bits(rng, d_out, d_in, W_dtype, kind=kind, block_size=16, double_quant=double)
        x, grad = (normal(rng, *leading, width, dtype=x_dtype) for width in (d_in, d_out))
        bias = normal(rng, d_out, dtype=x_dtype).requires_grad_() if "bias" in kinds else None
        inputs = {"x": x.requires_grad_("x frozen" not in kinds), "bias": bias, "weight": weight, "grad": grad}
        later = "mixed" in kinds or "x frozen" in kinds
        cases.append(Case(inputs, kinds, {"d_out": d_out, "d_in": d_in, "numbers": d_out * d_in}, later=later))
    return cases


def left_behind(attempt, x, bias, weight):
    """What the forward pass leaves in memory beside its output, wherever it is kept: by autograd, on ctx, in a closure,
    on the weight. "nothing", "W'", "x", or how much else."""
    known = [t for t in (x, bias, *vars(weight).values(), *(weight.nested or ())) if isinstance(t, torch.Tensor)]
    with LiveBytes(known) as live:
        h = x.clone()  # nobody else holds on to it
        y = attempt.apply(h, bias, weight)
        if not isinstance(y, torch.Tensor):
            return "nothing"
        del h
        live.mark("forward")
    live.alive.pop(y.untyped_storage()._cdata, None)
    sizes = [size for _, size in live.alive.values()]
    for name, shape in (("W'", weight.shape), ("x", x.shape)):
        if any(shape.numel() * width in sizes for width in (x.element_size(), 4)):
            return name
    return f"{sum(sizes)} bytes" if sizes else "nothing"


def product_findings(attempt, x, bias, weight, grad):
    """Output, gradients, and what is left behind."""
    left = left_behind(attempt, x, bias, weight)
    y = attempt.apply(x, bias, weight)
    if not isinstance(y, torch.Tensor) or y.shape != grad.shape or not y.requires_grad:
        return {"output": y.detach() if isinstance(y, torch.Tensor) else y}
    found = {"output": y.detach(), "dtype of the output": str(y.dtype)}
    if y.dtype != x.dtype:
        return found
    before = Weight.unpacked
    y.backward(grad)
    if not x.requires_grad:
        found["unpacked for nothing"] = Weight.unpacked - before
    # A bias gradient with more axes than bias, grad itself even, is right too: autograd sums it over them.
    for name, tensor in (("x", x), ("bias", bias)):
        if tensor is not None and tensor.requires_grad:
            found[f"gradient of {name}"] = tensor.grad
    return found | {"kept for the backward pass": left}


def output_alone(attempt, *inputs):
    """What forward returns, for an attempt whose backward is not written yet."""
    y = attempt.apply(*inputs[:-1])
    return y.detach() if isinstance(y, torch.Tensor) else y


def product(forward=None, backward=None):
    """A QuantizedProduct with another forward(x, bias, weight, W) or another dx(grad, W), where W is unpacked."""

    class Product(QuantizedProduct):
        @staticmethod
        def forward(ctx, x, bias, weight):
            ctx.weight = weight
            return (forward or linear)(x, bias, weight, weight.dequantize(x.dtype))

        @staticmethod
        def backward(ctx, grad):
            dx, dbias, _ = QuantizedProduct.backward(ctx, grad)
            if backward is not None and dx is not None:
                dx = backward(grad, ctx.weight.dequantize(grad.dtype))
            return dx, dbias, None

    return Product


def linear(x, bias, weight, W):
    return F.linear(x, W, bias)


def altered(change):
    """QuantizedProduct with `change(gradients, grad)` applied to the list that backward returns."""

    class Altered(QuantizedProduct):
        @staticmethod
        def backward(ctx, grad):
            found = list(QuantizedProduct.backward(ctx, grad))
            change(found, grad)
            return tuple(found)

    return Altered


def keeping(keep):
    """QuantizedProduct that keeps more: keep(ctx, x, W)."""

    class Keeping(QuantizedProduct):
        @staticmethod
        def forward(ctx, x, bias, weight):
            W = weight.dequantize(x.dtype)
            keep(ctx, x, W)
            ctx.weight = weight
            return F.linear(x, W, bias)

    return Keeping


class SavesW(torch.autograd.Function):
    """What autograd would do by itself."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        W = weight.dequantize(x.dtype)
        ctx.save_for_backward(W)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx, grad):
        dbias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ ctx.saved_tensors[0], dbias, None


class WOnCtx(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.W = weight.dequantize(x.dtype)
        return F.linear(x, ctx.W, bias)

    @staticmethod
    def backward(ctx, grad):
        dbias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ ctx.W, dbias, None


class WOnTheWeight(QuantizedProduct):
    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight = weight
        weight.dense = weight.dequantize(x.dtype)
        return F.linear(x, weight.dense, bias)


def in_a_closure(ctx, x, W):
    ctx.unpack = lambda: W


def in_a_list(ctx, x, W):
    ctx.things = {"W": [W.T]}


def half_of_it(ctx, x, W):
    ctx.half = W[: len(W) // 2].clone()


def saves_x(ctx, x, W):
    ctx.save_for_backward(x)


class OwnDtype(QuantizedProduct):
    """Unpacks to the dtype that the weight had."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight = weight
        return F.linear(x, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx, grad):
        dbias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ ctx.weight.dequantize() if ctx.needs_input_grad[0] else None, dbias, None


class OwnDtypeBackward(QuantizedProduct):
    backward = staticmethod(OwnDtype.backward)


class InFloat32(QuantizedProduct):
    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.weight = weight
        bias = None if bias is None else bias.float()
        return F.linear(x.float(), weight.dequantize(torch.float32), bias)


def without_scales(x, bias, weight, W):
    values = weight.code[unpack(weight.packed, weight.shape.numel()).long()]
    return F.linear(x, values.view(weight.shape).to(x.dtype), bias)


def bias_left_out(x, bias, weight, W):
    return x @ W.T


def not_transposed(x, bias, weight, W):
    return x @ W if bias is None else x @ W + bias


def no_gradient(found, grad):
    found[0] = None


def no_bias(found, grad):
    found[1] = None


def always_bias(found, grad):
    found[1] = grad.flatten(0, -2).sum(0)


def still_flat(found, grad):
    found[0] = found[0] if found[0] is None else found[0].flatten(0, -2)


def mean_over_tokens(found, grad):
    found[1] = None if found[1] is None else grad.flatten(0, -2).mean(0)


def too_few(found, grad):
    del found[2]


def bias_for_the_weight(found, grad):
    found[1], found[2] = None, found[1]


class SavesTheWeight(torch.autograd.Function):
    """save_for_backward takes no QuantizedWeight."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.dequantize(grad.dtype), None, None


class AlwaysUnpacks(QuantizedProduct):
    @staticmethod
    def backward(ctx, grad):
        dx, dbias, _ = QuantizedProduct.backward(ctx, grad)
        ctx.weight.dequantize(grad.dtype)
        return dx, dbias, None


class NotStatic(torch.autograd.Function):
    def forward(ctx, x, bias, weight):
        return QuantizedProduct.forward(ctx, x, bias, weight)

    def backward(ctx, grad):
        return QuantizedProduct.backward(ctx, grad)


class AModule(torch.nn.Module):
    def forward(self, x, bias, weight):
        return F.linear(x, weight.dequantize(x.dtype), bias)


class BiasNotSummed(QuantizedProduct):
    """Right as well: autograd sums a gradient to the shape of what it belongs to."""

    @staticmethod
    def backward(ctx, grad):
        dx, dbias, _ = QuantizedProduct.backward(ctx, grad)
        return dx, None if dbias is None else grad, None


class ByHand(torch.autograd.Function):
    """With the chapter's own functions, and the gradient of the bias whether it is asked for or not."""

    @staticmethod
    def unpacked(weight, dtype):
        index = unpack(weight.packed, weight.shape.numel())
        W = dequantize_blockwise(index, weight.scales(), weight.code, weight.block_size)
        return W.view(weight.shape).to(dtype)

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.codes, ctx.has_bias = weight, bias is not None
        y = x @ ByHand.unpacked(weight, x.dtype).T
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.einsum("...o,oi->...i", grad, ByHand.unpacked(ctx.codes, grad.dtype))
        return dx, torch.einsum("...o->o", grad) if ctx.has_bias else None, None


class InNewStyle(torch.autograd.Function):
    """With setup_context, the codes through save_for_backward, and no second derivative."""

    @staticmethod
    def forward(x, bias, weight):
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, bias, ctx.rest = inputs
        ctx.save_for_backward(ctx.rest.packed, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        packed, bias = ctx.saved_tensors
        dx, dbias = None, None if bias is None else grad.sum(tuple(range(grad.ndim - 1)))
        if ctx.needs_input_grad[0]:
            dx = grad.matmul(replace(ctx.rest, packed=packed).dequantize(grad.dtype))
        return dx, dbias, None


class BoundMethod(QuantizedProduct):
    """Keeps the function that unpacks, which holds the codes alone."""

    @staticmethod
    def forward(ctx, x, bias, weight):
        ctx.unpack = weight.dequantize
        return F.linear(x, ctx.unpack(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        dbias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return grad @ ctx.unpack(grad.dtype) if ctx.needs_input_grad[0] else None, dbias, None


W_STAYS = (
    "The numbers are right, and W' stays in memory until the backward pass: all {numbers} numbers of it, for every "
    "layer at once. Keep the codes alone, ctx.weight = weight, and unpack them again in backward."
)

PRODUCT = Exercise(
    name="QuantizedProduct",
    reference=QuantizedProduct,
    cases=product_cases,
    call=product_findings,
    first=output_alone,
    mistakes=(
        Mistake("saves_W", SavesW, W_STAYS),
        Mistake("W_on_ctx", WOnCtx, W_STAYS),
        Mistake("W_on_the_weight", WOnTheWeight, W_STAYS),
        Mistake("W_in_a_closure", keeping(in_a_closure), W_STAYS),
        Mistake("W_in_a_list", keeping(in_a_list), W_STAYS),
        Mistake("saves_x", keeping(saves_x),
                "The numbers are right, and x is kept. Only a gradient of W would need it, and W is frozen: dL/dx = "
                "dL/dy W' does not."),
        Mistake("keeps_half", keeping(half_of_it), None, "bytes are kept beside the codes"),
        Mistake("gradient_transposed", product(backward=lambda grad, W: grad @ W.T),
                "The output is right and the gradient of x is not. dL/dx = dL/dy W', without a transpose: (..., d_out) "
                "times (d_out, d_in). The forward pass had it."),
        Mistake("not_transposed", product(forward=not_transposed),
                "In forward x meets W' the wrong way round. PyTorch stores a weight as (d_out, d_in), so y = x W'^T."),
        Mistake("without_scales", product(forward=without_scales),
                "Your weight is the code book's numbers, between -1 and 1: the scales of the blocks are missing. "
                "weight.dequantize(dtype) has them."),
        Mistake("bias_forgotten", product(forward=bias_left_out),
                "bias is not added. It may be None; when it is not, it belongs to y."),
        Mistake("x_has_no_gradient", altered(no_gradient),
                "backward gives None for x, so the layers before this one learn nothing. W is frozen; x is not."),
        Mistake("bias_has_no_gradient", altered(no_bias),
                "bias was trained here and got no gradient. It is dL/dy, summed over all tokens."),
        Mistake("mean", altered(mean_over_tokens),
                "The gradient of bias is the mean over the tokens. It is the sum: each token adds the same bias."),
        Mistake("still_flat", altered(still_flat), None, "A gradient has the shape of what it belongs to"),
        Mistake("always_bias", altered(always_bias), None, "When bias is None its gradient is None"),
        Mistake("too_few", altered(too_few), None, "One value for each argument of forward"),
        Mistake("bias_for_the_weight", altered(bias_for_the_weight), None, "The order is x, bias, weight"),
        Mistake("saves_the_weight", SavesTheWeight, None, "save_for_backward takes tensors only"),
        Mistake("always_unpacks", AlwaysUnpacks, None, "W' need not be unpacked"),
        Mistake("not_static", NotStatic, None, "Write @staticmethod above forward and backward"),
        Mistake("a_module", AModule, None, "not a torch.autograd.Function"),
        Mistake("own_dtype", OwnDtype, None, "unpack to the dtype of what you multiply it with"),
        Mistake("own_dtype_backward", OwnDtypeBackward, None, "unpack to the dtype of what you multiply it with"),
        Mistake("in_float32", InFloat32,
                "Right in float32. With x in bfloat16 your output is float32: unpack to x's dtype, "
                "weight.dequantize(x.dtype), and return that."),
    ),
    alternatives=(ByHand, InNewStyle, BoundMethod, BiasNotSummed),
    explain={
        "kept for the backward pass": "The numbers are right, but {yours} are kept beside the codes. Whatever is made "
        "from them can be made again in backward.",
        "incorrect number of gradients": "One value for each argument of forward, three here: the last is None.",
        "different than None at position 3": "The order is x, bias, weight, and the third is None: is your bias "
        "gradient in the place of weight?",
        "save_for_backward can only save": "save_for_backward takes tensors only; put the QuantizedWeight on ctx: "
        "ctx.weight = weight.",
        "different than None": "When bias is None its gradient is None too: ask ctx.needs_input_grad[1].",
        "invalid gradient": "A gradient has the shape of what it belongs to: that of x all of x's axes.",
    },
    kinds={
        "mixed": "Right while x has the dtype that the weight had before it was quantized. Here it has another: unpack "
        "to the dtype of what you multiply it with, weight.dequantize(x.dtype), and grad.dtype in backward.",
        "x frozen": "Right while x needs a gradient. Here it needs none, as in a model's first layer, and "
        "W' need not be unpacked again: ctx.needs_input_grad[0] tells.",
        "bias": "Right without a bias and wrong with one. It is added to y; its gradient is dL/dy summed over the "
        "tokens.",
    },
    fact="Nothing is kept but the codes, which are there anyway. Autograd's own product would keep W': for q_proj of "
    "Llama-2-7B 33.6 MB in 16 bits, more than three times what the codes and scales take.",
)

# ------------------------------------------------------------------------------------------------ bitsandbytes_fields


def field_cases(rng):
    half = pick(rng, torch.float16, torch.bfloat16)
    drawn = [(), ("fp4", False, torch.float16), ("nf4", False, torch.float32), ("fp4", True, half)]
    names = ("kind", "double_quant", "compute_dtype")
    return [Case(dict(zip(names, values, strict=False)), ("asked",) if values else ()) for values in drawn]


MEANT = {  # BitsAndBytesConfig's argument -> what the finding is called
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "bnb_4bit_quant_type": "code book",
    "bnb_4bit_use_double_quant": "double quantization",
    "bnb_4bit_compute_dtype": "compute dtype",
}


def meant_by(attempt, *inputs):
    """What transformers makes of the fields; strings and dtypes that mean the same are the same."""
    import inspect

    from transformers import BitsAndBytesConfig

    fields = attempt(*inputs)
    if not isinstance(fields, dict):
        return fields
    unknown = sorted(set(fields) - set(inspect.signature(BitsAndBytesConfig).parameters))
    if unknown:
        return {"unknown": ", ".join(unknown)}
    config = BitsAndBytesConfig(**fields)
    return {"unknown": ""} | {name: str(getattr(config, field)) for field, name in MEANT.items()}


def asking(changes=(), without=(), use=lambda *given: given):
    """A bitsandbytes_fields with some fields changed or left out, made for use(kind, double_quant, compute_dtype)."""

    def bitsandbytes_fields_(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
        fields = bitsandbytes_fields(*use(kind, double_quant, compute_dtype)) | dict(changes)
        return {name: value for name, value in fields.items() if name not in without}

    return bitsandbytes_fields_


def misspelt(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_double_quant": double_quant,
            "bnb_4bit_compute_dtype": compute_dtype}  # fmt: skip


def short_names(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return {"load_in_4bit": True, "quant_type": kind, "use_double_quant": double_quant, "compute_dtype": compute_dtype}


def other_kind(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return {"load_in_4bits": True, "bnb_4bit_kind": kind, "bnb_4bit_use_double_quant": double_quant,
            "bnb_4bit_compute_dtype": compute_dtype}  # fmt: skip


def in_capitals(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return bitsandbytes_fields(kind, double_quant, compute_dtype) | {"bnb_4bit_quant_type": kind.upper()}


def eight_bits(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    fields = bitsandbytes_fields(kind, double_quant, compute_dtype) | {"load_in_8bit": True}
    del fields["load_in_4bit"]
    return fields


def the_config(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(**bitsandbytes_fields(kind, double_quant, compute_dtype))


def dtype_by_name(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return dict(load_in_4bit=True, load_in_8bit=False, bnb_4bit_quant_type=kind,
                bnb_4bit_use_double_quant=double_quant,
                bnb_4bit_compute_dtype=str(compute_dtype).removeprefix("torch."))  # fmt: skip


def what_differs(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    """Only what differs from the defaults."""
    fields = {"load_in_4bit": True}
    if kind != "fp4":
        fields["bnb_4bit_quant_type"] = kind
    if double_quant:
        fields["bnb_4bit_use_double_quant"] = True
    if compute_dtype != torch.float32:
        fields["bnb_4bit_compute_dtype"] = compute_dtype
    return fields


def with_storage(kind="nf4", double_quant=True, compute_dtype=torch.bfloat16):
    return bitsandbytes_fields(kind, double_quant, compute_dtype) | {"bnb_4bit_quant_storage": torch.uint8}


FIELDS = Exercise(
    name="bitsandbytes_fields",
    reference=bitsandbytes_fields,
    cases=field_cases,
    call=meant_by,
    mistakes=(
        Mistake("load_in_4bit_alone", lambda *_, **__: {"load_in_4bit": True},
                "You left the defaults: that is FP4, scales of 32 bits, and products in float32. None of the three is "
                "QLoRA's; each has a field of its own."),
        Mistake("no_kind", asking(without=("bnb_4bit_quant_type",)),
                'The code book is left at its default, which is "fp4". NF4 has to be asked for: bnb_4bit_quant_type.'),
        Mistake("no_double_quant", asking(without=("bnb_4bit_use_double_quant",)),
                "Double quantization is left at its default, which is off: bnb_4bit_use_double_quant."),
        Mistake("no_compute_dtype", asking(without=("bnb_4bit_compute_dtype",)),
                "The compute dtype is left at its default, float32: slow on every GPU with tensor cores. The field is "
                "bnb_4bit_compute_dtype."),
        Mistake("always_nf4", asking(use=lambda kind, double, dtype: ("nf4", double, dtype)),
                'You ask for "nf4" whatever kind says.'),
        Mistake("always_double", asking(use=lambda kind, double, dtype: (kind, True, dtype)),
                "You ask for double quantization whatever double_quant says."),
        Mistake("always_bfloat16", asking(use=lambda kind, double, dtype: (kind, double, torch.bfloat16)),
                "You ask for bfloat16 whatever compute_dtype says."),
        Mistake("always_qloras", asking(use=lambda *_: ("nf4", True, torch.bfloat16)),
                "Those are QLoRA's settings whatever was asked for: use the three arguments."),
        Mistake("double_quant_reversed", asking(use=lambda kind, double, dtype: (kind, not double, dtype)),
                "double_quant is taken the wrong way round."),
        Mistake("no_4bit", asking(without=("load_in_4bit",)),
                "load_in_4bit is missing. Without it nothing is quantized, and no error says so: the other fields only "
                "say how."),
        Mistake("eight_bits", eight_bits,
                "load_in_8bit is another method, LLM.int8(): 8 bits per weight. Fields for 4 bits do nothing then."),
        Mistake("both", asking({"load_in_8bit": True}), None, "only one can be used at the same time"),
        Mistake("misspelt", misspelt,
                "There is no bnb_4bit_double_quant; the field is bnb_4bit_use_double_quant. transformers takes unknown "
                "names without an error, and the default, off, stays."),
        Mistake("short_names", short_names,
                "The fields begin with bnb_4bit_. transformers takes unknown names without an error, and the defaults "
                "stay: FP4, scales of 32 bits, float32."),
        Mistake("other_kind", other_kind, None, "transformers knows no field bnb_4bit_kind, load_in_4bits;"),
        Mistake("in_capitals", in_capitals,
                'The kinds are written in small letters. transformers takes "NF4" without an error, and bitsandbytes '
                "refuses it when the model is loaded."),
        Mistake("the_config", the_config, None, "a BitsAndBytesConfig, and a dict is expected"),
        Mistake("unknown_dtype", asking({"bnb_4bit_compute_dtype": "bf16"}), None, "has no attribute 'bf16'"),
        Mistake("in_words", asking({"bnb_4bit_use_double_quant": "yes"}), None, "must be a boolean"),
    ),
    alternatives=(dtype_by_name, what_differs, with_storage),
    explain={
        "unknown": "transformers knows no field {yours}; it takes unknown names without an error, and they do nothing.",
        "no attribute 'bf16'": 'A dtype, or its full name: torch.bfloat16 or "bfloat16".',
    },
    kinds={"asked": "Right for QLoRA's settings and wrong when others are asked for: use the three arguments."},
    fact="load_in_4bit=True alone gives FP4, scales of 32 bits and products in float32: 4.5 bits per weight, and not "
    "what the paper describes.",
)

# ------------------------------------------------------------------------------------------------- quantized_base


def base_cases(rng):
    """Whole blocks and whole groups of scales, so that nothing has to be rounded."""
    found = []
    for block, double, e in ((None, None, None), (64, False, 2), (pick(rng, 32, 128), True, 2),
                             (pick(rng, 128, 256), False, 4), (pick(rng, 16, 32), True, 4)):  # fmt: skip
        linear, rest = 256 * 256 * pick(rng, 50, 70, 90), 1000 * pick(rng, 311, 457, 823)
        options = {} if block is None else {"block": block, "double_quant": double, "e": e}
        kinds = () if block in (None, 64) else ("block",)
        numbers = {"linear": linear, "rest": rest, "block": block or 64, "e": e or 2}
        found.append(Case({"linear": linear, "rest": rest} | options, kinds, numbers))
    return found


def base_of(rule):
    """A quantized_base with another formula."""
    return lambda linear, rest, block=64, double_quant=True, e=2: rule(linear, rest, block, double_quant, e)


def by_hand(linear, rest, block=64, double_quant=True, e=2):
    blocks = linear / block
    scales = blocks * 1 + blocks / 256 * 4 if double_quant else blocks * 4
    return linear // 2 + scales + e * rest


def with_bits(bits):
    """bits(block, double_quant) per number."""
    return base_of(lambda linear, rest, block, double, e: linear * bits(block, double) / 8 + rest * e)


NO_BLOCK = (
    "You took blocks of 64 whatever block says. It says {block} here, so there are other numbers of scales: nf4_bytes "
    "takes it too."
)
TYPED = (
    "You took 4.127 bits per number, or 4.5, whatever block says: these are for blocks of 64, and 4.127 is rounded. "
    "nf4_bytes computes them."
)

QUANTIZED_BASE = Exercise(
    name="quantized_base",
    reference=states.quantized_base,
    cases=base_cases,
    call=in_bytes,
    tolerance=1e-9,
    mistakes=(
        Mistake("all_in_4_bits", base_of(lambda n, rest, block, dq, e: nf4_bytes(n + rest, block, dq)),
                "You put all numbers into 4 bits. Embeddings, norms and the output embedding stay as they are, e bytes "
                "each."),
        Mistake("rest_forgotten", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq)),
                "The others are missing: {rest} numbers that are not quantized, e bytes each."),
        Mistake("no_scales", base_of(lambda n, rest, block, dq, e: n / 2 + rest * e),
                "You counted 4 bits and no scales. Each block of {block} numbers has one."),
        Mistake("swapped", base_of(lambda n, rest, block, dq, e: nf4_bytes(rest, block, dq) + n * e),
                "linear and rest are swapped: it is the linear layers that are quantized."),
        Mistake("never_double", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, False) + rest * e),
                "Your scales take 32 bits whatever double_quant says."),
        Mistake("always_double", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block) + rest * e),
                "Your scales take 8 bits whatever double_quant says."),
        Mistake("double_reversed", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, not dq) + rest * e),
                "double_quant is taken the wrong way round."),
        Mistake("blocks_of_64", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, 64, dq) + rest * e), NO_BLOCK),
        Mistake("flag_as_block", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, dq or 1) + rest * e),
                "nf4_bytes takes the block size second and double_quant third: you gave it double_quant as the block "
                "size."),
        Mistake("typed", with_bits(lambda block, double: 4.127 if double else 4.5), TYPED),
        Mistake("typed_exactly", with_bits(lambda block, double: 4.126953125 if double else 4.5), NO_BLOCK),
        Mistake("always_4127", with_bits(lambda block, double: 4.127),
                "You took 4.127 bits per number: that is rounded, and only for blocks of 64 with double quantization. "
                "nf4_bytes computes it."),
        Mistake("always_45", with_bits(lambda block, double: 4.5),
                "You took 4.5 bits per number: that is for blocks of 64 without double quantization. nf4_bytes "
                "computes it from both."),
        Mistake("second_scales_forgotten", with_bits(lambda block, double: 4 + (8 if double else 32) / block),
                "Under double quantization the scales' own scales are missing: one in float32 for 256 of them."),
        Mistake("scales_of_16_bits", with_bits(lambda block, double: 4 + (8 + 32 / 256 if double else 16) / block),
                "Without double quantization a scale is float32, 32 bits, whatever the weight's dtype was."),
        Mistake("always_two_bytes", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq) + 2 * rest),
                "You took 2 bytes for each of the others whatever e says."),
        Mistake("e_everywhere", base_of(lambda n, rest, block, dq, e: (n + rest) * e),
                "You took e bytes for every number: that is the base before it is quantized."),
        Mistake("bits_of_linear", base_of(lambda n, rest, block, dq, e: n * bits_per_number(4, block, dq) + rest * e),
                "You added bits of the one to bytes of the other: bits_per_number is in bits, nf4_bytes in bytes."),
        Mistake("gigabytes", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq) + rest * e) / 1e9),
                "Those are GB. Return bytes; `units` turns them into GB and GiB."),
        Mistake("gibibytes", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq) + rest * e) / 2**30),
                "Those are GiB. Return bytes; `units` turns them into GB and GiB."),
        Mistake("e_on_both", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq) + rest) * e),
                "You took e times the sum. nf4_bytes gives bytes already: e is for the others alone."),
        Mistake("rest_without_e", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq) + rest),
                "You counted one byte for each of the others. They take e bytes each, {e} here."),
        Mistake("e_in_bits", base_of(lambda n, rest, block, dq, e: nf4_bytes(n, block, dq) + rest * e / 8),
                "You divided e by 8. It is in bytes already."),
        Mistake("four_bits_a_byte", base_of(lambda n, rest, block, dq, e: 2 * nf4_bytes(n, block, dq) + rest * e),
                "Your linear layers take twice what they should: a byte has 8 bits."),
        Mistake("both", base_of(lambda n, rest, block, dq, e: (nf4_bytes(n, block, dq), rest * e)), None,
                "a tuple of 2, and a number is expected"),
    ),
    alternatives=(
        by_hand,
        with_bits(lambda block, double: bits_per_number(4, block, double)),
        base_of(lambda n, rest, block, dq, e: round(rest * e + nf4_bytes(n, block=block, double_quant=dq))),
    ),
    explain={"division by zero": "nf4_bytes takes the block size second and double_quant third."},
    kinds={"block": "Right for blocks of 64 and wrong for others. How many scales are there?"},
    fact=f"Llama-2-7B: {states.quantized_base(6_476_005_376, 262_410_240) / 1e9:.2f} GB in place of "
    f"{2 * 6_738_415_616 / 1e9:.2f}, and {2 * 262_410_240 / 1e9:.2f} of them for the embeddings and norms, 4 % of the "
    "numbers.",
)

EXERCISES = (PRODUCT, FIELDS, QUANTIZED_BASE)
