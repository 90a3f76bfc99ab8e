"""DoRA by hand: its equations, zero rows, its gradients against autograd's, and a norm that is never out of date."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from small_models import move, output, small_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from utils import DoRA, attach, load_adapter
from utils.measure import saved_by_shape
from utils.methods import dora
from utils.methods.dora import (
    DoRAEmbedding,
    DoRAFunction,
    DoRALinear,
    column_dots,
    dora_forward,
    dora_gain,
    dora_magnitude,
    dora_merge,
    dora_norm,
    dora_num_params,
    dora_weight,
    scale_columns,
)
from utils.methods.lora import dropout_mask, lora_delta

# d_in 2, d_out 2, r 1, alpha / r is 2. W + 2 B A has the rows (3, 4) and (0, 2), of lengths 5 and 2.
W = torch.tensor([[3.0, 0], [0, 2]])
A = torch.tensor([[0.0, 1]])
B = torch.tensor([[2.0], [0]])
M = torch.tensor([10.0, 2])
X = torch.tensor([1.0, 10])


def random_dora(d_in=6, d_out=5, r=2, n=7, dtype=torch.float64, seed=0):
    """x (n, d_in), W, bias, A, B, m, all random, of which only W needs no gradient."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    x, bias, a, b, m = (
        t.requires_grad_() for t in (draw(n, d_in), draw(d_out), draw(r, d_in), draw(d_out, r), draw(d_out))
    )
    return x, draw(d_out, d_in), bias, a, b, m


def layer(base, **options):
    """A DoRALinear with B not zero and magnitudes that are not the norms."""
    part = DoRALinear(base, **{"r": 2, "alpha": 4, "init": "random_b"} | options)
    with torch.no_grad():
        part.m.mul_(torch.linspace(0.5, 1.5, len(part.m)))
    return part


def frozen_linear(d_in=32, d_out=24, bias=True, dtype=None):
    return nn.Linear(d_in, d_out, bias=bias, dtype=dtype).requires_grad_(False)


# ------------------------------------------------------------------------------------------------- the equations


def test_by_hand():
    assert dora_magnitude(W + lora_delta(A, B, alpha=2)).tolist() == [5, 2]
    assert dora_norm(W, A, B, scale=2).tolist() == [5, 2]
    assert dora_gain(M, torch.tensor([5.0, 2])).tolist() == [2, 1]
    assert dora_weight(W, A, B, 2, M).tolist() == [[6, 8], [0, 2]]
    assert dora_forward(X, W, A, B, 2, M).tolist() == [2 * 43, 20]
    assert dora_forward(X, W, A, B, 2, M, bias=torch.tensor([1.0, 2])).tolist() == [87, 22]  # the bias is not scaled
    assert dora_merge(W, A, B, 2, M).tolist() == [[6, 8], [0, 2]]


def test_number_of_parameters():
    assert dora_num_params([(2, 3)], r=1) == 5 + 2
    llama_2_7b = 32 * [(4096, 4096), (4096, 4096)]  # q and v of 32 layers
    assert dora_num_params(llama_2_7b, r=8) == 4_194_304 + 64 * 4096


def test_magnitude_is_by_row_of_the_linear_layers_weight():
    assert dora_magnitude(torch.tensor([[3.0, 4, 0], [0, 0, 2]])).tolist() == [5, 2]


@pytest.mark.parametrize("shape", [(5, 6, 2), (6, 5, 1), (3, 40, 8), (2050, 3, 4)], ids=str)
def test_norm_without_forming_b_a(shape):
    d_out, d_in, r = shape
    _, w, _, a, b, _ = random_dora(d_in, d_out, r)
    naive = dora_magnitude(w + 1.5 * b @ a).detach()
    torch.testing.assert_close(dora_norm(w, a, b, 1.5), naive, rtol=1e-12, atol=0)
    torch.testing.assert_close(dora_norm(w, a, b, 1.5, w_sq=w.square().sum(1)), naive, rtol=1e-12, atol=0)
    single = dora_norm(*(t.detach().float() for t in (w, a, b)), 1.5)
    torch.testing.assert_close(single.double(), naive, rtol=1e-5, atol=0)


def test_norm_of_half_precision_is_taken_in_single():
    _, w, _, a, b, _ = random_dora(d_in=64)
    w = w.bfloat16()
    found = dora_norm(w, a.float(), b.float(), 1.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dora_magnitude(w.double() + 1.5 * b @ a), rtol=1e-5, atol=0)


