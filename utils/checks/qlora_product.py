"""Chapter 03, the product with a weight in 4 bits."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.memory.instruments import LiveBytes
from utils.quantization.blocks import dequantize_blockwise, unpack
from utils.quantization.linear import QuantizedProduct
from utils.quantization.weights import QuantizedWeight, quantize_weight


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
