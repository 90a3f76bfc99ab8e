"""The loop in utils.training: what it computes, that it resumes exactly, and what it refuses."""

import json
import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from utils.paths import ROOT
from utils.training import History, lr_factor, row_order, train

ROWS = [{"x": [math.sin(i), math.cos(3 * i)], "y": math.sin(i) - 2 * math.cos(3 * i)} for i in range(12)]


class Output(dict):
    """What transformers returns, in two lines: a mapping whose keys are attributes too."""

    __getattr__ = dict.__getitem__


class Toy(nn.Module):
    """A frozen layer and a trained one, in the shape that transformers models have: forward(**batch).loss."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.base, self.drop, self.head = nn.Linear(2, 4), nn.Dropout(dropout), nn.Linear(4, 1)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
        self.base.requires_grad_(False)

    def forward(self, x, labels):
        out = self.head(self.drop(self.base(x))).squeeze(-1)
        return Output(loss=(out - labels).square().mean())


def collate(rows):
    return {"x": torch.tensor([r["x"] for r in rows]), "labels": torch.tensor([r["y"] for r in rows])}


def run(model, rows=ROWS, collate=collate, **options):
    return train(model, rows, collate, **{"steps": 20, "batch_size": 4, "lr": 0.05, "quiet": True, **options})


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_sgd_step_by_hand():
    model = Toy()
    batch = collate([ROWS[i] for i in row_order(0, 4, 12, seed=0)])
    loss = model(**batch).loss
    grad = torch.autograd.grad(loss, model.head.weight)[0]
    expected = model.head.weight - 0.05 * grad
    base = model.base.weight.clone()
    history = run(model, steps=1, optimizer="sgd", warmup=0, clip=None)
    assert history.loss == [loss.item()] and history.lr == [0.05] and history.tokens == 4
    torch.testing.assert_close(model.head.weight, expected)
    assert torch.equal(model.base.weight, base)


def test_loss_falls_and_seed_decides():
    first, again, other = (run(Toy(), steps=60, seed=seed) for seed in (0, 0, 1))
    assert first.loss[-1] < 0.5 * first.loss[0]
    assert first.loss == again.loss != other.loss


def test_dropout_is_seeded_and_the_global_generator_does_not_matter():
    losses = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        losses.append(run(Toy(dropout=0.5)).loss)
    assert losses[0] == losses[1] != run(Toy(dropout=0.5), seed=3).loss


def test_accumulation_equals_the_larger_batch():
    small, large = Toy(), Toy()
    a, b = run(small, batch_size=2, accumulate=2), run(large, batch_size=4)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(weights(small), weights(large))


def test_row_order_visits_every_row_once_per_epoch():
    order = row_order(0, 24, 12, seed=0)
    assert sorted(order[:12]) == sorted(order[12:]) == list(range(12)) and order[:12] != order[12:]
    assert row_order(5, 10, 12, seed=0) == order[5:15]


@pytest.mark.parametrize(
    "schedule, shares",
    [("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]), ("constant", [0.5, 1, 1, 1, 1, 1]),
     ("cosine", [0.5, 1, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2])],
)
def test_schedules(schedule, shares):
    assert [lr_factor(step, 6, 2, schedule) for step in range(6)] == pytest.approx(shares)


def test_groups_keep_their_own_lr():
    model = Toy()
    groups = [{"params": [model.head.weight], "lr": 0.5}, {"params": iter([model.head.bias])}]
    seen = []

    def build(params, lr, weight_decay):
        seen.append(torch.optim.SGD(params, lr=lr, weight_decay=weight_decay))
        return seen[0]

    history = run(model, params=groups, lr=0.1, optimizer=build, steps=4, warmup=4)
    assert history.lr == [0.125, 0.25, 0.375, 0.5]
    assert [group["lr"] for group in seen[0].param_groups] == [0.5, 0.1]


def test_optimizer_may_be_a_class_or_partial():
    a = run(Toy(), optimizer=torch.optim.AdamW).loss
    assert a == run(Toy()).loss != run(Toy(), optimizer=partial(torch.optim.SGD, momentum=0.9)).loss


def test_only_the_given_parameters_move():
    model = Toy()
    bias, weight = model.head.bias.clone(), model.head.weight.clone()
    run(model, params=[model.head.bias])
    assert not torch.equal(model.head.bias, bias) and torch.equal(model.head.weight, weight)
    assert all(p.grad is None for p in model.parameters())


def test_model_is_left_as_it_was():
    model = Toy()
    model.eval()
    model.drop.train()
    before = dict(vars(model))
    run(model, precision="bf16")
    assert not model.training and model.drop.training
    assert vars(model).keys() == before.keys()


def test_precision_may_change_between_calls_and_others_keep_theirs():
    theirs = Accelerator(gradient_accumulation_steps=3)
    model, dtypes = Toy(), []
    model.head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for precision in ("bf16", "no", "bf16"):
        run(model, steps=1, precision=precision)
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert theirs.mixed_precision == "no" and theirs.gradient_accumulation_steps == 3


class Stop(Exception):
    pass


def stopping_at(call):
    """A collate that fails at its n-th call, as a power cut would."""
    calls = iter(range(1, call + 1))

    def collate_until(rows):
        if next(calls) == call:
            raise Stop
        return collate(rows)

    return collate_until


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop", [11, 12, 30])
def test_resume_continues_to_the_same_losses(tmp_path, stop, optimizer):
    options = {"accumulate": 2, "log_every": 5, "optimizer": optimizer, "save_to": tmp_path / "runs" / "state.pt"}
    whole = Toy(dropout=0.3)
    expected = run(whole, **{**options, "save_to": None})
    with pytest.raises(Stop):
        run(Toy(dropout=0.3), collate=stopping_at(stop), **options)
    again = Toy(dropout=0.3)
    torch.rand(7)  # the global generator may be anywhere
    history = run(again, resume=True, **options)
    assert history.loss == expected.loss and history.lr == expected.lr and history.tokens == expected.tokens
    assert same(weights(again), weights(whole))
    assert os.listdir(tmp_path / "runs") == ["state.pt"]
    assert run(Toy(dropout=0.3), resume=True, **options).loss == expected.loss  # finished: nothing left to do


def test_a_run_may_be_made_longer(tmp_path):
    options = {"save_to": tmp_path / "s.pt", "schedule": "constant"}
    run(Toy(), steps=10, **options)
    assert run(Toy(), steps=20, resume=True, **options).loss == run(Toy(), steps=20, schedule="constant").loss


def test_nan_stops_before_the_step_and_keeps_the_good_checkpoint(tmp_path):
    path, model = tmp_path / "s.pt", Toy()
    rows = [dict(row) for row in ROWS]
    rows[row_order(0, 12, 12, seed=0)[-1]]["y"] = math.nan  # met at step 3
    with pytest.raises(FloatingPointError, match="At step 3 the loss is nan.*smaller lr") as caught:
        run(model, rows, save_to=path, log_every=1)
    assert "\n" not in str(caught.value)
    good = torch.load(path, weights_only=True)
    assert len(good["history"]["loss"]) == 2
    assert same(good["params"], [p for p in model.parameters() if p.requires_grad])
    assert model.head.weight.isfinite().all()


def test_infinite_gradient_with_a_finite_loss():
    model = Toy()
    model.head.weight.register_hook(lambda grad: grad * math.inf)
    before = weights(model)
    with pytest.raises(FloatingPointError, match="gradient's norm"):
        run(model)
    assert same(before, weights(model))


def test_out_of_memory_says_what_to_try():
    model = Toy()

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    model.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="batch_size=4: try batch_size=2 with accumulate=2"):
        run(model)
    with pytest.raises(torch.OutOfMemoryError, match="try shorter rows"):
        run(model, batch_size=1)


def frozen():
    return Toy().requires_grad_(False)


def half():
    return Toy().half()


@pytest.mark.parametrize(
    "model, options, error, message",
    [
        (Toy, {"rows": []}, ValueError, "no rows"),
        (frozen, {}, ValueError, "nothing to train"),
        (Toy, {"params": [nn.Parameter(torch.ones(1), requires_grad=False)]}, ValueError, "never move"),
        (Toy, {"steps": 0}, ValueError, "steps must be 1 or more, not 0"),
        (Toy, {"log_every": 0}, ValueError, "log_every must be 1 or more"),
        (Toy, {"optimizer": "lion"}, ValueError, "one of adamw, adamw8bit, .*, sgd"),
        (Toy, {"schedule": "step"}, ValueError, "one of linear, cosine, constant"),
        (half, {"precision": "fp16"}, ValueError, "in float32"),
        (Toy, {"precision": "fp16"}, ValueError, "needs a GPU"),
        (Toy, {"resume": True}, FileNotFoundError, "no checkpoint at None"),
        (Toy, {"resume": True, "save_to": "/nowhere/state.pt"}, FileNotFoundError, "no checkpoint at /nowhere"),
        (Toy, {"save_to": "/dev/null/state.pt"}, OSError, "Cannot write a checkpoint to /dev/null/state.pt"),
        (Toy, {"save_to": "."}, OSError, "a folder"),
        (Toy, {"collate": lambda rows: {}}, TypeError, "missing"),
    ],
)
def test_bad_requests_change_nothing(model, options, error, message):
    model = model()
    before = weights(model)
    with pytest.raises(error, match=message):
        run(model, **options)
    assert same(before, weights(model))


def test_model_without_a_loss():
    model = Toy()
    model.register_forward_hook(lambda *_: Output(loss=None))
    with pytest.raises(ValueError, match="collate must give labels"):
        run(model)


def test_checkpoints_of_other_runs_and_damaged_ones(tmp_path):
    path, model = tmp_path / "s.pt", Toy()
    run(model, steps=2, save_to=path)
    before = weights(model)
    for options, message in [
        ({"seed": 1, "batch_size": 2}, "batch_size was 4, is 2; seed was 0, is 1"),
        ({"optimizer": "sgd"}, "optimizer was AdamW, is SGD"),
        ({"params": [model.head.bias]}, "2 tensors that do not match the 1 here"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(model, resume=True, save_to=path, **options)
    for damaged in (path.read_bytes()[:500], b"", b"not a checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            run(model, resume=True, save_to=path)
    assert same(before, weights(model))


def test_progress_is_text(capsys):
    run(Toy(), quiet=False, log_every=8)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 8/20", "step 16/20", "step 20/20"]
    assert all(word in lines[0] for word in ("loss", "lr", "tokens/s", "s left"))
    run(Toy())
    assert capsys.readouterr().out == ""


def test_history_prints_without_times():
    assert repr(History([2.0, 1.0], [0.1, 0.1], 12.3, 99)) == "History(2 steps, loss 2.00 -> 1.00)"
    assert repr(History()) == "History(0 steps)"


LAUNCHED = """
import json, os, sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_training import Toy, run, stopping_at, Stop

