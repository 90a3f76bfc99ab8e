"""AdaLoRA by hand: its equations, and the allocator that follows the optimizer whether anyone thinks of it or not."""

import copy
import gc

import pytest
import torch
from small_models import batch, bits, logits, move, names, output, same_bits, small_model
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from utils import AdaLoRA, LoRA, adapters, attach, load_adapter, train
from utils.checkpoint import STATE, WEIGHTS, file_tensors
from utils.measure import saved_bytes
from utils.methods.adalora import (
    AdaLoRALinear,
    adalora_budget,
    adalora_delta,
    adalora_forward,
    adalora_mask,
    adalora_scale,
    adalora_sensitivity,
    gram_distance,
    orthogonality,
    triplet_importance,
)
from utils.methods.adalora_allocator import WATCHING, GramDistances, regulariser

# d_in 3, d_out 2, r 2: triplet 1 sends input 2 to output 2, tenfold; triplet 2 is switched off. alpha / r_init is 2.
W = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
A = torch.tensor([[0.0, 1, 0], [1, 0, 0]])
E = torch.tensor([[10.0], [0]])
B = torch.tensor([[0.0, 1], [1, 1]])
X = torch.tensor([5.0, 7, 11])


# ------------------------------------------------------------------------------------------------- the equations


def near(values):
    return pytest.approx(values, rel=1e-5)  # of 1e-5 beside the rank, and of float32


def test_delta_and_forward_by_hand():
    assert adalora_scale(8, 4) == near(2) and adalora_scale(8, 4) != 2
    assert adalora_delta(A, E, B, alpha=8, r_init=4).tolist() == [[0, 0, 0], near([0, 20, 0])]
    assert adalora_forward(X, W, A, E, B, alpha=8, r_init=4).tolist() == near([5, 11 + 2 * 10 * 7])


def test_scale_keeps_the_rank_of_the_start():
    one = adalora_delta(A[:1], E[:1], B[:, :1], alpha=8, r_init=4)
    assert torch.equal(one, adalora_delta(A, E, B, alpha=8, r_init=4))  # the pruned triplet counts in neither


def test_budget_sequence():
    """24 triplets to 12, 2 steps before and 3 after: 12 + 12 (1 - (t - 2) / 15)^3. As PEFT's, measured."""
    found = [adalora_budget(t, 24, 12, tinit=2, tfinal=3, total_steps=20) for t in range(23)]
    assert found == [24, 24, 24, 21, 19, 18, 16, 15, 14, 13, 13, 12, 12, *10 * [12]]
    assert all(type(b) is int for b in found)
    assert [adalora_budget(t, 8, 8, 0, 0, 4) for t in range(6)] == 6 * [8]
    assert [adalora_budget(t, 8, 4, 0, 0, 1) for t in range(3)] == [8, 4, 4]


def test_sensitivity_by_hand():
    # I = |2 x -3| = 6    I_bar = 0.5 x 2 + 0.5 x 6 = 4    U_bar = 0.75 x 4 + 0.25 |6 - 4| = 3.5, with the new I_bar
    p, grad, I_bar, U_bar = (torch.tensor([v]) for v in (2.0, -3.0, 2.0, 4.0))
    found = adalora_sensitivity(p, grad, I_bar, U_bar, beta1=0.5, beta2=0.75)
    assert [t.item() for t in found] == [4, 3.5]
    assert I_bar.item() == 2 and U_bar.item() == 4


def test_importance_by_hand():
    score_A = torch.tensor([[1.0, 2, 3], [4, 5, 6]])  # means of rows: 2, 5
    score_B = torch.tensor([[10.0, 20], [30, 40]])  # means of columns: 20, 30
    assert triplet_importance(score_A, torch.tensor([[100.0], [200]]), score_B).tolist() == [122, 235]


@pytest.mark.parametrize(
    "budget, kept", [(0, ""), (1, "d"), (2, "bd"), (3, "abd"), (4, "abcd"), (9, "abcd")], ids=lambda v: str(v) or "none"
)
def test_mask_keeps_exactly_the_budget_and_of_equal_ones_the_earlier(budget, kept):
    """a and c are equal: pruning up to the k-th smallest value, as PEFT does, would take both when asked for one."""
    mask = adalora_mask(torch.tensor([1.0, 2, 1, 3]), budget)
    assert "".join(n for n, m in zip("abcd", mask.tolist(), strict=True) if m) == kept


