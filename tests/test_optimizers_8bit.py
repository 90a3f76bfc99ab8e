"""8-bit AdamW: by hand, against bitsandbytes and float32; its bytes, what it saves and loads, and what it refuses."""

import copy
import io
import logging
import math
from functools import partial

import pytest
import torch
from torch import nn

import utils.optimizers
from utils.memory.states import EIGHT_BIT_MOMENT, RECIPES
from utils.optimizers import AdamW8bit, adamw8bit_update, adamw_update, moment_codebooks, paged_adamw
from utils.quantization import blocks
from utils.quantization.blocks import dequantize_blockwise, nearest_code, quantize_blockwise
from utils.quantization.codebooks import dynamic_codebook
from utils.training import train

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it says at import that there is no GPU
bitsandbytes = pytest.importorskip("bitsandbytes")


def zeros(n):
    """The moments before the first step: any index is a zero when the scale is."""
    return torch.zeros(n, dtype=torch.uint8), torch.zeros(-(-n // 256))


def trained(build, start, grads, **settings):
    """(the parameter after a step per gradient, the optimizer)"""
    p = nn.Parameter(start.clone())
    optimizer = build([p], **settings)
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p, optimizer


def gradients(steps, shape):
    """Gradients with a lasting part of very different sizes, and noise."""
    lasting = torch.randn(shape) * 10 ** (-2 * torch.rand(shape))
    return [lasting + torch.randn(shape) / 10 for _ in range(steps)]


# ---- the update


def test_one_step_by_hand():
    """The first step is lr against the gradient, whatever its length. Of 10, 5 and 0 come the scaled m 1, 0.5 and 0,
    and the scaled v 1, 0.25 and 0. In the top decade, steps of the signed book are 0.9/64 and of the other 0.9/128:
    0.5 lies in the 29th of 64 (0.1 + 28.5 * 0.9/64 = 0.50078), 0.25 in the 22nd of 128 (0.1 + 21.5 * 0.9/128)."""
    p, grad = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, -5.0, 0.0])
    m, v = zeros(3), zeros(3)
    new, m2, v2 = adamw8bit_update(p, grad, m, v, step=1, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(new, torch.tensor([0.9, 2.1, 3.0]))
    signed, unsigned = moment_codebooks(p.device)
    torch.testing.assert_close(signed[m2[0].long()], torch.tensor([1, -(0.1 + 28.5 * 0.9 / 64), 0]))
    torch.testing.assert_close(unsigned[v2[0].long()], torch.tensor([1, 0.1 + 21.5 * 0.9 / 128, 0]))
    torch.testing.assert_close(torch.cat([m2[1], v2[1]]), torch.tensor([1.0, 0.1]))  # 0.1 * 10 and 0.001 * 10^2
    assert p.tolist() == [1, 2, 3] and not any(t.any() for t in (*m, *v))  # the arguments stay


def test_the_step_is_float32s_from_the_decoded_moments():
    torch.manual_seed(0)
    p, grad = torch.randn(20, 40), torch.randn(20, 40)
    m = quantize_blockwise(torch.randn(20, 40), dynamic_codebook(), 256)
    v = quantize_blockwise(torch.rand(20, 40), dynamic_codebook(signed=False), 256)
    new, m2, v2 = adamw8bit_update(p, grad, m, v, 7, 0.02, 0.8, 0.95, 1e-6, 0.1)
    decoded = [
        dequantize_blockwise(*m, dynamic_codebook(), 256),
        dequantize_blockwise(*v, dynamic_codebook(False), 256),
    ]
    expected = adamw_update(p, grad, *(d.view(20, 40) for d in decoded), 7, 0.02, 0.8, 0.95, 1e-6, 0.1)
    assert torch.equal(new, expected[0])
    for (index, absmax), exact, signed in ((m2, expected[1], True), (v2, expected[2], False)):
        assert index.shape == (800,) and absmax.shape == (4,) and index.dtype == torch.uint8
        assert torch.equal(absmax[0], exact.flatten()[:256].abs().max())
        back = dequantize_blockwise(index, absmax, dynamic_codebook(signed), 256).view(20, 40)
        # no number is farther from its code than half of the largest step, 0.9/64 (0.9/128) of the block's largest
        assert (back - exact).abs().max() <= 0.9 / (64 if signed else 128) / 2 * absmax.max() * 1.001


def test_a_tiny_v_becomes_zero_and_its_weight_leaps():
    """The trap in the module's docstring: 1e-4 beside 1 is 1e-8 in v, too little for the code book; in m it is kept."""
    p, grad = torch.zeros(256), torch.full((256,), 1e-4)
    grad[0] = 1.0
    p, m, v = adamw8bit_update(p, grad, zeros(256), zeros(256), step=1, lr=1e-3)
    leapt, *_ = adamw8bit_update(p, torch.zeros(256), m, v, step=2, lr=1e-3)
    exact = adamw_update(p, torch.zeros(256), 0.1 * grad, 1e-3 * grad**2, step=2, lr=1e-3)[0]
    assert exact.abs().max() < 0.01 < 0.1 < leapt[1:].abs().min()
    # a group of its own keeps float32 moments
    p = nn.Parameter(torch.zeros(256))
    optimizer = AdamW8bit([{"params": [p], "min_8bit_size": 10**9}], min_8bit_size=1)
    for p.grad in (grad, torch.zeros(256)):
        optimizer.step()
    torch.testing.assert_close(p.detach(), exact, rtol=1e-4, atol=1e-6)


# ---- bitsandbytes


def on_a_grid(values, code):
    """bitsandbytes' 8-bit encoding on a CPU: 65,536 evenly spaced values from -1 to 1 before the code book."""
    return nearest_code(torch.floor((values + 1) * 0.5 * 65535 + 0.5) * (2 / 65535) - 1, code)


def both_states(ours, theirs):
    """Pairs of index, and pairs of scales, of the one parameter of each optimizer."""
    (ours,), (theirs,) = ours.state.values(), theirs.state.values()
    index = [(ours[a], theirs[b].flatten()) for a, b in (("m", "state1"), ("v", "state2"))]
    return index, [(ours[f"{a}_absmax"], theirs[b]) for a, b in (("m", "absmax1"), ("v", "absmax2"))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(64, 64), (100, 77)], ids=["whole blocks", "a short block"])