path = {path!r}
first, second, third = Toy(), Toy(), Toy()
plain = run(first, batch_size=2)
accumulated = run(second, batch_size=1, accumulate=2, precision="bf16")
try:
    run(third, batch_size=2, save_to=path, log_every=5, collate=stopping_at(14))
except Stop:
    pass
resumed = run(third, batch_size=2, save_to=path, log_every=5, resume=True)
with open(path + os.environ["RANK"], "w") as file:
    json.dump([plain.loss, accumulated.loss, resumed.loss, first.head.weight.tolist(), plain.tokens], file)
"""


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(tests=str(ROOT / "tests"), root=str(ROOT), path=str(tmp_path / "s.pt")))
    # --cpu would start one process, without a word; --multi_gpu starts two, which find no GPU and talk through gloo
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
               "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
               str(script)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / f"s.pt{rank}").read_text()) for rank in (0, 1)]
    assert results[0] == results[1]  # both processes hold the same

    plain, accumulated, resumed, weight, tokens = results[0]
    one = Toy()
    alone = run(one, batch_size=4)
    assert plain == pytest.approx(alone.loss, rel=1e-5) and tokens == alone.tokens
    assert weight[0] == pytest.approx(one.head.weight.tolist()[0], rel=1e-5)
    assert resumed == plain
    assert accumulated == pytest.approx(alone.loss, rel=0.1, abs=0.05)  # bf16
