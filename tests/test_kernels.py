"""The Triton kernels against a float64 oracle: three runs of the same tests.

Here, on a machine without a GPU, they hold for the PyTorch references. `test_under_triton_s_interpreter` runs this file
again in a process of its own, where TRITON_INTERPRET=1 is set before Triton is imported: there they hold for the
kernels. `make gpu-test` runs them on a GPU, with the kernels compiled.
"""

import inspect
import os
import subprocess
import sys

import pytest
import torch

from utils.kernels import INSTALLED, INTERPRETED, runs_triton, tl
from utils.kernels.dora import dora_row_norm, row_norm_kernel
from utils.kernels.lora import (
    expand,
    expand_kernel,
    lora_grouped,
    outer,
    outer_kernel,
    plan_rows,
    shrink,
    shrink_kernel,
    tiles,
)
from utils.paths import ROOT

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of the largest number of the answer; 16 bits round x's products once, and y once or twice
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAN = float("nan")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_under_triton_s_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def test_the_tests_of_this_process_reach_what_they_should():
    assert runs_triton(torch.zeros(1, device=DEVICE)) == (INSTALLED and (INTERPRETED or DEVICE == "cuda"))
    assert not runs_triton(torch.zeros(1, dtype=torch.float64, device=DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="the same in either process")
def test_without_triton_the_references_do_the_work():
    script = (
        "import sys; sys.modules['triton'] = None\n"  # what an import of a missing package meets
        "import torch\nfrom utils.kernels import INSTALLED, dora, lora\n"
        "x, W, A, B = torch.ones(2, 3), torch.zeros(4, 3), torch.ones(1, 3), torch.ones(4, 1)\n"
        "y, = lora.lora_grouped(x, [W], None, [A], [B], 2.0)\n"
        "print(INSTALLED, y.unique().item(), dora.dora_row_norm(W, A, B, 1.0).square().round().unique().item())"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "6.0", "3.0"], done.stderr


def near(got, want, dtype, times=1.0):
    """got equals want to `times` the tolerance of dtype, measured by want's largest number."""
    assert got.shape == want.shape
    error = (got.double() - want).abs().max().item() if want.numel() else 0.0
    assert error <= times * TOLERANCE[dtype] * max(want.abs().max().item(), 1e-3), error


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=torch.float64).to(dtype).to(DEVICE)