def test_one_step_from_bitsandbytes_state(shape, dtype):
    """From identical states the new parameter is equal to float rounding, and the new indices are what bitsandbytes'
    grid makes of the very same moments. A last unit of m decides a tie now and then: 1 in 1,000."""
    torch.manual_seed(1)
    grads = [g.to(dtype) for g in gradients(6, shape)]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-7}
    start = torch.randn(shape).to(dtype)
    p, theirs = trained(bitsandbytes.optim.AdamW8bit, start, grads[:5], **settings)
    ours = AdamW8bit([copy.deepcopy(p)], **settings)
    mine = ours.param_groups[0]["params"][0]
    state = theirs.state[p]
    ours.state[mine] = {"step": state["step"], "m": state["state1"].flatten().clone(),
                        "m_absmax": state["absmax1"].clone(), "v": state["state2"].flatten().clone(),
                        "v_absmax": state["absmax2"].clone()}  # fmt: skip
    p.grad, mine.grad = grads[5].clone(), grads[5].clone()
    theirs.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "nearest_code", on_a_grid)
        ours.step()
    unit = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(mine.detach(), p.detach(), rtol=unit, atol=1e-6)
    index, scales = both_states(ours, theirs)
    for a, b in scales:
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
    for a, b in index:
        differs = (a.int() - b.int()).abs()
        assert differs.max() <= 1 and (differs > 0).float().mean() <= 1e-3


def test_fifty_steps_on_bitsandbytes_grid():
    """With the grid, nothing is left between the two but rounding. An index that a tie turns over moves the weight by
    a small part of lr, so that the bound is 2 lr on any number (of 50), and a thousandth of the way on the whole."""
    torch.manual_seed(2)
    start, grads = torch.randn(100, 77), gradients(50, (100, 77))
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    theirs, their_optimizer = trained(bitsandbytes.optim.AdamW8bit, start, grads, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "nearest_code", on_a_grid)
        ours, our_optimizer = trained(AdamW8bit, start, grads, **settings)
    assert (ours - theirs).abs().max() < 2 * 1e-2
    assert (ours - theirs).norm() < 1e-3 * (theirs - start).norm()
    for a, b in both_states(our_optimizer, their_optimizer)[0]:
        differs = (a.int() - b.int()).abs()
        assert differs.max() <= 1 and (differs > 0).float().mean() < 2e-3