def test_mask_of_all_equal_ones():
    assert adalora_mask(torch.zeros(40), 25).tolist() == 25 * [True] + 15 * [False]


def test_orthogonality_by_hand():
    assert orthogonality(torch.eye(2, 5), torch.eye(4, 2)).item() == 0
    # A A^T - I = diag(3, 8), its norm sqrt(73); B^T B - I = 0
    a = torch.tensor([[2.0, 0, 0], [0, 3, 0]])
    assert orthogonality(a, torch.eye(4, 2)).item() == pytest.approx(73**0.5 / 2)
    assert orthogonality(torch.zeros(3, 7), torch.zeros(7, 3)).item() == pytest.approx(3**0.5)
    assert orthogonality(torch.zeros(0, 7), torch.zeros(7, 0)).item() == 0


def test_gram_distances_and_their_gradient():
    g = torch.Generator().manual_seed(0)
    many = [torch.randn(3, 5, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    found = GramDistances.apply(*many)
    expected = sum(gram_distance(m) for m in many)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, many), torch.autograd.grad(expected, many))
    assert torch.autograd.gradcheck(GramDistances.apply, many)
    assert torch.autograd.gradgradcheck(GramDistances.apply, many)


@pytest.mark.parametrize("off", [0.0, 1e-30, 1e-6])
def test_gradient_near_orthonormal_rows_is_finite(off):
    m = (torch.eye(3, 5) + off).requires_grad_()
    (grad,) = torch.autograd.grad(GramDistances.apply(m), m)
    assert torch.isfinite(grad).all() and grad.abs().max() < 3
    assert off == 1e-6 or not grad.any()


# ------------------------------------------------------------------------------------------------- the layer


def test_linear_by_hand():
    base = nn.Linear(3, 2)
    layer = AdaLoRALinear(base, r=2, r_init=4, alpha=8)
    values = {base.weight: W, base.bias: torch.tensor([100.0, 200]), layer.A: A, layer.E: E, layer.B: B}
    with torch.no_grad():
        for parameter, value in values.items():
            parameter.copy_(value)
    assert layer(X).tolist() == near([105, 211 + 140])
    assert layer.merged_tensors()["weight"].tolist() == [[1, 0, 0], near([0, 20, 1])]
    layer.active = False
    assert layer(X).tolist() == [105, 211]


def test_starts_as_the_base_with_small_normal_numbers():
    layer = AdaLoRALinear(nn.Linear(1000, 600), r=20, r_init=20, alpha=8)
    assert layer.A.std().item() == pytest.approx(0.02, rel=0.02) == layer.B.std().item()
    assert not layer.E.any()
    x = torch.randn(3, 1000)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert layer.E.grad.all() and not layer.A.grad.any() and not layer.B.grad.any()


@pytest.mark.parametrize("dropout, kept_for_mask", [(0.0, 0), (0.1, 40 * 32)])
def test_saved_for_backward_is_no_copy_of_x(dropout, kept_for_mask):
    layer = AdaLoRALinear(nn.Linear(32, 24).requires_grad_(False), 4, 4, 8, dropout).train()
    x = torch.randn(40, 32, requires_grad=True)
    assert saved_bytes(lambda: layer(x), exclude=[layer, x]) == 4 * layer.A.numel() + kept_for_mask  # E * A, and a mask


def test_a_layer_of_rank_0_is_the_base():
    layer = AdaLoRALinear(nn.Linear(6, 5), r=0, r_init=4, alpha=8)
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(layer.merged_tensors()["weight"], layer.base.weight)


# ------------------------------------------------------------------------------------------------- the allocator


def adapted(architecture="llama_gqa", name="default", seed=0, **settings):
    """A small model with AdaLoRA on four layers of rank 4 (16 triplets, 8 in the end), all numbers moved."""
    torch.manual_seed(seed)
    model = small_model(architecture).train()
    common = {"init_r": 4, "target_r": 2, "total_steps": 8, "init": "random_e"}
    adapter = attach(model, AdaLoRA(**common | {"targets": names(architecture).attention} | settings), name)
    move(adapter)
    return model, adapter


