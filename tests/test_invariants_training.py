"""What holds for every method on every model when it is trained. The rest of the matrix is in test_invariants."""

import math

import pytest
import torch
from method_table import MATRIX, METHODS, config_of
from small_models import backward, batch, bits, gradients, logits, move, output, same_bits, small_model

from utils import attach
from utils.measure import saved_by_shape

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
every = pytest.mark.parametrize("method, architecture", MATRIX)


@every
def test_only_the_adapter_is_trained(method, architecture):
    model = small_model(architecture).train()
    base, before = output(model), bits(model)
    adapter = attach(model, config_of(method, architecture))
    parameters = adapter.parameters()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}
    start = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    backward(logits(model))
    optimizer.step()
    moved = [not torch.equal(p, s) for p, s in zip(parameters, start, strict=True)]
    # the key's bias shifts all scores of a query alike, so the softmax hides it and its gradient is rounding
    exempt = [n.endswith(("key.bias", "k_proj.bias")) for n, _ in adapter.named_parameters()]
    assert all(m or e for m, e in zip(moved, exempt, strict=True))
    with adapter.disabled():
        assert torch.equal(output(model), base)
    adapter.detach()
    assert same_bits(bits(model), before)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@every
def test_checkpointing_changes_nothing(method, architecture, reentrant):
    model = small_model(architecture)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    plain, expected = gradients(model, adapter)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # this kind needs an input with a gradient, which transformers arranges so
        model.enable_input_require_grads()
    found, grads = gradients(model, adapter)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6 * max(1, plain.abs().max().item()))
    for name, grad in grads.items():
        assert grad is not None, name
        torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-5 * max(1, expected[name].abs().max().item()))


HALF = {torch.bfloat16: 0.05, torch.float16: 0.01}  # the part of the logits' length that rounding may cost


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every
def test_half_precision(method, architecture, dtype):
    """The base in half precision: close to the same adapter on the exact base, and exact when off."""
    exact = small_model(architecture)
    torch.manual_seed(0)
    source = attach(exact, config_of(method, architecture))
    move(source)
    model = small_model(architecture, dtype)
    base = output(model)
    adapter = attach(model, config_of(method, architecture))
    with torch.no_grad():
        for own, other in zip(adapter.parameters(), source.parameters(), strict=True):
            own.copy_(other)
    found, expected = output(model), output(exact)
    assert found.dtype == dtype
    assert (found - expected).norm() < HALF[dtype] * expected.norm()
    backward(logits(model))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapter.parameters())
    with adapter.disabled():
        assert torch.equal(output(model), base)
    if architecture in METHODS[method].mergeable:
        before = bits(model)
        adapter.merge()
        difference = (output(model) - found).float().norm() / found.float().norm()
        assert difference < HALF[dtype]  # the merged weight is rounded to half precision
        adapter.unmerge()
        assert same_bits(bits(model), before) and torch.equal(output(model), found)


@pytest.mark.parametrize("method, architecture", [p for p in MATRIX if p.values[1] in ("llama_gqa", "gpt2", "bert")])
def test_no_single_precision_copy_of_the_activations(method, architecture):
    """Over a bfloat16 base the adapter computes in bfloat16: it keeps nothing as wide as x in float32.

    The base keeps some itself, in its norms, for each of the 11 positions, and so for those that a prompt adds.
    """

    def wide_in_single(attached):
        model = small_model(architecture, torch.bfloat16).train()
        model.requires_grad_(False).enable_input_require_grads()
        if attached:
            attach(model, config_of(method, architecture))
        saved = saved_by_shape(lambda: logits(model), exclude=[model])
        return sum(b for (shape, dtype), b in saved.items() if dtype == torch.float32 and math.prod(shape) >= 1056)

    assert wide_in_single(True) * 11 <= wide_in_single(False) * (11 + METHODS[method].longer)


COMPILED = ("llama_gqa", "bert")  # tracing takes seconds


@pytest.mark.parametrize("method, architecture", [p for p in MATRIX if p.values[1] in COMPILED])
def test_compiled_is_the_same(method, architecture):
    """torch.compile traces forward and backward of the attached model. (aot_eager: all but the C++ at its end.)"""
    torch._dynamo.reset()
    model = small_model(architecture)
    adapter = attach(model, config_of(method, architecture))
    move(adapter)
    adapter.model.eval()
    expected = logits(model)
    backward(expected)
    grads = {n: p.grad for n, p in adapter.named_parameters()}
    model.zero_grad()
    found = torch.compile(model, backend="aot_eager")(**batch(model)).logits
    backward(found)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item()))
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(
            parameter.grad, grads[name], rtol=0, atol=1e-5 * max(1, grads[name].abs().max().item())
        )