class Mixed:
    """Rows of the base and of four adapters, one with a single row and one with none; ranks differ by projection too.

    Whatever must not be read is NaN: the padding of A and B, the adapter without rows, the base rows of x.
    """

    def __init__(self, R, dtype, d_in, widths, rows=45):
        torch.manual_seed(R + d_in)
        self.n, self.R, self.widths = 4, R, widths
        owners = torch.tensor([-1, 0, 0, 3, 3, 3])[torch.randint(6, (rows,))]
        owners[rows // 2] = 1  # nobody has adapter 2
        self.indices = owners.to(DEVICE)
        self.ranks = torch.tensor([[R, 1, R, (R + 1) // 2], [1, R, R, R], [(R + 1) // 2, 1, R, 0]])[: len(widths)]
        self.x = randn(rows, d_in, dtype=dtype)
        self.x[self.indices == -1] = NAN
        self.As = [randn(self.n, R, d_in) for _ in widths]
        self.Bs = [randn(self.n, width, R) for width in widths]
        for p, ranks in enumerate(self.ranks):
            for a, rank in enumerate(ranks):
                self.As[p][a, rank:], self.Bs[p][a, :, rank:] = NAN, NAN
            self.As[p][2], self.Bs[p][2] = NAN, NAN
        self.ranks = self.ranks.int().to(DEVICE)
        self.scales = torch.rand(len(widths), self.n, device=DEVICE) + 0.5
        self.plan = plan_rows(self.indices, self.n)

    def each(self):
        """(p, i, A, B, s) of every projection and row with an adapter; A and B in float64, without padding."""
        for i, a in enumerate(self.indices.tolist()):
            for p in range(len(self.widths)) if a >= 0 else ():
                r = self.ranks[p, a]
                yield p, i, self.As[p][a, :r].double(), self.Bs[p][a, :, :r].double(), self.scales[p, a].double()


# ------------------------------------------------------------------------------------------------- shrink and expand


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "R, d_in, widths",
    [(1, 1, (1, 3, 2)), (3, 33, (17,)), (16, 70, (65, 16, 16)), (17, 48, (33, 96)), (128, 31, (40, 1))],
)
def test_a_mixed_batch(R, d_in, widths, dtype):
    batch = Mixed(R, dtype, d_in, widths)
    ys = [randn(len(batch.x), width, dtype=dtype) for width in widths]
    before = [y.clone() for y in ys]
    wanted_v = torch.zeros(len(widths), len(batch.x), R, dtype=torch.float64, device=DEVICE)
    wanted = [y.double() for y in ys]
    for p, i, A, B, s in batch.each():
        wanted_v[p, i, : len(A)] = s * (A @ batch.x[i].double())
        wanted[p][i] += s * (B @ (A @ batch.x[i].double()))

    v = shrink([batch.x] * len(widths), batch.As, batch.scales, batch.ranks, batch.plan)
    expand(ys, v, batch.Bs, batch.ranks, batch.plan)
    assert v.dtype == torch.float32
    near(v, wanted_v, torch.float32 if DEVICE == "cpu" else dtype)
    base = batch.indices == -1
    for y, old, want in zip(ys, before, wanted, strict=True):
        near(y, want, dtype)
        assert torch.equal(y[base].view(torch.uint8), old[base].view(torch.uint8))


def test_rows_without_an_adapter_keep_even_the_sign_of_a_zero():
    plan = plan_rows(torch.tensor([-1, 0, 1], device=DEVICE), 2)
    ranks = torch.tensor([[2, 0]], dtype=torch.int32, device=DEVICE)  # adapter 1 is an empty slot
    y = -torch.zeros(3, 5, device=DEVICE)
    expand([y], torch.ones(1, 3, 2, device=DEVICE), [torch.ones(2, 5, 2, device=DEVICE)], ranks, plan)
    assert y[1].tolist() == [2.0] * 5
    assert torch.signbit(y[[0, 2]]).all()


@pytest.mark.parametrize("x", [torch.eye(16), torch.ones(16, 16)])
def test_bfloat16_is_multiplied_as_numbers(x):
    """The interpreter's tl.dot takes bfloat16 for integers: 1.0 has the bits of 16256, and eye @ ones gave 16256^2."""
    x, ones = x.bfloat16().to(DEVICE), torch.ones(1, 16, 16, dtype=torch.bfloat16, device=DEVICE)
    plan, ranks = plan_rows(torch.zeros(16, dtype=torch.int32, device=DEVICE), 1), torch.tensor([[16]], device=DEVICE)
    v = shrink([x], [ones], torch.ones(1, 1, device=DEVICE), ranks, plan)
    assert (v == x.float().sum(1)[:, None]).all()
    y = torch.zeros_like(x)
    expand([y], v, [ones], ranks, plan)
    assert (y == 16 * x.float().sum(1)[:, None]).all()
    assert (outer(v, [x], 1, plan, torch.float32)[0] == (v[0].T @ x.float())).all()


def test_a_fused_output_takes_its_projections_in_place():
    """q, k and v as columns of one tensor, what a fused base layer writes; columns between them stay as they are."""
    batch = Mixed(8, torch.float32, 20, (24, 8, 8))
    fused = randn(len(batch.x), 50)
    before = fused.double()
    wanted = before.clone()
    parts = [fused[:, :24], fused[:, 30:38], fused[:, 40:48]]
    for p, i, A, B, s in batch.each():
        first = (0, 30, 40)[p]
        wanted[i, first : first + len(B)] += s * (B @ (A @ batch.x[i].double()))
    v = shrink([batch.x] * 3, batch.As, batch.scales, batch.ranks, batch.plan)
    expand(parts, v, batch.Bs, batch.ranks, batch.plan)
    near(fused, wanted, torch.float32)
    assert (fused[:, 24:30].double() == before[:, 24:30]).all() and (fused[:, 48:].double() == before[:, 48:]).all()
    with pytest.raises(ValueError, match="in one piece"):
        expand([fused.T], v, batch.Bs, batch.ranks, batch.plan)


@pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="a promise of the kernels")
def test_a_row_does_not_depend_on_the_rows_beside_it():
    batch = Mixed(16, torch.float32, 70, (40,))
    args = (batch.As, batch.scales, batch.ranks)
    v = shrink([batch.x], *args, batch.plan)
    assert torch.equal(v, shrink([batch.x], *args, batch.plan))
    some = torch.arange(7, 30, device=DEVICE)
    alone = shrink([batch.x[some]], *args, plan_rows(batch.indices[some], batch.n))
    if DEVICE == "cuda":
        assert torch.equal(alone, v[:, some])
    else:  # numpy multiplies a row differently at different places of a tile
        near(alone, v[:, some].double(), torch.float32)


@pytest.mark.skipif(not (INTERPRETED or DEVICE == "cuda"), reason="a trap of the kernels")
def test_addresses_beyond_32_bits():
    """Row 2050 of rows that begin 2^20 numbers apart. Memory that nobody touches costs nothing."""
    try:
        store = torch.empty(2051 * 2**20, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("4.3 GB of address space are not to be had")
    x = store.as_strided((2051, 16), (2**20, 1))
    x[2050] = 1.0
    indices = torch.full((2051,), -1, device=DEVICE)
    indices[2050] = 0
    plan, ranks = plan_rows(indices, 1, chunk=64), torch.ones(1, 1, dtype=torch.int32, device=DEVICE)
    ones = torch.ones(1, 16, 1, device=DEVICE)
    v = shrink([x], [ones.mT], torch.ones(1, 1, device=DEVICE), ranks, plan)
    expand([x], v, [ones], ranks, plan)
    assert v[0, 2050].tolist() == [16.0] and x[2050].tolist() == [17.0] * 16


# -------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("chunk", [16, 32])
def test_every_row_is_in_one_chunk_of_its_adapter(chunk):
    torch.manual_seed(0)
    for rows, n in [(0, 1), (1, 1), (16, 2), (17, 1), (100, 3), (64, 9)]:
        indices = torch.randint(-1, n, (rows,), device=DEVICE)
        plan = plan_rows(indices, n, chunk)
        seen = []
        for a, first, size in zip(plan.chunk_adapter, plan.chunk_first, plan.chunk_rows, strict=True):
            assert size <= chunk
            mine = plan.order[first : first + size]
            assert (indices[mine] == a).all()
            seen += mine.tolist()
        assert sorted(seen) == list(range(rows))
        for a in range(-1, n):
            assert plan.starts[a + 2] - plan.starts[a + 1] == (indices == a).sum()


def test_an_index_outside_the_adapters_is_an_error():
    for wrong in (-2, 3):
        with pytest.raises(ValueError, match=r"from -1 \(base\) to 2"):
            plan_rows(torch.tensor([0, wrong]), 3)


# ------------------------------------------------------------------------------------- the layer, and its gradients


def case(dtype, r, d_in, widths, rows, adapter_dtype=torch.float32):
    """Arguments of lora_grouped for one adapter, and the same in float64 for the formula."""
    torch.manual_seed(r)
    x = randn(*rows, d_in, dtype=dtype).requires_grad_()
    Ws, biases = [randn(width, d_in, dtype=dtype) for width in widths], [randn(width, dtype=dtype) for width in widths]
    biases[-1] = None
    As = [randn(r, d_in, dtype=adapter_dtype).requires_grad_() for _ in widths]
    Bs = [randn(width, r, dtype=adapter_dtype).requires_grad_() for width in widths]
    return x, Ws, biases, As, Bs


def formula(x, Ws, biases, As, Bs, scale):
    """The same layers as the paper writes them, in float64: outputs, and the tensors to differentiate."""
    leaves = [t.detach().double().requires_grad_() for t in (x, *As, *Bs)]
    x, As, Bs = leaves[0], leaves[1 : len(As) + 1], leaves[len(As) + 1 :]
    ys = [x @ W.double().T + scale * (x @ A.T) @ B.T for W, A, B in zip(Ws, As, Bs, strict=True)]
    return [y if b is None else y + b.double() for y, b in zip(ys, biases, strict=True)], leaves


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "r, d_in, widths, rows",
    [(1, 7, (5,), (1,)), (8, 33, (65, 17, 17), (2, 9)), (16, 32, (40, 40), (33,)), (100, 20, (24,), (18,))],
)
def test_one_adapter_forward_and_backward(r, d_in, widths, rows, dtype):
    args = case(dtype, r, d_in, widths, rows)
    ys = lora_grouped(*args, 0.5)
    wanted, leaves = formula(*args, 0.5)
    grads = [torch.randn_like(y) for y in ys]
    got = torch.autograd.grad(ys, [args[0], *args[3], *args[4]], grads)
    want = torch.autograd.grad(wanted, leaves, [g.double() for g in grads])
    for y, w in zip(ys, wanted, strict=True):
        assert y.dtype == dtype and y.shape[:-1] == rows
        near(y, w, dtype)
    assert got[0].dtype == dtype and all(g.dtype == torch.float32 for g in got[1:])
    for g, w in zip(got, want, strict=True):
        near(g, w, dtype, times=2)  # dx is rounded once per projection


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_adapters_forward_and_backward(dtype):
    """Each adapter gets the gradient of its own rows; padding, and the adapter nobody uses, get exactly 0."""
    widths = (33, 17)
    batch = Mixed(6, dtype, 20, widths)
    batch.x[batch.indices == -1] = 1.0  # the base computes with these
    Ws = [randn(width, 20, dtype=dtype) for width in widths]
    inputs = [t.requires_grad_() for t in (batch.x, *batch.As, *batch.Bs)]
    ys = lora_grouped(inputs[0], Ws, None, inputs[1:3], inputs[3:], batch.scales, batch.ranks, batch.plan)
    with torch.no_grad():
        plain = [batch.x @ W.T for W in Ws]
    grads = [torch.randn_like(y) for y in ys]
    got = torch.autograd.grad(ys, inputs, grads)

    base = batch.indices == -1
    leaves = [t.detach().double().requires_grad_() for t in inputs]
    x, As, Bs = leaves[0], leaves[1:3], leaves[3:]
    wanted = [x @ W.double().T for W in Ws]
    for p, i, _, _, s in batch.each():
        a, r = batch.indices[i], batch.ranks[p, batch.indices[i]]
        delta = s * (Bs[p][a, :, :r] @ (As[p][a, :r] @ x[i]))
        wanted[p] = wanted[p].index_add(0, torch.tensor([i], device=DEVICE), delta[None])
    want = torch.autograd.grad(wanted, leaves, [g.double() for g in grads])
    for y, w, untouched in zip(ys, wanted, plain, strict=True):
        near(y, w, dtype)
        assert torch.equal(y[base], untouched[base])
    for g, w in zip(got, want, strict=True):
        near(g, w.nan_to_num(0.0), dtype, times=2)
    for p in range(2):
        dA, dB = got[1 + p], got[3 + p]
        assert (dA[2] == 0).all() and (dB[2] == 0).all()
        for a in range(batch.n):
            r = batch.ranks[p, a]
            assert (dA[a, r:] == 0).all() and (dB[a, :, r:] == 0).all()


def test_second_derivatives_are_refused():
    x, *rest = case(torch.float32, 2, 6, (5,), (3,))
    (y,) = lora_grouped(x, *rest, 1.0)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_gradients_by_finite_differences():
    args = case(torch.float64, 3, 4, (5, 2), (3,), torch.float64)
    x, Ws, biases, As, Bs = args

    def layer(x, *AB):
        return lora_grouped(x, Ws, biases, AB[:2], AB[2:], 0.7)

    assert torch.autograd.gradcheck(layer, (x, *As, *Bs))


def test_only_x_and_the_narrow_v_are_kept():
    from utils.measure import saved_by_shape

    x, Ws, biases, As, Bs = case(torch.float32, 4, 32, (48, 16), (10,))
    kept = saved_by_shape(lambda: lora_grouped(x, Ws, biases, As, Bs, 1.0), [x, *Ws, *As, *Bs])
    assert kept == {((2, 10, 4), torch.float32): 2 * 10 * 4 * 4}


def test_one_unused_output_and_a_frozen_x():
    x, Ws, biases, As, Bs = case(torch.float32, 4, 12, (8, 6), (5,))
    y, _ = lora_grouped(x.detach(), Ws, biases, As, Bs, 2.0)
    y.sum().backward()
    want, leaves = formula(x, Ws, biases, As, Bs, 2.0)
    want[0].sum().backward()
    near(As[0].grad, leaves[1].grad, torch.float32)
    assert (As[1].grad == 0).all() and (Bs[1].grad == 0).all()


def test_autocast_decides_the_dtype():
    x, Ws, biases, As, Bs = case(torch.float32, 4, 12, (8,), (5,))
    with torch.autocast(DEVICE, torch.bfloat16):
        (y,) = lora_grouped(x, Ws, biases, As, Bs, 1.0)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == As[0].grad.dtype == torch.float32


def test_what_does_not_fit_is_an_error():
    x, Ws, biases, As, Bs = case(torch.float32, 4, 12, (8, 6), (5,))
    with pytest.raises(ValueError, match="as many of each"):
        lora_grouped(x, Ws, biases, As, Bs[:1], 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        lora_grouped(x, Ws, biases, As, Bs[::-1], 1.0)
    with pytest.raises(ValueError, match="do not fit"):
        lora_grouped(x[:, 1:], Ws, biases, As, Bs, 1.0)
    with pytest.raises(ValueError, match="2 adapters need a plan"):
        lora_grouped(x, Ws, biases, [torch.stack([A, A]) for A in As], [torch.stack([B, B]) for B in Bs], 1.0)
    with pytest.raises(ValueError, match="the plan is for 2 rows, but x has 5"):
        lora_grouped(x, Ws, biases, As, Bs, 1.0, plan=plan_rows(torch.zeros(2, dtype=torch.int32), 1))
    with pytest.raises(ValueError, match="requires_grad = False"):
        lora_grouped(x, [W.clone().requires_grad_() for W in Ws], biases, As, Bs, 1.0)


# ------------------------------------------------------------------------------------------------- DoRA's row norms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("r, d_out, d_in", [(1, 1, 1), (3, 17, 65), (16, 40, 64), (128, 20, 31)])
def test_row_norms(r, d_out, d_in, dtype):
    torch.manual_seed(r)
    W, A, B = randn(d_out, d_in, dtype=dtype), randn(r, d_in).requires_grad_(), randn(d_out, r).requires_grad_()
    norms = dora_row_norm(W, A, B, 0.3)
    want = torch.linalg.vector_norm(W.double() + 0.3 * B.detach().double() @ A.detach().double(), dim=1)
    near(norms, want, torch.float32)
    assert norms.dtype == torch.float32
    assert not norms.requires_grad and norms.grad_fn is None  # DoRA takes them for constants


def test_a_row_that_the_update_cancels_has_norm_zero():
    W = torch.tensor([[1.0, -2.0], [3.0, 4.0]], device=DEVICE)
    A, B = torch.tensor([[1.0, -2.0]], device=DEVICE), torch.tensor([[-1.0], [0.0]], device=DEVICE)
    assert dora_row_norm(W, A, B, 1.0).tolist() == [0.0, 5.0]


def test_row_norms_of_a_transposed_weight():
    """GPT-2's Conv1D stores W the other way round."""
    W, A, B = randn(12, 30), randn(2, 12), randn(30, 2)
    want = torch.linalg.vector_norm(W.T.double() + B.double() @ A.double(), dim=1)
    near(dora_row_norm(W.T, A, B, 1.0), want, torch.float32)


# --------------------------------------------------------------------------------- what the compiler makes of them


def compiled(kernel, capability, types, constants, sixteens=(), **options):
    """The kernel compiled for a GPU that need not be here.

    types: {argument: type, or a tuple of them}; arguments without one are 32-bit integers. As at a launch, an integer
    that equals 1 is a constant: type "one".   sixteens: arguments that a launch would find to be multiples of 16
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature, values, known = {}, dict(constants), {}
    for i, name in enumerate(inspect.signature(kernel.fn).parameters):
        kind = types.get(name, "i32")
        if name in constants:
            kind = "constexpr"
        elif isinstance(kind, tuple):
            values |= {(i, j): 1 for j, part in enumerate(kind) if part == "one"}
            kind = tuple("constexpr" if part == "one" else part for part in kind)
        elif kind == "one":
            kind, values[name] = "constexpr", 1
        signature[name] = kind
        if name in sixteens:
            known[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    return compile(ASTSource(kernel, signature, constexprs=values, attrs=known), target=target, options=options)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("capability, dtype", [((7, 5), "fp16"), ((7, 5), "bf16"), ((8, 9), "bf16")])
def test_the_kernels_compile_without_a_gpu(capability, dtype, tmp_path, monkeypatch):
    """At the largest rank they stay within a block's shared memory: 64 KB on a T4, 99 KB on an L4."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = compile_all(dtype, 128, capability, 3)
    for program in made:
        assert program.metadata.shared <= (64 if capability < (8, 0) else 99) * 1024
        assert len(program.asm["cubin"]) > 0
    if capability < (8, 0):
        assert tiles(128, torch.float16, capability)["DOT"] == tl.float32
        assert not any("cp.async" in program.asm["ptx"] for program in made)
    else:
        assert all("mma" in program.asm["ptx"] for program in made[:3])  # tensor cores


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_kernels_compile_for_one_of_everything(tmp_path, monkeypatch):
    """One row, one adapter, one projection, rank 1 and width 1, each of which the compiler sees as a constant."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compile_all("bf16", 1, (8, 0), 1, one="one")


def compile_all(dtype, R, capability, P, one="i32"):
    """shrink, expand of P outputs and into one, outer, and the row norms."""
    torch_dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    how = {**tiles(R, torch_dtype, capability), "RANK_FIRST": True, "CHUNK": 64 if capability >= (8, 0) else 32}
    data, weights = (f"*{dtype}",) * P, ("*fp32",) * P
    types = dict.fromkeys(("order", "chunk_adapter", "chunk_first", "chunk_rows", "starts", "ranks"), "*i32")
    types |= dict.fromkeys(("v", "scales", "A", "B", "norms"), "*fp32") | {"W": f"*{dtype}", "scale": "fp32"}
    types |= dict.fromkeys(("n_rows", "n", "R", "d_out", "d_in"), one)
    types |= {"xs": data, "ys": data, "matrices": weights, "grads": weights}
    types |= {"strides": (one,) * P, "widths": (one,) * P}
    together = {"ys": data[:1], "strides": (one,), "widths": (one,)}
    transposed = {**how, "RANK_FIRST": False}
    return [
        compiled(shrink_kernel, capability, types, how),
        compiled(expand_kernel, capability, types, transposed),
        compiled(outer_kernel, capability, types, {**how, "CHUNK": 32}),
        compiled(expand_kernel, capability, types | together, how),
        compiled(outer_kernel, capability, types, {**transposed, "CHUNK": 32}),
        compiled(row_norm_kernel, capability, types, {"ROWS": 16, "BLOCK_R": 32, "BLOCK_K": 64}),
    ]