def loss_of(model):
    inputs = batch(model)
    return model(**inputs, labels=inputs["input_ids"]).loss


def live(adapter):
    """How many triplets have a singular value."""
    return sum((layer.E != 0).sum().item() for layer in allocator(adapter).layers.values())


def allocator(adapter):
    return adapter.parts[""]


def steps(model, optimizer, count):
    for _ in range(count):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()


def sgd(adapter, lr=0.1):
    return torch.optim.SGD(adapter.parameters(), lr=lr)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "groups": lambda p: torch.optim.AdamW([{"params": p[::2]}, {"params": p[1::2], "lr": 0.1}]),
}


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_plain_loop_allocates(build):
    model, adapter = adapted(tinit=2, tfinal=3)
    optimizer = build(adapter.parameters())
    found = []
    for _ in range(11):  # three more than were announced: the ranks stay
        steps(model, optimizer, 1)
        found.append(live(adapter))
    assert found == [adalora_budget(t, 16, 8, 2, 3, 8) for t in range(1, 12)]
    assert found == [16, 16, 10, 8, 8, 8, 8, 8, 8, 8, 8]
    assert allocator(adapter).finished and allocator(adapter).averages == {}


def test_follows_the_equations():
    """Three steps of SGD, computed beside it from the pure functions."""
    model, adapter = adapted(beta1=0.7, beta2=0.6)
    optimizer = sgd(adapter)
    params = dict(adapter.named_parameters())
    averages = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in params.items()}
    for t in (1, 2, 3):
        before = {n: p.detach().clone() for n, p in params.items()}
        loss_of(model).backward()
        optimizer.step()
        moved = {n: before[n] - 0.1 * p.grad for n, p in params.items()}  # p after the step, its gradient before
        averages = {n: adalora_sensitivity(moved[n], p.grad, *averages[n], 0.7, 0.6) for n, p in params.items()}
        optimizer.zero_grad()
        scores = {n: I_bar * U_bar for n, (I_bar, U_bar) in averages.items()}
        layers = [n.removesuffix("lora_E") for n in params if n.endswith("lora_E")]
        importance = [triplet_importance(*(scores[layer + key] for key in ("lora_A", "lora_E", "lora_B")))
                      for layer in layers]  # fmt: skip
        mask = adalora_mask(torch.cat(importance), adalora_budget(t, 16, 8, 0, 0, 8)).view(4, 4)
        for layer, keep in zip(layers, mask, strict=True):
            torch.testing.assert_close(params[layer + "lora_E"][:, 0], moved[layer + "lora_E"][:, 0] * keep)
            torch.testing.assert_close(params[layer + "lora_A"], moved[layer + "lora_A"])


def test_a_pruned_triplet_may_come_back_before_the_end_and_not_after():
    model, adapter = adapted(total_steps=6, delta_t=3)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01)
    found = []
    for _ in range(9):
        steps(model, optimizer, 1)
        found.append(live(adapter))
    assert found == [16, 16, 9, 16, 16, 8, 8, 8, 8]


def test_accumulated_gradients_are_one_step():
    model, adapter = adapted()
    optimizer = sgd(adapter)
    for _ in range(2):
        for _ in range(3):
            loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert allocator(adapter).step == 2