def test_rows_that_cancel_have_a_norm_of_nearly_zero_and_never_nan():
    _, w, _, _, _, _ = random_dora(d_in=3, d_out=400, dtype=torch.float32)
    found = dora_norm(w, torch.eye(3), -w, scale=1.0)  # W - W: rounding makes about half of the squares negative
    assert found.isfinite().all() and (found < 0.01).all() and (found == 0).any()


def test_norm_is_a_constant_for_the_gradient():
    x, w, bias, a, b, m = random_dora()
    fixed = dora_magnitude(w + 1.5 * b @ a).detach()
    expected = (m / fixed) * (x @ (w + 1.5 * b @ a).T) + bias
    y = dora_forward(x, w, a, b, 3.0, m, bias)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(x @ dora_weight(w, a, b, 3.0, m).T + bias, expected)
    grad = torch.randn_like(y)
    inputs = (x, a, b, m, bias)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_zero_rows_keep_their_gain_of_one_and_learn():
    """Rows of W that are zero (Llama-3.1-8B's o_proj has some): identity at the start, B learns first, m next."""
    base = frozen_linear(4, 3, dtype=torch.float64)
    with torch.no_grad():
        base.weight[1] = 0
    part = DoRALinear(base, r=2, alpha=2, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(part(x), base(x))
    part(x).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, part.A, part.B, part.m))
    assert part.m[1] == 0 and part.m.grad[1] == 0 and part.B.grad[1].any()  # y = B A x there, whatever m is
    with torch.no_grad():
        part.B -= 0.1 * part.B.grad
    part.zero_grad()
    part(x).square().sum().backward()  # the row has a direction now; its magnitude is still 0
    assert not part(x)[:, 1].detach().sub(base.bias[1]).any() and part.m.grad[1] != 0
    assert part.merged_tensors()["weight"].isfinite().all()


def test_gain_near_one_is_not_rounded_to_half_precision():
    t = torch.full((1, 1), 192.0, dtype=torch.bfloat16)  # whole numbers from 128 to 256
    gain = torch.tensor([1.0059])
    assert (t * gain.bfloat16()).item() == 194  # 1.0059 became 1.0078
    assert scale_columns(t, gain).item() == 193  # of 193.13
    assert scale_columns(t, torch.tensor([1.0])).item() == 192


def test_column_dots():
    a, b = torch.randn(3000, 5, dtype=torch.float64), torch.randn(3000, 5, dtype=torch.float64)
    torch.testing.assert_close(column_dots(a, b, torch.float64), (a * b).sum(0))
    assert column_dots(a[:0], b[:0], torch.float64).tolist() == [0] * 5
    large = torch.full((2, 1), 1000.0, dtype=torch.float16)
    assert column_dots(large, large, torch.float32).item() == 2e6  # in float16 it would be infinite


# ------------------------------------------------------------------------------------------------- the gradients


CASES = [(None, True), ("mask", True), ("mask", False)]


