"""LoRA's modules: by hand, in every dtype, the bytes they keep, and what tools such as torch.compile make of them."""

import copy
import pickle

import pytest
import torch
from small_models import backward, logits, small_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from utils import LoRA, attach
from utils.measure import saved_bytes
from utils.methods.lora import LoRAEmbedding, LoRALinear, dropout_mask, fuse_loras, lora_delta


def layer(base, **options):
    """A LoRALinear with B not zero."""
    return LoRALinear(base, **{"r": 2, "alpha": 4, "init": "random_b"} | options)


def frozen_linear(d_in=32, d_out=24, bias=True, dtype=None):
    return nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False)


# ------------------------------------------------------------------------------------------------- the modules


def test_linear_by_hand():
    base = nn.Linear(3, 2)
    lora = LoRALinear(base, r=1, alpha=2)
    values = {base.weight: [[1, 0, 0], [0, 0, 1]], base.bias: [100, 200], lora.A: [[0, 1, 0]], lora.B: [[0], [1]]}
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(torch.tensor(value))
    x = torch.tensor([5.0, 7, 11])
    assert lora(x).tolist() == [105, 211 + 2 * 7]
    assert lora.merged_tensors()["weight"].tolist() == [[1, 0, 0], [0, 2, 1]]
    lora.active = False
    assert lora(x).tolist() == [105, 211]


def test_first_step_moves_only_b():
    lora = layer(frozen_linear(), init="uniform")
    lora(torch.randn(4, 32)).sum().backward()
    assert not lora.A.grad.any() and lora.B.grad.any()


def test_conv1d_equals_the_linear_layer_it_is():
    linear, conv = nn.Linear(6, 9), Conv1D(9, 6)
    conv.weight, conv.bias = nn.Parameter(linear.weight.T.contiguous()), linear.bias
    first, second = layer(linear), layer(conv)
    second.A, second.B = first.A, first.B
    x = torch.randn(4, 6)
    torch.testing.assert_close(second(x), first(x))
    assert second.merged_tensors()["weight"].shape == conv.weight.shape == (6, 9)
    torch.testing.assert_close(second.merged_tensors()["weight"], first.merged_tensors()["weight"].T)


def test_separate_loras_of_q_k_and_v_as_one_on_a_fused_layer():
    fused = Conv1D(3 * 6, 6)
    parts = [(torch.randn(2, 6), torch.randn(6, 2)) for _ in "qkv"]
    lora = layer(fused, r=6, alpha=3 * 4)
    with torch.no_grad():
        a, b = fuse_loras(*zip(*parts, strict=True))
        lora.A.copy_(a)
        lora.B.copy_(b)
    x = torch.randn(4, 6)
    updates = torch.cat([x @ lora_delta(a, b, alpha=4).T for a, b in parts], dim=1)
    torch.testing.assert_close(lora(x), fused(x) + updates)


def test_embedding_by_hand():
    lora = LoRAEmbedding(nn.Embedding(4, 2, padding_idx=0), r=1, alpha=3)
    ids = torch.tensor([0, 2, 2])
    assert torch.equal(lora(ids), lora.base(ids))  # here A is what starts at zero
    with torch.no_grad():
        lora.base.weight.copy_(torch.arange(8).view(4, 2))
        lora.A.copy_(torch.tensor([[9.0, 0, 10, 0]]))
        lora.B.copy_(torch.tensor([[1.0], [2]]))
    assert lora(ids).tolist() == [[27, 55], [34, 65], [34, 65]]
    assert lora.merged_tensors()["weight"].tolist() == [[27, 55], [2, 3], [34, 65], [6, 7]]
    lora(ids).sum().backward()
    assert lora.A.grad.tolist() == [[0, 0, 18, 0]]  # 2 tokens x scale 3 x (1 + 2); the padding token learns nothing


def test_gaussian_init_has_std_one_over_r():
    lora = LoRALinear(nn.Linear(1000, 4), r=20, alpha=1, init="gaussian")
    assert lora.A.std().item() == pytest.approx(1 / 20, rel=0.03)
    assert not lora.B.any()


def test_dropout_acts_on_the_branch_and_in_training_only():
    lora = layer(frozen_linear(), dropout=0.5)
    plain = layer(lora.base, dropout=0.0)
    plain.A, plain.B = lora.A, lora.B
    x = torch.randn(64, 32)
    assert torch.equal(lora.eval()(x), plain.eval()(x))
    lora.train()
    torch.manual_seed(3)
    y = lora(x)
    torch.manual_seed(3)
    mask = dropout_mask(x, 0.5)  # the same draw, so the same entries
    torch.testing.assert_close(y, lora.base(x) + lora.scale * (2 * mask * x) @ lora.A.T @ lora.B.T)


def test_plain_formula_gives_the_same():
    lora = layer(frozen_linear())
    x = torch.randn(4, 32)
    y = lora(x)
    lora.fast = False
    torch.testing.assert_close(lora(x), y)