def test_a_step_that_has_no_gradients_is_none():
    model, adapter = adapted()
    optimizer = sgd(adapter)
    optimizer.step()
    assert allocator(adapter).step == 0


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused):
    model, adapter = adapted()
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    counts = []
    for factor in (1.0, float("inf"), 1.0):
        scaler.scale(factor * loss_of(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        counts.append(allocator(adapter).step)
    assert counts == [1, 1, 2]
    assert all(torch.isfinite(I_bar).all() for I_bar, _ in allocator(adapter).averages.values())


def test_two_optimizers_that_share_the_adapter_make_one_step():
    model, adapter = adapted()
    params = adapter.parameters()
    first, second = (torch.optim.SGD(half, lr=0.1) for half in (params[:6], params[6:]))
    for _ in range(2):
        loss_of(model).backward()
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()
    assert allocator(adapter).step == 2


def test_other_optimizers_are_none_of_its_business():
    model, adapter = adapted()
    other = nn.Linear(3, 3)
    stranger = torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(model).backward()
    other(torch.ones(3)).sum().backward()
    stranger.step()
    assert allocator(adapter).step == 0


def test_of_two_adapters_the_active_one_is_counted():
    model, first = adapted()
    second = attach(model, first.config, "second")
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1)
    steps(model, optimizer, 2)
    first.activate()
    steps(model, optimizer, 1)
    assert [allocator(a).step for a in (first, second)] == [1, 2]
    second.detach()
    steps(model, optimizer, 1)
    assert allocator(first).step == 2 and second.parts[""] not in WATCHING


def test_a_copy_of_the_model_has_its_own_allocator():
    model, adapter = adapted()
    steps(model, sgd(adapter), 1)
    twin = copy.deepcopy(model)
    other = adapters(twin)["default"]
    steps(twin, sgd(other), 2)
    assert [allocator(a).step for a in (adapter, other)] == [1, 3]
    steps(model, sgd(adapter), 2)
    assert same_bits(bits(model), bits(twin))
    assert all(a is b for a, b in zip(allocator(other).layers.values(), other.parts.values(), strict=False))


def test_detached_or_gone_it_follows_no_one():
    model, adapter = adapted()
    part = allocator(adapter)
    assert part in WATCHING
    optimizer = sgd(adapter)
    loss_of(model).backward()
    adapter.detach()
    optimizer.step()
    assert part.step == 0 and part not in WATCHING
    model, adapter = adapted()
    count = len(WATCHING)
    del model, adapter
    gc.collect()
    assert len(WATCHING) < count


def test_a_layer_without_gradient_has_no_sensitivity():
    """Half of the layers take no part in the loss: their triplets go first."""
    model = nn.ModuleDict({"used": nn.Linear(6, 6), "unused": nn.Linear(6, 6)})
    adapter = attach(model, AdaLoRA(total_steps=1, init_r=4, target_r=2, targets=("used", "unused"), init="random_e"))
    optimizer = sgd(adapter)
    model["used"](torch.randn(5, 6)).square().sum().backward()
    optimizer.step()
    assert [adapter.parts[n].rank for n in ("used", "unused")] == [4, 0]


def test_where_nothing_is_to_be_pruned_nothing_is():
    model, adapter = adapted(target_r=4)
    steps(model, sgd(adapter), 9)
    assert live(adapter) == 16 and allocator(adapter).finished


def test_report_shows_the_ranks():
    model, adapter = adapted()
    assert "step 0 of 8: 16 of 16 triplets live, 8 in the end" in str(adapter)
    assert str(adapter).count("rank 4 of 4") == 2
    steps(model, sgd(adapter), 8)
    assert "step 8 of 8: 8 of 16 triplets live, 8 in the end" in str(adapter)
    ranks = [layer.rank for layer in allocator(adapter).layers.values()]
    assert sum(ranks) == 8 and all(f"rank {r} of 4" in str(adapter) for r in ranks)


# ------------------------------------------------------------------------------------------------- the regulariser


def test_loss_has_the_regulariser_in_training_only():
    model, adapter = adapted(orth_weight=0.5)
    with torch.no_grad():
        trained, plain = loss_of(model), loss_of(model.eval())
        layers = allocator(adapter).layers.values()
        expected = sum(orthogonality(layer.A, layer.B) for layer in layers) / 4
        torch.testing.assert_close(regulariser(adapter), 0.5 * expected)
        torch.testing.assert_close(trained, plain + 0.5 * expected)
        model.train()
        inputs = batch(model)
        as_tuple = model(**inputs, labels=inputs["input_ids"], return_dict=False)[0]
        assert torch.equal(as_tuple, trained)
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)  # no labels, no loss
        with adapter.disabled():
            assert loss_of(model) < trained
        adapter.merge()
        torch.testing.assert_close(loss_of(model), plain)


def test_regulariser_is_float32_under_autocast():
    _, adapter = adapted()
    expected = regulariser(adapter)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(regulariser(adapter), expected)


