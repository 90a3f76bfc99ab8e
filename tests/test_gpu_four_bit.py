"""4-bit weights against bitsandbytes' CUDA kernels: `make gpu-test`. Without a GPU, all of this is skipped."""

import pytest
import torch

from utils.kernels import capability_of
from utils.kernels.four_bit import dequantize, gemm, gemv, matmul, route
from utils.quantization.linear import NF4Linear

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
functional = pytest.importorskip("bitsandbytes").functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# of the largest output, for sums of some thousand products: float32 sums, and in 16 bits W', y and bitsandbytes' own
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def pair(shape, dtype, kind="nf4", double_quant=False, block_size=64):
    """A random weight as bitsandbytes quantizes it: its codes and state, and the same as our functions' arguments."""
    W = torch.randn(shape, device="cuda", dtype=dtype)
    packed, state = functional.quantize_4bit(
        W, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )  # fmt: skip
    nested = (state.offset, state.state2.absmax, state.state2.code) if double_quant else None
    ours = {"packed": packed, "absmax": state.absmax, "code": state.code, "shape": W.shape, "block_size": block_size}
    return packed, state, ours | {"nested": nested}


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, block_size", [((4096, 4096), 64), ((1000, 344), 128), ((11008, 4096), 4096)])
def test_unpacking_nf4_is_equal_to_the_bit(shape, block_size, dtype, double_quant):
    packed, state, ours = pair(shape, dtype, "nf4", double_quant, block_size)
    assert torch.equal(dequantize(**ours, dtype=dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_fp4_to_the_last_bit(dtype):
    """bitsandbytes' kernel has FP4's numbers typed in; the code book that it saves has been divided by 12."""
    packed, state, ours = pair((1024, 1024), dtype, "fp4")
    theirs = functional.dequantize_4bit(packed, state)
    torch.testing.assert_close(dequantize(**ours, dtype=dtype), theirs, rtol=max(1e-6, torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 8192), (4096, 11008), (1000, 344)])
def test_products(shape, dtype, double_quant):
    """Every way that can take the rows, and bitsandbytes, against the product in float64."""
    from bitsandbytes import matmul_4bit

    packed, state, ours = pair(shape, dtype, "nf4", double_quant)
    means = dequantize(**ours, dtype=torch.float32).double()
    for rows in (1, 3, 16, 17, 64, 65, 300):
        x = torch.randn(rows, shape[1], device="cuda", dtype=dtype)
        bias = torch.randn(shape[0], device="cuda", dtype=dtype)
        exact = x.double() @ means.T + bias.double()
        ways = {"matmul": matmul, "gemm": gemm} | ({"gemv": gemv} if rows <= 16 else {})
        for name, way in ways.items():
            y = way(x, bias=bias, **ours)
            error = (y.double() - exact).abs().max() / exact.abs().max()
            assert y.dtype == dtype and error < TOLERANCE[dtype], (name, rows, error.item())
            assert torch.equal(y, way(x, bias=bias, **ours)), (name, rows)  # the same bits again
        if shape[1] % 64:
            continue  # a block that goes on in the next row is more than bitsandbytes promises
        theirs = matmul_4bit(x, packed.t(), bias=bias, quant_state=state)
        assert (y.double() - theirs.double()).abs().max() < 2 * TOLERANCE[dtype] * exact.abs().max()


def test_a_decoded_token_can_be_captured_in_a_graph():
    """Nothing waits for the GPU and nothing is read back, so a layer can be replayed."""
    *_, ours = pair((4096, 4096), torch.float16, "nf4", True)
    x = torch.randn(1, 4096, device="cuda", dtype=torch.float16)
    assert route(1, 4096, x.dtype, capability_of(x)) == "gemv"
    expected = matmul(x, **ours)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(x, **ours)
    y.zero_()
    graph.replay()
    assert torch.equal(y, expected)


def test_a_layer_trains_through_its_four_bits():
    """dL/dx through the codes, against the same layer with W' in 16 bits."""
    W = torch.randn(512, 256, device="cuda", dtype=torch.float16) / 16
    layer = NF4Linear.from_linear(W)
    x = torch.randn(33, 256, device="cuda", dtype=torch.float16, requires_grad=True)
    layer(x).square().sum().backward()
    dense = x.detach().clone().requires_grad_()
    (dense @ layer.dequantize().T).square().sum().backward()
    torch.testing.assert_close(x.grad, dense.grad, rtol=0.02, atol=0.02 * dense.grad.abs().max().item())