def test_a_layer_with_hooks_is_called():
    lora = layer(frozen_linear())
    x = torch.randn(4, 32)
    y = lora(x)
    lora.base.register_forward_hook(lambda module, inputs, output: output + 1)
    torch.testing.assert_close(lora(x), y + 1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_an_unfrozen_base_gets_its_gradient(dropout):
    lora = layer(nn.Linear(6, 5, dtype=torch.float64), dropout=dropout, dtype=torch.float64)

    def output(x, weight):
        torch.manual_seed(0)
        return torch.func.functional_call(lora, {"base.weight": weight}, (x,))

    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(output, (x, lora.base.weight.detach().requires_grad_()))


def test_what_the_wrapper_lacks_the_base_answers():
    lora = layer(frozen_linear())
    assert lora.weight is lora.base.weight and lora.in_features == 32
    with pytest.raises(AttributeError, match="no attribute 'out_of_the_blue'"):
        _ = lora.out_of_the_blue


def test_training_mode_of_the_base_is_kept():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.Dropout())})
    model["head"][1].eval()
    adapter = attach(model, LoRA(targets=("proj",), modules_to_save=("head",)))
    assert [m.training for m in adapter.parts["head"].base] == [True, False]
    assert [m.training for m in adapter.parts["head"].copy] == [True, False]


# ------------------------------------------------------------------------------------------------- bytes and dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_saved_for_backward(kind, dtype):
    base = Conv1D(24, 32) if kind == "conv1d" else nn.Linear(32, 24, bias=kind == "linear")
    base = base.to(dtype).requires_grad_(False)
    x = torch.randn(40, 32, dtype=dtype, requires_grad=True)
    lora = layer(base).train()
    assert saved_bytes(lambda: lora(x), exclude=[lora, x]) == 0
    lora = layer(base, dropout=0.1).train()
    assert saved_bytes(lambda: lora(x), exclude=[lora, x]) == x.numel()  # the mask, one byte an element


class Created(TorchDispatchMode):
    """Collects (dtype, numel) of every tensor that an operation returns, in the backward pass too."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.seen |= {(t.dtype, t.numel()) for t in tree_leaves(output) if isinstance(t, torch.Tensor)}
        return output


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_base_makes_no_float32_copy_of_x(dtype, dropout):
    lora = layer(frozen_linear(dtype=dtype), dtype=torch.float32, dropout=dropout).train()
    x = torch.randn(200, 32, dtype=dtype, requires_grad=True)
    with Created() as created:
        lora(x).sum().backward()
    largest = max(numel for seen, numel in created.seen if seen == torch.float32)
    assert largest == lora.A.numel()  # the gradient of A, in A's dtype
    assert x.grad.dtype == dtype and lora.A.grad.dtype == lora.B.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_base_gets_float32_adapters(dtype):
    model = small_model("llama", dtype)
    adapter = attach(model, LoRA(r=2, init="random_b"))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    output = logits(model)
    assert output.dtype == dtype
    backward(output)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in adapter.parameters())
    adapter.detach()
    adapter = attach(model, LoRA(r=2, dtype=dtype))
    assert {p.dtype for p in adapter.parameters()} == {dtype}


def test_float64_base_gets_float64_adapters():
    model = small_model("gpt2", torch.float64)
    adapter = attach(model, LoRA(r=2, init="random_b"))
    assert {p.dtype for p in adapter.parameters()} == {torch.float64} and logits(model).dtype == torch.float64


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("hooked", [False, True])  # the second: the path that calls the base layer
def test_autocast(dropout, hooked):
    lora = layer(frozen_linear(), dropout=dropout).train()
    if hooked:
        lora.base.register_forward_hook(lambda module, inputs, output: None)
    x = torch.randn(16, 32, requires_grad=True)
    torch.manual_seed(0)
    expected = lora(x)
    grads = torch.autograd.grad(expected.sum(), (x, lora.A, lora.B))
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.03)
    y.sum().backward()
    for tensor, grad in zip((x, lora.A, lora.B), grads, strict=True):
        assert tensor.grad.dtype == torch.float32
        torch.testing.assert_close(tensor.grad, grad, rtol=0.03, atol=0.03 * grad.abs().max().item())


# ------------------------------------------------------------------------------------------------- in a model


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its successor is not in 5.0
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_gradient_checkpointing_changes_nothing(architecture):
    grads = []
    for checkpointed in (False, True):
        model = small_model(architecture).train()
        torch.manual_seed(0)
        adapter = attach(model, LoRA(r=2, dropout=0.3, init="random_b"))
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)
        backward(logits(model))
        grads.append([p.grad for p in adapter.parameters()])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=3e-5 * plain.abs().max().item())


def test_compiled_model_agrees():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    adapter = attach(model, LoRA(r=2, targets="all-linear", init="random_b"))
    x = torch.randn(8, 16)
    results = []
    # Traced forward and backward as for any backend, then run without generating C++: that would take a minute.
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), adapter.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


def test_config_is_kept_in_one_form_and_can_be_copied():
    names = {"targets": ["b", "a"], "exclude": {"d", "c"}, "modules_to_save": "head"}
    config = LoRA(**names, layers=range(2), rank_pattern={"a": 4})
    assert config.targets == ("b", "a") and config.layers == (0, 1) and config.exclude == ("c", "d")
    assert config.modules_to_save == ("head",)
    assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config))
    with pytest.raises(AttributeError):
        config.r = 4