def test_without_weight_the_loss_is_the_models():
    model, _ = adapted(orth_weight=0)
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(model.eval()))


def test_gradient_of_the_whole_loss_is_autograds():
    model, adapter = adapted()
    found = torch.autograd.grad(loss_of(model), adapter.parameters())
    inputs = batch(model)
    plain = model.eval()(**inputs, labels=inputs["input_ids"]).loss
    layers = allocator(adapter).layers.values()
    slow = plain + 0.5 * sum(orthogonality(layer.A, layer.B) for layer in layers) / 4
    expected = torch.autograd.grad(slow, adapter.parameters())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * max(1, b.abs().max().item()))


def test_checkpointed_loss_is_the_same():
    model, adapter = adapted()
    expected = loss_of(model)
    grads = torch.autograd.grad(expected, adapter.parameters())
    model.gradient_checkpointing_enable()
    found = loss_of(model)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, adapter.parameters()), grads, rtol=1e-4, atol=1e-5)


class Tiny(nn.Module):
    """Two layers and a loss."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return CausalLMOutput(loss=(self.down(self.up(x).tanh()) - x).square().mean())


def test_compiled_loss_is_the_same():
    torch._dynamo.reset()
    model = Tiny().train()
    adapter = attach(model, AdaLoRA(total_steps=3, init_r=4, target_r=2, targets=("up", "down"), init="random_e"))
    x = torch.randn(5, 6)
    results = []
    for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        loss = run(x).loss
        results.append((loss, *torch.autograd.grad(loss, adapter.parameters())))
    torch.testing.assert_close(*results)
    assert results[0][0] > 0.5 * allocator(adapter).regulariser() > 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapters_in_half_precision_are_averaged_in_float32(dtype):
    model, adapter = adapted(dtype=dtype)
    loss = loss_of(model)
    loss.backward()
    assert all(p.dtype == dtype and torch.isfinite(p.grad).all() for p in adapter.parameters())
    sgd(adapter).step()
    assert {t.dtype for pair in allocator(adapter).averages.values() for t in pair} == {torch.float32}


# ------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("stop", [0, 1, 3, 5, 6, 9])
def test_saved_at_any_step_it_goes_on_as_if_nothing_had_been(stop, tmp_path):
    """Plain SGD keeps nothing itself, so that all that matters must be in the two files and the state."""
    schedule = {"tinit": 1, "tfinal": 2, "delta_t": 2}
    model, adapter = adapted(**schedule)
    steps(model, sgd(adapter), stop)
    adapter.save(tmp_path)
    fresh = small_model("llama_gqa").train()
    loaded = load_adapter(fresh, tmp_path)
    finished = stop >= 6
    assert (tmp_path / STATE).exists() is not finished
    assert sum(layer.r for layer in allocator(loaded).layers.values()) == (8 if finished else 16)
    torch.testing.assert_close(output(fresh.eval()), output(model.eval()), rtol=0, atol=1e-5)
    if finished:
        assert "8 triplets, their number final" in str(loaded)
        loaded.save(tmp_path / "again")
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
        steps(fresh.train(), sgd(loaded), 1)
        assert live(loaded) == 8
        return
    steps(model.train(), sgd(adapter), 9 - stop)
    steps(fresh.train(), sgd(loaded), 9 - stop)
    assert allocator(loaded).step == 9
    assert same_bits(file_tensors(loaded), file_tensors(adapter))


def test_without_the_state_the_schedule_begins_anew(tmp_path):
    model, adapter = adapted()
    steps(model, sgd(adapter), 3)
    adapter.save(tmp_path)
    (tmp_path / STATE).unlink()
    loaded = load_adapter(small_model("llama_gqa"), tmp_path)
    assert allocator(loaded).step == 0
    assert same_bits(file_tensors(loaded), file_tensors(adapter))


class Rows:
    """What `train` needs: rows, and a collate that makes a batch of them."""

    rows = list(range(20))

    @staticmethod
    def collate(rows):
        g = torch.Generator().manual_seed(sum(rows))
        ids = torch.randint(3, 64, (len(rows), 9), generator=g)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@pytest.mark.parametrize("stop", [2, 5, 8])
def test_the_training_loop_allocates_and_resumes_to_equal_numbers(stop, tmp_path):
    options = {"batch_size": 4, "lr": 0.02, "warmup": 0, "schedule": "constant", "log_every": 1, "quiet": True}
    schedule = {"total_steps": 9, "tfinal": 2, "delta_t": 2, "dropout": 0.2}

    def run(count, **more):
        model, adapter = adapted(**schedule)
        history = train(model, Rows.rows, Rows.collate, params=adapter.parameters(), steps=count, **options, **more)
        return adapter, history

    expected, losses = run(9, accumulate=2)
    assert allocator(expected).step == 9 and live(expected) == 8
    run(stop, accumulate=2, save_to=tmp_path / "state.pt")
    found, history = run(9, accumulate=2, save_to=tmp_path / "state.pt", resume=True)
    assert history.loss == losses.loss
    assert same_bits(file_tensors(found), file_tensors(expected))
    model = small_model("llama_gqa")
    other = attach(model, LoRA(r=4, targets=("q_proj", "v_proj")))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(model, Rows.rows, Rows.collate, params=other.parameters(), steps=9, accumulate=2, resume=True,
              save_to=tmp_path / "state.pt", **options)  # fmt: skip


# ------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "total_steps is missing: the schedule needs the number of optimizer steps"),
        ({"total_steps": 0}, "total_steps is 0; it must be a whole number from 1 up"),
        ({"total_steps": True}, "total_steps is True"),
        ({"init_r": 0}, "the rank is 0"),
        ({"target_r": 2.5}, "the rank is 2.5"),
        ({"init_r": 4, "target_r": 5}, "target_r is 5, above init_r, 4: ranks only go down"),
        ({"tinit": -1}, "tinit is -1; it must be a whole number from 0 up"),
        ({"tfinal": 1.5}, "tfinal is 1.5"),
        ({"delta_t": 0}, "delta_t is 0; it must be a whole number from 1 up"),
        ({"tinit": 6, "tfinal": 4}, "tinit=6 and tfinal=4 leave none of the 10 steps to prune in"),
        ({"beta1": 1}, "beta1 is 1; it is a probability"),
        ({"beta2": 0}, "beta2 is 0; it must be a positive number"),
        ({"orth_weight": -0.1}, "orth_weight is -0.1; it must be a positive number"),
        ({"alpha": 0}, "alpha is 0"),
        ({"dropout": 1}, "dropout is 1"),
        ({"init": "svd"}, "init is 'svd'; it can be 'zero_e', 'random_e'"),
        ({"bias": "some"}, "bias is 'some'"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"targets": ()}, "targets is empty"),
        ({"rank_pattern": {"q_proj": 13}}, "rank_pattern has a rank of 13, above init_r, 12"),
        ({"rank_pattern": {"q_proj": -1}}, "a rank of rank_pattern is -1"),
    ],
    ids=lambda v: "-".join(v) or "nothing" if isinstance(v, dict) else "",
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaLoRA(**({"total_steps": 10} | settings if settings else {}))


def test_bad_targets_leave_the_model_as_it_was():
    model = small_model("llama")
    before = bits(model)
    for settings, message in (
        ({"targets": ("embed_tokens",)}, "model.embed_tokens: AdaLoRA adapts nn.Linear and Conv1D, not Embedding"),
        ({"rank_pattern": {"no_proj": 2}}, "no adapted module fits the pattern 'no_proj'"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(model, AdaLoRA(total_steps=3, **settings))
    assert same_bits(bits(model), before) and not adapters(model) and not hasattr(model, "guest0")


def test_a_finished_config_can_be_made_by_hand():
    model = small_model("llama").train()
    pattern = {r".*\.0\..*": 0, r".*\.1\.self_attn\.q_proj": 3}
    adapter = attach(model, AdaLoRA(total_steps=3, init_r=4, rank_pattern=pattern, target_r=2, init="random_e"))
    assert [p.shape[0] for n, p in adapter.named_parameters() if n.endswith("lora_E")] == [0, 0, 3, 4]
    base = logits(model)
    steps(model, torch.optim.AdamW(adapter.parameters(), lr=0.1), 2)  # empty tensors are no trouble
    assert not torch.equal(logits(model), base) and live(adapter) == 7