@pytest.mark.parametrize("masked, whole", CASES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("base_trained", [False, True])
def test_function_passes_gradcheck(masked, whole, biased, base_trained):
    x, w, bias, a, b, gain = random_dora(n=3)
    w.requires_grad_(base_trained)  # an unfrozen base must not lose its gradient in silence
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.7 if masked else None
    inputs = (x, w, bias if biased else None, a, b, gain, 1.5, mask, 0.7 if masked else 1.0, whole)
    assert torch.autograd.gradcheck(DoRAFunction.apply, inputs)
    (dx,) = torch.autograd.grad(DoRAFunction.apply(*inputs).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):  # and no wrong answer
        dx.sum().backward()


@pytest.mark.parametrize("masked, whole", CASES)
@pytest.mark.parametrize("kind", ["vector", "no rows", "4-D", "transposed", "expanded"])
def test_function_is_the_formula_in_any_layout(kind, masked, whole):
    x, w, bias, a, b, gain = random_dora()
    x = {
        "vector": x[0],
        "no rows": x[:0],
        "4-D": x[:6].view(2, 1, 3, 6),
        "transposed": x[:6].view(3, 2, 6).transpose(0, 1),
        "expanded": x[:1].expand(4, 6),
    }[kind]
    mask = torch.rand(x.shape) < 0.7 if masked else None
    kept = x * mask / 0.7 if masked else x
    y = DoRAFunction.apply(x, w, bias, a, b, gain, 1.5, mask, 0.7 if masked else 1.0, whole)
    if whole:  # as PEFT and the authors' code write it
        expected = x @ w.T + bias + (gain - 1) * (kept @ w.T) + gain * 1.5 * (kept @ a.T @ b.T)
    else:
        expected = gain * (x @ w.T + 1.5 * kept @ a.T @ b.T) + bias
    torch.testing.assert_close(y, expected)
    inputs = (x, bias, a, b, gain)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


# ------------------------------------------------------------------------------------------------- the modules


def test_the_start_is_the_base_whatever_a_and_b_are():
    base = frozen_linear()
    x = torch.randn(4, 32)
    assert torch.equal(DoRALinear(base, 2, 4)(x), F.linear(x, base.weight) + base.bias)
    part = DoRALinear(base, 2, 4, init="random_b")  # PEFT too takes the length with B A in it
    torch.testing.assert_close(part.m, dora_magnitude(base.weight + lora_delta(part.A, part.B, 4)))


def test_linear_by_hand():
    base = nn.Linear(2, 2)
    part = DoRALinear(base, r=1, alpha=2)
    with torch.no_grad():
        for own, value in zip((base.weight, base.bias, part.A, part.B, part.m), (W, X, A, B, M), strict=True):
            own.copy_(value)
    assert part(X).tolist() == [86 + 1, 20 + 10]
    assert part.merged_tensors()["weight"].tolist() == [[6, 8], [0, 2]]
    part.active = False
    assert part(X).tolist() == [3 + 1, 20 + 10]


def test_conv1d_equals_the_linear_layer_it_is():
    linear, conv = nn.Linear(6, 9), Conv1D(9, 6)
    conv.weight, conv.bias = nn.Parameter(linear.weight.T.contiguous()), linear.bias
    first, second = layer(linear), layer(conv)
    second.A, second.B, second.m = first.A, first.B, first.m
    x = torch.randn(4, 6)
    torch.testing.assert_close(second(x), first(x))
    torch.testing.assert_close(second.merged_tensors()["weight"], first.merged_tensors()["weight"].T)


def test_embedding_by_hand():
    part = DoRAEmbedding(nn.Embedding(2, 2), r=1, alpha=2)
    with torch.no_grad():
        part.base.weight.copy_(W.T)  # as a linear layer of one-hot vectors its weight is W
        part.A.copy_(A)
        part.B.copy_(B)
        part.m.copy_(M)
    assert part(torch.tensor([0, 1])).tolist() == [[6, 0], [8, 2]]  # the columns of the adapted weight
    assert part.merged_tensors()["weight"].tolist() == [[6, 0], [8, 2]]


@pytest.mark.parametrize("dropped", ["all", "update"])
def test_dropout_in_training_only(dropped):
    part = layer(frozen_linear(), dropout=0.5)
    part.dropout_on = dropped
    plain = layer(part.base)
    plain.load_state_dict(part.state_dict())
    x = torch.randn(64, 32)
    assert torch.equal(part.eval()(x), plain.eval()(x))
    part.train()
    torch.manual_seed(3)
    y = part(x)
    torch.manual_seed(3)
    kept = 2 * dropout_mask(x, 0.5) * x  # the same draw, so the same entries
    gain, w = part.gain(), part.base.weight
    update = part.scale * kept @ part.A.T @ part.B.T
    if dropped == "all":
        torch.testing.assert_close(y, part.base(x) + (gain - 1) * (kept @ w.T) + gain * update)
    else:
        torch.testing.assert_close(y, gain * (x @ w.T + update) + part.base.bias)


@pytest.mark.parametrize("dropped", ["all", "update"])
def test_a_layer_with_hooks_is_called(dropped):
    part = layer(frozen_linear(), dropout=0.5).train()
    part.dropout_on = dropped
    x = torch.randn(8, 32)
    outputs = []
    for hook in (None, lambda module, inputs, output: output + 1):
        if hook:
            part.base.register_forward_hook(hook)
        torch.manual_seed(0)
        y = part(x)
        outputs.append([y, *torch.autograd.grad(y.square().sum(), (part.m,))])
    torch.testing.assert_close(outputs[1][0], outputs[0][0] + 1)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_plain_formula_gives_the_same_and_can_be_differentiated_twice(dropout):
    part = layer(frozen_linear(dtype=torch.float64), dropout=dropout, dtype=torch.float64).train()
    x = torch.randn(4, 32, dtype=torch.float64, requires_grad=True)
    outputs = []
    for part.fast in (True, False):
        torch.manual_seed(0)
        y = part(x)
        outputs.append(
            [y, *torch.autograd.grad(y.square().sum(), (x, part.A, part.B, part.m), create_graph=not part.fast)]
        )
    torch.testing.assert_close(outputs[1], outputs[0])
    assert torch.autograd.grad(outputs[1][1].square().sum(), part.A)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
def test_saved_for_backward(kind, dtype):
    base = Conv1D(24, 32) if kind == "conv1d" else nn.Linear(32, 24, bias=kind == "linear")
    base = base.to(dtype).requires_grad_(False)
    x = torch.randn(40, 32, dtype=dtype, requires_grad=True)
    part = layer(base, dtype=torch.float32).train()
    core = {((40, 24), dtype): 40 * 24 * dtype.itemsize}
    small = 24 * (4 + 4 + 1)  # the gain, the norm, and where it is zero
    for p, mask in ((0.0, {}), (0.1, {((40, 32), torch.int8): 40 * 32})):
        part.dropout = p
        saved = saved_by_shape(lambda: part(x), exclude=[part, x])
        assert {k: v for k, v in saved.items() if len(k[0]) == 2} == core | mask
        assert sum(saved.values()) == sum((core | mask).values()) + small


def test_magnitude_stays_single_beside_narrow_factors():
    model = small_model("llama", torch.bfloat16)
    adapter = attach(model, DoRA(r=2, dtype=torch.bfloat16))
    part = next(iter(adapter.parts.values()))
    assert part.A.dtype == torch.bfloat16 and part.m.dtype == torch.float32
    assert torch.equal(part.gain(), torch.ones_like(part.m))


@pytest.mark.parametrize("dropped", ["all", "update"])
def test_autocast(dropped):
    torch.manual_seed(0)
    part = layer(frozen_linear(), dropout=0.1).train()
    part.dropout_on = dropped
    x = torch.randn(16, 32, requires_grad=True)
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = part(x)
        results.append([y, *torch.autograd.grad(y.sum(), (x, part.A, part.B, part.m))])
    assert results[1][0].dtype == torch.bfloat16
    for found, exact in zip(results[1], results[0], strict=True):
        assert (found - exact).norm() < 0.03 * exact.norm()


def test_a_packed_weight_is_refused_and_nothing_changes():
    class Packed(nn.Linear):
        pass

    model = nn.ModuleDict({"proj": Packed(4, 4), "other": nn.Linear(4, 4)})
    model["proj"].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="proj: a Packed holds its weight packed, in a form that is not known here"):
        attach(model, DoRA(targets=("other", "proj"), dtype=torch.float32))
    assert type(model["other"]) is nn.Linear