@pytest.mark.parametrize("lr", [1e-3, 1e-2])
def test_fifty_steps_without_the_grid(lr):
    """The grid's half step, 1.5e-5 of a block's largest, is far below a code book's half step at the top (7e-3), but
    not at the bottom of v. So the two may differ by less than either does from float32: half of that is the bound."""
    torch.manual_seed(3)
    start, grads = torch.randn(100, 77), gradients(50, (100, 77))
    ours, theirs, exact = (
        trained(build, start, grads, lr=lr, weight_decay=0.1)[0].detach()
        for build in (AdamW8bit, bitsandbytes.optim.AdamW8bit, torch.optim.AdamW)
    )
    way = (exact - start).norm()
    assert (ours - theirs).norm() < (theirs - exact).norm() / 2
    assert (ours - theirs).norm() < 0.015 * way  # measured: 0.9 %
    assert (ours - exact).norm() < 0.05 * way and (theirs - exact).norm() < 0.05 * way  # measured: 3.3 % each


def test_small_tensors_take_bitsandbytes_steps_too():
    torch.manual_seed(4)
    start, grads = torch.randn(4095), gradients(20, (4095,))
    ours, optimizer = trained(AdamW8bit, start, grads, lr=1e-2, weight_decay=0.1)
    theirs, _ = trained(bitsandbytes.optim.AdamW8bit, start, grads, lr=1e-2, weight_decay=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert {t.dtype for t in optimizer.state[ours].values() if torch.is_tensor(t)} == {torch.float32}


# ---- the optimizer


def bytes_of(optimizer, p):
    return sum(t.nbytes for t in optimizer.state[p].values() if torch.is_tensor(t))


@pytest.mark.parametrize(("n", "expected"), [
    (4095, 2 * 4 * 4095),  # below min_8bit_size
    (4096, 2 * (4096 + 4 * 16)),
    (4097, 2 * (4097 + 4 * 17)),  # one number more, one block more
    (2**20, 2 * EIGHT_BIT_MOMENT * 2**20),
])  # fmt: skip
def test_bytes_by_hand(n, expected):
    p, optimizer = trained(AdamW8bit, torch.randn(n), [torch.randn(n)])
    assert bytes_of(optimizer, p) == expected


def test_bytes_are_those_of_bitsandbytes_and_of_the_memory_course():
    p, ours = trained(AdamW8bit, torch.zeros(512, 512), [torch.ones(512, 512)])
    q, theirs = trained(bitsandbytes.optim.AdamW8bit, torch.zeros(512, 512), [torch.ones(512, 512)])
    kept = sum(theirs.state[q][key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
    assert bytes_of(ours, p) == kept == RECIPES["8-bit Adam"].moments * p.numel()


def test_pieces_do_not_change_the_result(monkeypatch):
    torch.manual_seed(5)
    start, grads = torch.randn(5001), gradients(3, (5001,))
    whole, a = trained(AdamW8bit, start, grads, lr=0.1)
    monkeypatch.setattr(utils.optimizers, "PIECE", 512)
    pieces, b = trained(AdamW8bit, start, grads, lr=0.1)
    assert torch.equal(whole, pieces)
    assert all(torch.equal(a.state[whole][k], b.state[pieces][k]) for k in ("m", "v", "m_absmax", "v_absmax"))


def test_parameters_that_do_not_lie_in_one_piece():
    torch.manual_seed(6)
    start, grads = torch.randn(80, 64), gradients(3, (80, 64))
    p, _ = trained(AdamW8bit, start, grads, lr=0.1)
    strided = nn.Parameter(start.t().contiguous().t())
    optimizer = AdamW8bit([strided], lr=0.1)
    for strided.grad in grads:
        optimizer.step()
    assert not strided.is_contiguous() and torch.equal(p, strided)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n", [500, 5000], ids=["float32 moments", "8-bit moments"])
def test_saved_and_loaded_it_continues(n, dtype):
    torch.manual_seed(7)
    start, grads = torch.randn(n).to(dtype), [g.to(dtype) for g in gradients(6, (n,))]
    expected, _ = trained(AdamW8bit, start, grads, lr=0.1)
    p, optimizer = trained(AdamW8bit, start, grads[:3], lr=0.1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    again = nn.Parameter(p.detach().clone())
    loaded = AdamW8bit([again], lr=99.0)  # the saved lr counts
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for key, value in optimizer.state[p].items():
        other = loaded.state[again][key]
        assert torch.equal(value, other) and value.dtype == other.dtype if torch.is_tensor(value) else value == other
    for again.grad in grads[3:]:
        loaded.step()
    assert torch.equal(again, expected) and again.dtype == dtype


def test_two_that_load_one_state_do_not_share_it():
    p, first = trained(AdamW8bit, torch.zeros(5000), [torch.ones(5000)])
    saved = first.state_dict()
    second = AdamW8bit([nn.Parameter(p.detach().clone())])
    second.load_state_dict(saved)
    kept = {k: v.clone() for k, v in first.state[p].items() if torch.is_tensor(v)}
    other = second.param_groups[0]["params"][0]
    other.grad = -torch.ones(5000)
    second.step()
    assert all(torch.equal(first.state[p][k], v) for k, v in kept.items())
    assert copy.deepcopy(first).state_dict()["state"][0]["step"] == 1


def test_groups_schedulers_and_closures():
    a, b, idle = (nn.Parameter(torch.zeros(5000)) for _ in range(3))
    optimizer = AdamW8bit([{"params": [a], "lr": 0.1}, {"params": iter([b, idle])}], lr=0.5, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def closure():
        optimizer.zero_grad()
        loss = (a - 1).sum() + (b - 1).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == -10000
    torch.testing.assert_close(a.detach(), torch.full((5000,), -0.1))
    torch.testing.assert_close(b.detach(), torch.full((5000,), -0.5))
    scheduler.step()
    optimizer.step(closure)
    torch.testing.assert_close(a.detach(), torch.full((5000,), -0.15))
    assert idle not in optimizer.state and not idle.any()


# ---- training


class Output(dict):
    __getattr__ = dict.__getitem__


class Net(nn.Module):
    """A small regression; its first two weights are large enough for 8 bits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 1))

    def forward(self, x, labels):
        return Output(loss=(self.net(x).squeeze(-1) - labels).square().mean())


ROWS = [{"x": [math.sin(i * j) for j in range(1, 33)], "y": math.sin(i) + math.cos(3 * i)} for i in range(64)]


def collate(rows):
    return {"x": torch.tensor([r["x"] for r in rows]), "labels": torch.tensor([r["y"] for r in rows])}


def run(model, **options):
    return train(model, ROWS, collate, **{"steps": 60, "batch_size": 16, "lr": 5e-3, "quiet": True, **options})


def test_losses_stay_near_those_of_float32():
    losses = {name: torch.tensor(run(Net(), optimizer=name).loss) for name in ("adamw", "adamw8bit")}
    exact, eight = losses["adamw"], losses["adamw8bit"]
    assert exact[-10:].mean() < exact[:10].mean() / 2  # something was learned
    assert not torch.equal(exact, eight)  # and 8 bits were used
    assert (exact - eight).abs().max() < 0.05 * exact[0]


def test_training_stops_and_resumes_to_the_same_losses(tmp_path):
    options = {"optimizer": "adamw8bit", "schedule": "constant"}
    whole, again = Net(), Net()
    expected = run(whole, **options).loss
    run(again, steps=30, save_to=tmp_path / "s.pt", **options)
    history = run(again, resume=True, save_to=tmp_path / "s.pt", **options)
    assert history.loss == expected
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match="optimizer was AdamW8bit, is AdamW"):
        run(again, resume=True, save_to=tmp_path / "s.pt", schedule="constant")


# ---- what it refuses


@pytest.mark.parametrize(("settings", "message"), [
    ({"lr": -1.0}, "lr is -1.0; it must be a number from 0 up"),
    ({"lr": math.nan}, "lr is nan"),
    ({"eps": "small"}, "eps is 'small'"),
    ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); it must be two numbers from 0 to below 1"),
    ({"betas": 0.9}, "betas is 0.9"),
    ({"min_8bit_size": 0}, "min_8bit_size is 0; it must be a whole number from 1 up"),
    ({"min_8bit_size": 4096.0}, "min_8bit_size is 4096.0"),
])  # fmt: skip
def test_bad_settings(settings, message):
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=message):
        AdamW8bit([p], **settings)
    optimizer = AdamW8bit([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], **settings})
    assert len(optimizer.param_groups) == 1


def test_bad_parameters_and_gradients():
    with pytest.raises(ValueError, match="not torch.float64"):
        AdamW8bit([nn.Parameter(torch.zeros(3, dtype=torch.float64))])
    embedding = nn.Embedding(100, 64, sparse=True)
    optimizer = AdamW8bit(embedding.parameters())
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(ValueError, match="sparse gradients"):
        optimizer.step()


def test_states_of_other_optimizers_and_shapes_are_refused():
    p, optimizer = trained(AdamW8bit, torch.zeros(5000), [torch.ones(5000)])
    before = copy.deepcopy(optimizer.state_dict())
    for build, shape in ((torch.optim.AdamW, 5000), (AdamW8bit, 5001), (AdamW8bit, 100)):
        _, other = trained(build, torch.zeros(shape), [torch.ones(shape)])
        with pytest.raises(ValueError, match="The state of parameter 0 is not one that AdamW8bit keeps"):
            optimizer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(after["state"][0][k], before["state"][0][k]) for k in ("m", "v", "m_absmax", "v_absmax"))


# ---- paged


def test_paging_is_refused_where_there_is_no_unified_memory():
    p = nn.Parameter(torch.zeros(3))
    message = "needs CUDA's unified memory, and these parameters are on cpu: use AdamW8bit or torch.optim.AdamW"
    for params in ([p], [{"params": iter([p])}], iter([p])):
        with pytest.raises(ValueError, match=message):
            paged_adamw(params)
    with pytest.raises(ValueError, match="bits is 4; a paged optimizer keeps moments of 32 or of 8 bits"):
        paged_adamw([p], bits=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be had")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw8bit"])
def test_training_says_so_too(name):
    with pytest.raises(ValueError, match="unified memory"):
        run(Net(), optimizer=name)


@pytest.mark.parametrize("bits", [32, 8])
def test_what_bitsandbytes_is_asked_for(monkeypatch, bits):
    """Without a GPU: that its paged class gets our settings."""
    calls = []
    name = {32: "PagedAdamW32bit", 8: "PagedAdamW8bit"}[bits]
    monkeypatch.setattr(bitsandbytes.optim, name, lambda params, **settings: calls.append((params, settings)))

    class OnGpu:
        device = torch.device("cuda")

    groups = [{"params": [OnGpu()], "lr": 0.5}]
    paged_adamw(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, bits=bits)
    assert calls == [(groups, {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3})]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bits", [32, 8])
def test_paged_on_a_gpu(bits):
    """Tensors of 100,000 numbers are paged, smaller ones are not; the steps are those of the optimizer that is not."""
    torch.manual_seed(8)
    for n, paged in ((100_000, True), (99_999, False)):
        start, grads = torch.randn(n, device="cuda"), [torch.randn(n, device="cuda") for _ in range(5)]
        p, optimizer = trained(partial(paged_adamw, bits=bits), start, grads, lr=0.1)
        plain = {32: bitsandbytes.optim.AdamW32bit, 8: bitsandbytes.optim.AdamW8bit}[bits]
        assert torch.equal(p, trained(plain, start, grads, lr=0.1, weight_decay=0.01)[0])
        assert getattr(optimizer.state[p]["state1"], "is_paged", False) == paged


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_the_steps_are_those_on_a_cpu():
    torch.manual_seed(9)
    start, grads = torch.randn(5000), gradients(20, (5000,))
    here, _ = trained(AdamW8bit, start, grads, lr=1e-2)
    there, _ = trained(AdamW8bit, start.cuda(), [g.cuda() for g in grads], lr=1e-2)
    assert (here - there.cpu()).norm() < 1e-3 * (here - start).norm()
