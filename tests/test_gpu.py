"""LoRA trained on a GPU, in the precision that the GPU has: `make gpu-test`. Without a GPU, all of this is skipped.

The kernels' own tests are in test_kernels.py: on a GPU they run compiled.
"""

import math
from functools import partial

import pytest
import torch

from utils import LoRA, attach, load_adapter
from utils.hardware import settings
from utils.models import load_base, load_tokenizer
from utils.tasks import collate, load_task
from utils.training import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICE = "cuda"


@pytest.fixture(scope="module")
def task():
    rows = load_task("tickets")["train"].select(range(64)).to_list()
    return rows, partial(collate, tokenizer=load_tokenizer("decoder"))


def on_gpu(batch):
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


def losses(task, precision, base_dtype):
    """The losses of ten steps on one batch of rows, and the model."""
    rows, collate = task
    model = load_base("decoder", dtype=base_dtype).to(DEVICE)
    torch.manual_seed(0)
    adapter = attach(model, LoRA(r=8, targets="all-linear"))
    history = train(
        model, rows[:16], collate, params=adapter.parameters(), steps=10, batch_size=16, lr=1e-2, warmup=0,
        precision=precision, quiet=True,
    )  # fmt: skip
    return history.loss, model, adapter


def test_float32_trains_as_on_a_cpu(task):
    rows, collate = task
    torch.manual_seed(0)
    model = load_base("decoder", dtype=torch.float32)
    attach(model, LoRA(r=8, targets="all-linear"))
    with torch.no_grad():
        first = model(**collate(rows[:16])).loss.item()
    loss, *_ = losses(task, "no", torch.float32)
    assert loss[0] == pytest.approx(first, rel=1e-3)
    assert loss[-1] < loss[0] - 0.1


@pytest.mark.parametrize("half_base", [False, True])
def test_half_precision_trains(task, half_base):
    """bfloat16 where the GPU has it, else float16 with a GradScaler. The adapter stays float32 over either base."""
    here = settings()
    exact, *_ = losses(task, "no", torch.float32)
    loss, model, adapter = losses(task, here.precision, here.dtype if half_base else torch.float32)
    assert all(math.isfinite(step) for step in loss)
    assert loss[0] == pytest.approx(exact[0], rel=0.02)
    assert loss[-1] < loss[0] - 0.1
    for parameter in adapter.parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all()


def test_float16_with_a_grad_scaler_trains_on_every_gpu(task):
    loss, _, adapter = losses(task, "fp16", torch.float16)
    assert loss[-1] < loss[0] - 0.1
    assert all(parameter.isfinite().all() for parameter in adapter.parameters())


def test_the_verbs_hold_on_a_gpu(task, tmp_path):
    """Disabled and detached the model is the base bit for bit, unmerged as before; a saved adapter loads on a CPU."""
    rows, collate = task
    batch = on_gpu(collate(rows[:4]))
    model = load_base("decoder", dtype=settings().dtype).to(DEVICE).eval()
    with torch.no_grad():
        base = model(**batch).logits
        adapter = attach(model, LoRA(r=8, targets="all-linear", init="random_b"))
        adapted = model(**batch).logits
        assert not torch.equal(adapted, base)
        with adapter.disabled():
            assert torch.equal(model(**batch).logits, base)
        adapter.merge()
        assert (model(**batch).logits - adapted).abs().max() < 0.1 * (adapted - base).abs().max()
        adapter.unmerge()
        assert torch.equal(model(**batch).logits, adapted)
        adapter.save(tmp_path)
        adapter.detach()
        assert torch.equal(model(**batch).logits, base)

        other = load_base("decoder", dtype=torch.float32).eval()
        load_adapter(other, tmp_path)
        exact = other(**collate(rows[:4])).logits
    assert (adapted.float().cpu() - exact).abs().max() < 0.05 * exact.abs().max()