def test_dropout_on_is_one_of_two():
    with pytest.raises(ValueError, match="dropout_on is 'base'; it can be 'all', 'update'"):
        DoRA(dropout_on="base")


# ----------------------------------------------------------------------------------- the norm is never out of date


@pytest.fixture
def counted(monkeypatch):
    """How often a norm is computed."""
    calls = []

    def counting(*args):
        calls.append(1)
        return dora_norm(*args)

    monkeypatch.setattr(dora, "dora_norm", counting)
    return calls


def true_norm(part):
    return dora_magnitude(part.dense_weight().detach() + part.scale * (part.B @ part.A).detach())


def fresh(part):
    """The norm that a forward pass uses is that of the numbers as they are."""
    torch.testing.assert_close(part.norm(), true_norm(part).to(part.norm()), rtol=1e-4, atol=1e-5)


def test_one_norm_for_all_passes_between_two_steps(counted):
    part = layer(frozen_linear())
    optimizer = torch.optim.AdamW(part.parameters(), lr=0.1)
    counted.clear()
    for step in range(2):
        for _ in range(3):  # accumulation
            part.train()(torch.randn(4, 32)).sum().backward()
        with torch.no_grad():
            part.eval()(torch.randn(4, 32))
        torch.utils.checkpoint.checkpoint(
            part, torch.randn(4, 32, requires_grad=True), use_reentrant=False
        ).sum().backward()
        assert len(counted) == step  # the first one was computed for m
        optimizer.step()
        fresh(part)


def test_what_is_remembered_has_no_graph():
    part = layer(nn.Linear(32, 24))  # not frozen yet, as `attach` finds a model
    part.norm()
    assert not part._w_sq.requires_grad and not part._norm.requires_grad


def test_m_is_no_part_of_the_norm():
    part = DoRALinear(frozen_linear(), 2, 4)
    before = part.norm().clone()
    with torch.no_grad():
        part.m.mul_(2)
    assert torch.equal(part.norm(), before) and torch.equal(part.gain(), torch.full_like(before, 2))


