"""The equations of LoRA, with answers that can be computed by hand, and their gradients against autograd's."""

import math

import pytest
import torch
import torch.nn.functional as F

from utils.methods.lora import (
    LoRAFunction,
    dropout_mask,
    fuse_loras,
    lora_backward,
    lora_delta,
    lora_forward,
    lora_init,
    lora_merge,
    lora_num_params,
    lora_scale,
)

# d_in 3, d_out 2, r 1: A picks the second input, B sends it to the second output, alpha / r is 2.
W = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
A = torch.tensor([[0.0, 1, 0]])
B = torch.tensor([[0.0], [1]])
X = torch.tensor([5.0, 7, 11])


def random_lora(d_in=6, d_out=5, r=2, n=7, dtype=torch.float64, seed=0):
    """x (n, d_in), W, bias, A, B, all random, of which only W needs no gradient."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    x, bias, a, b = (t.requires_grad_() for t in (draw(n, d_in), draw(d_out), draw(r, d_in), draw(d_out, r)))
    return x, draw(d_out, d_in), bias, a, b


# ------------------------------------------------------------------------------------------------- the equations


def test_scale():
    assert lora_scale(16, 8) == 2
    assert lora_scale(16, 4, "rslora") == 8
    with pytest.raises(ValueError, match=r"scaling is 'half'; it can be 'standard' \(alpha / r\) or 'rslora'"):
        lora_scale(16, 8, "half")


def test_init_is_uniform_in_one_over_root_d_in_and_b_is_zero():
    a, b = lora_init(400, 30, 50, torch.Generator().manual_seed(0))
    assert a.shape == (50, 400) and b.shape == (30, 50)
    assert not b.any()
    assert a.abs().max() <= 1 / 20
    assert a.std().item() == pytest.approx(1 / 20 / math.sqrt(3), rel=0.02)  # of a uniform distribution
    again, _ = lora_init(400, 30, 50, torch.Generator().manual_seed(0))
    assert torch.equal(a, again)


def test_delta_forward_and_merge_by_hand():
    assert lora_delta(A, B, alpha=2).tolist() == [[0, 0, 0], [0, 2, 0]]
    assert lora_forward(X, W, A, B, alpha=2).tolist() == [5, 11 + 2 * 7]
    assert lora_merge(W, A, B, alpha=2).tolist() == [[1, 0, 0], [0, 2, 1]]
    assert W.tolist() == [[1, 0, 0], [0, 0, 1]]


def test_the_scale_divides_by_the_rank():
    a, b = A.repeat(4, 1), B.repeat(1, 4)  # four times the same direction, so 4 / r = 1
    assert lora_forward(X, W, a, b, alpha=2).tolist() == [5, 25]


def test_forward_keeps_leading_dimensions():
    x = torch.stack([X, 2 * X]).view(2, 1, 1, 3)
    assert lora_forward(x, W, A, B, alpha=2).view(2, 2).tolist() == [[5, 25], [10, 50]]


def test_number_of_parameters():
    assert lora_num_params([(2, 3)], r=1) == 5
    llama_2_7b = 32 * [(4096, 4096), (4096, 4096)]  # q and v of 32 layers
    assert lora_num_params(llama_2_7b, r=8) == 4_194_304


def test_merge_rounds_once_and_keeps_the_dtype():
    # Near 1 bfloat16 has steps of 2^-7. Three updates of 2^-9 make 3/4 of a step and round up; one by one each is lost.
    w, a, b = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((3, 1), 2.0**-9), torch.ones(1, 3)
    merged = lora_merge(w, a, b, alpha=3)
    assert merged.dtype == torch.bfloat16 and w.item() == 1
    assert merged.item() == 1 + 2**-7


def test_fused_loras_are_the_parts_stacked():
    parts = [random_lora(d_out=d, r=r, seed=d)[3:] for d, r in ((2, 1), (3, 2), (4, 3))]
    a, b = fuse_loras(*zip(*parts, strict=True))
    assert a.shape == (6, 6) and b.shape == (9, 6)
    torch.testing.assert_close(b @ a, torch.cat([bi @ ai for ai, bi in parts]))


def test_fused_scale_needs_k_times_the_alpha():
    parts = [random_lora(seed=s)[3:] for s in range(3)]
    fused = lora_delta(*fuse_loras(*zip(*parts, strict=True)), alpha=3 * 16)
    torch.testing.assert_close(fused, torch.cat([lora_delta(a, b, alpha=16) for a, b in parts]))


# ------------------------------------------------------------------------------------------------- the gradients


@pytest.mark.parametrize("masked", [False, True])
def test_backward_equals_autograd(masked):
    x, w, _, a, b = random_lora()
    mask = torch.rand(x.shape) < 0.7 if masked else None
    kept = x * mask if masked else x
    y = x @ w.T + 1.5 * kept @ a.T @ b.T
    grad = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, a, b), grad)
    with torch.no_grad():
        found = lora_backward(grad, x, w, a, b, 1.5, mask)
        without_x = lora_backward(grad, x, None, a, b, 1.5, mask)
    torch.testing.assert_close(found, expected)
    assert without_x[0] is None
    torch.testing.assert_close(without_x[1:], expected[1:])


def test_backward_by_hand():
    # dB = s grad (A x)^T = 2 [1, 10] * 7    dA = s (B^T grad) x^T = 2 * 10 * x    dx = W^T grad + s A^T B^T grad
    dx, da, db = lora_backward(torch.tensor([[1.0, 10]]), X[None], W, A, B, 2.0)
    assert db.tolist() == [[14], [140]]
    assert da.tolist() == [[100, 140, 220]]
    assert dx.tolist() == [[1, 20, 10]]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("base_trained", [False, True])
def test_function_passes_gradcheck(masked, biased, base_trained):
    x, w, bias, a, b = random_lora(n=3)
    w.requires_grad_(base_trained)  # an unfrozen base must not lose its gradient in silence
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    inputs = (x, w, bias if biased else None, a, b, 1.5, mask)
    assert torch.autograd.gradcheck(LoRAFunction.apply, inputs)
    assert torch.autograd.gradgradcheck(LoRAFunction.apply, inputs)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(6, dtype=torch.float64),
        torch.randn(0, 6, dtype=torch.float64),
        torch.randn(2, 3, 4, 6, dtype=torch.float64),
        torch.randn(3, 2, 6, dtype=torch.float64).transpose(0, 1),
        torch.randn(6, 3, dtype=torch.float64).T,
        torch.randn(1, 6, dtype=torch.float64).expand(4, 6),
    ],
    ids=["vector", "no rows", "4-D", "transposed", "column-major", "expanded"],
)
@pytest.mark.parametrize("masked", [False, True])
def test_function_takes_any_layout(x, masked):
    _, w, bias, a, b = random_lora()
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    mask = torch.rand(x.shape) < 0.5 if masked else None
    y = LoRAFunction.apply(x, w, bias, a, b, 2.0, mask)
    expected = F.linear(x, w, bias) + 2.0 * (x if mask is None else x * mask) @ a.T @ b.T
    torch.testing.assert_close(y, expected)
    grads = torch.autograd.grad(y.sum(), (x, bias, a, b))
    torch.testing.assert_close(grads, torch.autograd.grad(expected.sum(), (x, bias, a, b)))


def test_dropout_mask_is_ones_and_zeros_in_the_right_proportion():
    for shape in ((7,), (3, 5, 1001)):
        mask = dropout_mask(torch.empty(shape), 0.25)
        assert mask.shape == shape and mask.dtype == torch.int8 and set(mask.unique().tolist()) <= {0, 1}
    mask = dropout_mask(torch.empty(1000, 1000), 0.25)  # a million draws: standard deviation 0.0004
    assert abs(mask.float().mean().item() - 0.75) < 0.003
    assert abs((mask[:, 1:] * mask[:, :-1]).float().mean().item() - 0.75**2) < 0.003  # neighbours are independent
    assert dropout_mask(torch.empty(1000), 0.0).all()
