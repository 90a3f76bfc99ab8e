"""Unpacking NF4 on a CPU, in plain torch, against bitsandbytes' C++.

Ours looks a byte up in a table of 256 pairs, multiplies by the scales and rounds: three passes over numbers that stay
in the cache. bitsandbytes' loop, which uses AVX-512 where there is any, is one pass. From some 30 MB on, what either
writes to comes fresh from the system, and the page faults, the same for both, bring the ratio nearer to 1.
"""

from functools import partial

import bitsandbytes.functional
import torch

from bench.common import ratios
from utils.kernels.four_bit import dequantize
from utils.measure import cpu_times

TARGET = 4  # ours / bitsandbytes', at most
SHAPES = {"2048 x 2048": (2048, 2048), "a quarter of up_proj, Llama-2-7B": (2752, 4096)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure(repeats):
    """The rows of the table, as dicts."""
    return [row(name, dtype, dq, repeats) for name in SHAPES for dtype in DTYPES for dq in (False, True)]


def row(name, dtype, double_quant, repeats):
    """Both unpack the same bytes, to the same bits."""
    torch.manual_seed(0)
    W = torch.randn(SHAPES[name]).to(dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=double_quant)
    nested = (state.offset, state.state2.absmax, state.state2.code) if double_quant else None
    fns = {
        "ours": partial(dequantize, packed, state.absmax, state.code, W.shape, state.blocksize, dtype, nested),
        "bitsandbytes": partial(bitsandbytes.functional.dequantize_4bit, packed, state),
    }
    assert torch.equal(fns["ours"](), fns["bitsandbytes"]())
    times = cpu_times(fns, repeats)
    about = {"weight": name, "dtype": str(dtype).removeprefix("torch."), "double_quant": double_quant}
    found = {"about": about, "turns": repeats, "time_target": TARGET}
    return found | ratios(times, "bitsandbytes")


def table(rows):
    """The rows as text."""
    lines = [
        "Unpacking NF4, blocks of 64: least CPU ms, median ratio",
        f"{'weight':<34}{'dtype':<10}{'scales':<9}{'ours':>9}{'bitsandbytes':>14}{'ratio':>8}{'median':>8}{'target':>8}",
    ]
    for found in rows:
        about, ms = found["about"], found["least_ms"]
        lines.append(
            f"{about['weight']:<34}{about['dtype']:<10}{'8 bits' if about['double_quant'] else '32 bits':<9}"
            f"{ms['ours']:>9.2f}{ms['bitsandbytes']:>14.2f}{found['least_ratio']:>8.2f}{found['median_ratio']:>8.2f}"
            f"{found['time_target']:>8}"
        )
    return "\n".join(lines)