def by_data(part):
    part.B.data.add_(1)


def by_hand(part):
    with torch.no_grad():
        part.A -= 0.5


def by_swap(part):
    part.A.data = part.A.data + 1


def by_new_parameter(part):
    part.B = nn.Parameter(part.B.detach() * 3)


def by_base_swap(part):
    part.base.weight.data = part.base.weight.data * 2


def by_base_in_place(part):
    with torch.no_grad():
        part.base.weight.mul_(2)


def by_dtype(part):
    part.half().float()


def by_base_dtype(part):
    part.base.half().float()


def by_state_dict(part):
    part.load_state_dict({n: t + 1 for n, t in part.state_dict().items()})


def by_assigned_state_dict(part):
    part.load_state_dict({n: t + 1 for n, t in part.state_dict().items()}, assign=True)


CHANGES = [
    by_data, by_hand, by_swap, by_new_parameter, by_base_swap, by_base_in_place, by_dtype, by_base_dtype, by_state_dict,
    by_assigned_state_dict,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    part = layer(frozen_linear())
    for _ in range(3):
        part.norm()
        change(part)
        fresh(part)


def test_an_optimizer_that_writes_through_data_is_seen(monkeypatch):
    class Old(torch.optim.SGD):
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.data.sub_(p.grad)

    monkeypatch.setattr(dora.Magnitude, "_same_numbers", lambda *_: True)  # as on a GPU
    part = layer(frozen_linear())
    part(torch.randn(4, 32)).sum().backward()
    Old(part.parameters(), lr=1).step()
    fresh(part)
    part.base.weight.requires_grad_()
    part(torch.randn(4, 32)).sum().backward()
    Old(part.parameters(), lr=1).step()
    fresh(part)


def test_a_functional_call_with_other_weights():
    part = layer(frozen_linear())
    x = torch.randn(4, 32)
    for scale in (2, 3, 4):  # each time short-lived tensors, which may get the address of the last ones
        tensors = {n: t.detach() * scale for n, t in part.state_dict().items()}
        twin = copy.deepcopy(part)
        twin.load_state_dict(tensors)
        torch.testing.assert_close(torch.func.functional_call(part, tensors, (x,)), twin(x))
        del tensors, twin


def test_copies_and_pickles_have_a_norm_of_their_own():
    part = layer(frozen_linear())
    part.norm()
    file = io.BytesIO()
    torch.save(part, file)
    for twin in (copy.deepcopy(part), torch.load(io.BytesIO(file.getvalue()), weights_only=False)):
        assert twin._norm is None and torch.equal(twin.norm(), part.norm())
        by_data(twin)
        fresh(twin)
        fresh(part)


def test_inference_mode_comes_first():
    part = layer(frozen_linear())
    by_hand(part)
    with torch.inference_mode():
        part(torch.randn(4, 32))
    part(torch.randn(4, 32)).sum().backward()
    with torch.inference_mode():
        made = layer(frozen_linear())  # tensors made here have no version
        assert made(torch.randn(4, 32)).isfinite().all()


def test_merge_and_load_and_move_of_a_model(tmp_path):
    model = small_model("llama")
    adapter = attach(model, DoRA(r=2, init="random_b"))
    part = next(iter(adapter.parts.values()))
    output(model)
    adapter.merge()
    adapter.unmerge()
    fresh(part)
    adapter.merge()
    model.double()
    adapter.unmerge()
    fresh(part)
    model.float()
    move(adapter)
    adapter.save(tmp_path)
    expected = output(model)
    again = load_adapter(model, tmp_path, "again")
    torch.testing.assert_close(output(model), expected)
    move(again)
    for each in again.parts.values():
        fresh(each)
    again.detach()
    adapter.activate()
    torch.testing.assert_close(output(model), expected)


def test_on_the_meta_device_and_filled_later():
    with torch.device("meta"):
        model = nn.ModuleDict({"proj": nn.Linear(4, 4)})
    adapter = attach(model, DoRA(r=2, targets=("proj",)))
    part = adapter.parts["proj"]
    assert part.m.is_meta
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    fresh(part)


def test_compiled_training_follows_the_steps():
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        adapter = attach(model, DoRA(r=2, targets="all-linear", init="random_b"))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
        x = torch.randn(8, 16)
        losses.append([])
        for _ in range(3):
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][2] < losses[0][0]
