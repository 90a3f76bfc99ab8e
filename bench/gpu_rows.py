"""What `python -m bench.gpu bench` measures. Each function returns the rows of one table, as dicts with equal keys.

Times are milliseconds between two CUDA events, the median of several turns; what is compared takes turns. Before each
call the cache is emptied, as the rest of a model would. A bound is the bytes that must move, through the bandwidth that
a copy reaches on the same GPU. Outputs are compared before anything is timed.
"""

import statistics
import time
from functools import partial

import bitsandbytes
import torch
from peft import LoraConfig
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

from bench.common import pair, trained
from utils import LoRA
from utils.hardware import settings
from utils.kernels import capability_of, runs_triton
from utils.kernels.dora import dora_row_norm, dora_row_norm_reference
from utils.kernels.four_bit import dequantize, gemm, gemv, matmul, route
from utils.kernels.lora import expand, expand_reference, lora_grouped, plan_rows, shrink, shrink_reference

GROUPS = {"qkv": (4096, (4096, 1024, 1024)), "gate_up": (4096, (14336, 14336))}  # Llama-3-8B's d_in and d_out
# (group, rows, adapters, r): training with one adapter; decoding with 1, 8 and 64; prompts for 8
PRODUCTS = [("qkv", 4096, 1, 16), ("qkv", 4096, 1, 64), ("gate_up", 4096, 1, 16)]
PRODUCTS += [("qkv", 64, 1, 16), ("qkv", 64, 8, 16), ("qkv", 64, 64, 16), ("qkv", 512, 8, 16)]
LAYERS = [("qkv", 4096, 16), ("qkv", 256, 16), ("gate_up", 4096, 16)]  # (group, rows, r)
NORMS = [(4096, 4096, 16), (14336, 4096, 16), (4096, 4096, 64)]  # (d_out, d_in, r)
# (shape (d_out, d_in), double quantization): q_proj, up_proj of Llama-2-7B, q_proj and up_proj of 70B
FOUR_BIT = [(shape, dq) for shape in ((4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192)) for dq in (False, True)]
# (shape, double quantization, rows): decoding, with k_proj and down_proj too; then more and more rows, and a prompt
FEW = [(shape, dq, 1) for shape in ((4096, 4096), (11008, 4096), (4096, 11008)) for dq in (False, True)]
FEW += [(shape, True, 1) for shape in ((8192, 8192), (1024, 8192), (28672, 8192), (8192, 28672))]
MANY = [((4096, 4096), True, rows) for rows in (2, 4, 8, 16, 32, 64, 128, 512, 2048)]
MANY += [((28672, 8192), True, rows) for rows in (4, 16, 64, 512)]
LLAMA = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
    "num_attention_heads": 16, "num_key_value_heads": 4, "use_cache": False,
}  # fmt: skip


def lora_kernels(repeats, device="cuda", products=PRODUCTS, groups=GROUPS):
    """Shrink and expand: kernels, references, the bound; `base` are the frozen products whose outputs they add to."""
    dtype, bandwidth, rows = half(device), copy_bandwidth(device, repeats), []
    for group, n_rows, n, r in products:
        d_in, widths = groups[group]
        random = partial(torch.randn, device=device, dtype=dtype)
        x, Ws = random(n_rows, d_in), [random(w, d_in) for w in widths]
        As, Bs = [random(n, r, d_in) / d_in**0.5 for _ in widths], [random(n, w, r) for w in widths]
        owners = torch.arange(n_rows, device=device) % n  # every adapter has rows, and no two neighbours share one
        plan = plan_rows(owners, n, 64 if n == 1 and n_rows > 64 else 16)
        scales = torch.ones(len(widths), n, device=device)
        ranks = torch.full((len(widths), n), r, dtype=torch.int32, device=device)

        def add(shrink, expand, ys, x=x, As=As, Bs=Bs, scales=scales, ranks=ranks, plan=plan):
            expand(ys, shrink([x] * len(ys), As, scales, ranks, plan), Bs, ranks, plan)

        ys = {name: [x.new_zeros(n_rows, w) for w in widths] for name in ("kernels", "reference")}
        fns = {
            "base_ms": lambda x=x, Ws=Ws: [x @ W.T for W in Ws],
            "kernels_ms": partial(add, shrink, expand, ys["kernels"]),
            "reference_ms": partial(add, shrink_reference, expand_reference, ys["reference"]),
        }
        fns["kernels_ms"]()
        fns["reference_ms"]()
        same(ys["kernels"], ys["reference"])
        v_bytes = 4 * len(widths) * n_rows * r
        moved = sum(t.nbytes for t in (x, *As, *Bs)) + 2 * v_bytes + 2 * sum(y.nbytes for y in ys["kernels"])
        about = {"group": group, "rows": n_rows, "adapters": n, "r": r, "dtype": name_of(dtype)}
        rows.append({**about, **medians(fns, device, repeats), "bound_ms": moved / bandwidth / 1e6})
    return rows


class Group(nn.Module):
    """Projections of one x, so that both libraries can find them by name."""

    def __init__(self, d_in, widths):
        super().__init__()
        self.proj = nn.ModuleDict({f"p{i}": nn.Linear(d_in, w, bias=False) for i, w in enumerate(widths)})

    def forward(self, x):
        return tuple(projection(x) for projection in self.proj.values())


def lora_layers(repeats, device="cuda", layers=LAYERS, groups=GROUPS):
    """Forward and backward of projections with a LoRA each: frozen, grouped kernels, our separate layers, PEFT's."""
    dtype, rows = half(device), []
    for group, n_rows, r in layers:
        torch.manual_seed(0)
        d_in, widths = groups[group]
        base = Group(d_in, widths).to(device, dtype).requires_grad_(False)
        names = [f"p{i}" for i in range(len(widths))]
        models = pair(
            base,
            LoRA(r=r, alpha=2 * r, targets=names, init="random_b"),
            LoraConfig(r=r, lora_alpha=2 * r, target_modules=names),
        )
        parts = list(models["ours"].proj.values())

        def grouped(x, parts=parts):
            weights = [part.core.weight for part in parts]
            return lora_grouped(x, weights, None, [p.A for p in parts], [p.B for p in parts], parts[0].scale)

        forwards = {"frozen": base, "grouped": grouped, "ours": models["ours"], "peft": models["peft"]}
        x = torch.randn(n_rows, d_in, device=device, dtype=dtype, requires_grad=True)
        with torch.no_grad():
            same(grouped(x), models["peft"](x))
            same(models["ours"](x), models["peft"](x))
        gradients = [torch.randn(n_rows, w, device=device, dtype=dtype) for w in widths]

        def step(forward, x=x, gradients=gradients, models=models):
            x.grad = None
            for parameter in trained(models["ours"]) + trained(models["peft"]):
                parameter.grad = None
            torch.autograd.backward(forward(x), gradients)

        fns = {f"{name}_ms": partial(step, forward) for name, forward in forwards.items()}
        rows.append({"group": group, "rows": n_rows, "r": r, "dtype": name_of(dtype), **medians(fns, device, repeats)})
    return rows


def dora_norms(repeats, device="cuda", norms=NORMS):
    """DoRA's row norms: the kernel, the square multiplied out, and W + s B A formed; the bound is reading W once."""
    dtype, bandwidth, rows = half(device), copy_bandwidth(device, repeats), []
    for d_out, d_in, r in norms:
        W = torch.randn(d_out, d_in, device=device, dtype=dtype)
        A, B = torch.randn(r, d_in, device=device) / d_in**0.5, torch.randn(d_out, r, device=device)
        fns = {
            "kernel_ms": lambda W=W, A=A, B=B: dora_row_norm(W, A, B, 2.0),
            "multiplied_out_ms": lambda W=W, A=A, B=B: dora_row_norm_reference(W, A, B, 2.0),
            "formed_ms": lambda W=W, A=A, B=B: torch.linalg.vector_norm(W.float() + 2.0 * (B @ A), dim=1),
        }
        same([fns["kernel_ms"](), fns["multiplied_out_ms"]()], [fns["formed_ms"]()] * 2)
        about = {"d_out": d_out, "d_in": d_in, "r": r, "dtype": name_of(dtype)}
        rows.append({**about, **medians(fns, device, repeats), "bound_ms": W.nbytes / bandwidth / 1e6})
    return rows


def four_bit(shape, double_quant, dtype, device):
    """A random weight as bitsandbytes quantizes it to NF4: its codes and state, and our functions' arguments."""
    W = torch.randn(shape, device=device, dtype=dtype)
    packed, state = bitsandbytes.functional.quantize_4bit(W, quant_type="nf4", compress_statistics=double_quant)
    nested = (state.offset, state.state2.absmax, state.state2.code) if double_quant else None
    ours = {"packed": packed, "absmax": state.absmax, "code": state.code, "shape": W.shape, "nested": nested}
    return packed, state, ours | {"block_size": state.blocksize}


def bytes_of(ours):
    """Bytes of a weight's codes and scales."""
    return sum(t.nbytes for t in (ours["packed"], ours["absmax"], *(ours["nested"] or ())))


def four_bit_unpacking(repeats, device="cuda", weights=FOUR_BIT):
    """NF4 to 16 bits: ours and bitsandbytes'; the bound is to read codes and scales and to write the weight.

    of_bound: the share of the copy's bandwidth that ours reaches
    """
    dtype, bandwidth, rows = half(device), copy_bandwidth(device, repeats), []
    for shape, double_quant in weights:
        packed, state, ours = four_bit(shape, double_quant, dtype, device)
        fns = {
            "ours_ms": lambda ours=ours: dequantize(**ours, dtype=dtype),
            "bitsandbytes_ms": lambda p=packed, s=state: bitsandbytes.functional.dequantize_4bit(p, s),
        }
        same([fns["ours_ms"]()], [fns["bitsandbytes_ms"]()])
        ms = medians(fns, device, repeats, queued=True)
        bound = (bytes_of(ours) + fns["ours_ms"]().nbytes) / bandwidth / 1e6
        about = {"shape": name_of_shape(shape), "double_quant": double_quant, "dtype": name_of(dtype)}
        compared = {"to_bitsandbytes": ms["ours_ms"] / ms["bitsandbytes_ms"], "of_bound": bound / ms["ours_ms"]}
        rows.append({**about, **ms, "bound_ms": bound, **compared})
    return rows


def four_bit_products(repeats, device="cuda", products=FEW + MANY):
    """x W'^T by each way there is, and bitsandbytes'; the bound is to read codes, scales and x and to write y once.

    way: the one that `matmul` takes   unpack_ms: W' into memory, then cuBLAS   dense_ms: with W' in 16 bits already
    to_bitsandbytes, of_bound: of matmul
    """
    dtype, bandwidth, rows = half(device), copy_bandwidth(device, repeats), []
    for shape, double_quant, n_rows in products:
        packed, state, ours = four_bit(shape, double_quant, dtype, device)
        x = torch.randn(n_rows, shape[1], device=device, dtype=dtype)
        W = dequantize(**ours, dtype=dtype)
        kernels = runs_triton(x)
        fns = {
            "matmul_ms": partial(matmul, x, **ours),
            "unpack_ms": lambda x=x, ours=ours: linear(x, dequantize(**ours, dtype=dtype)),
            "dense_ms": partial(linear, x, W),
            "bitsandbytes_ms": partial(bitsandbytes.matmul_4bit, x, packed.t(), state),
        }
        if kernels and n_rows <= 16:
            fns["gemv_ms"] = partial(gemv, x, **ours)
        if kernels and n_rows <= 512:
            fns["gemm_ms"] = partial(gemm, x, **ours)
        y = linear(x, W)
        for fn in fns.values():
            same([fn()], [y])
        ms = {"gemv_ms": None, "gemm_ms": None} | medians(fns, device, repeats, queued=True)
        bound = (bytes_of(ours) + x.nbytes + y.nbytes) / bandwidth / 1e6
        way = route(n_rows, shape[1], dtype, capability_of(x)) if kernels else "unpack"
        about = {"shape": name_of_shape(shape), "double_quant": double_quant, "rows": n_rows, "dtype": name_of(dtype)}
        compared = {"to_bitsandbytes": ms["matmul_ms"] / ms["bitsandbytes_ms"], "of_bound": bound / ms["matmul_ms"]}
        rows.append({**about, "way": way, **ms, "bound_ms": bound, **compared})
    return rows


def training_step(repeats, device="cuda", config=LLAMA, tokens=(4, 512)):
    """A step of AdamW on a Llama of random weights, LoRA r=16 on all linear layers: time and peak, ours and PEFT's.

    The base is in 16 bits and the adapters in float32, under autocast; float16 has its GradScaler.
    """
    dtype, rows = half(device), []
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**config)).to(device, dtype).requires_grad_(False)
    models = pair(
        base,
        LoRA(r=16, alpha=32, targets="all-linear"),
        LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    ids = torch.randint(config["vocab_size"], tokens, device=device)

    def step(model, optimizer, scaler):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    fns = {}
    for name in ("ours", "peft"):
        scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
        fns[name] = partial(step, models[name], torch.optim.AdamW(trained(models[name]), lr=1e-4), scaler)
    same([fns["ours"]()], [fns["peft"]()])
    ms = medians(fns, device, repeats)
    for name, fn in fns.items():
        about = {"method": "LoRA", "by": name, "tokens": ids.numel(), "dtype": name_of(dtype)}
        rows.append({**about, "step_ms": ms[name], "peak_mb": peak_bytes(fn, device) / 1e6})
    return rows


BENCHES = {
    "lora_kernels": lora_kernels,
    "lora_layers": lora_layers,
    "dora_norms": dora_norms,
    "four_bit_unpacking": four_bit_unpacking,
    "four_bit_products": four_bit_products,
    "training_step": training_step,
}


# -------------------------------------------------------------------------------------------------- the instruments


def half(device):
    """The 16-bit type that the device multiplies in hardware: bfloat16, or float16 on a T4. float32 on a CPU."""
    return settings(device).dtype


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def name_of_shape(shape):
    return " x ".join(str(side) for side in shape)


def same(first, second):
    """Stop if the outputs differ by more than rounding: their times would say nothing."""
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0.02, atol=0.02 * b.float().abs().max().item())


def medians(fns, device, repeats, queued=False):
    """{name: milliseconds} of each function in {name: fn}; the first two turns are not counted.

    queued: the GPU is kept waiting for half a millisecond before each call, so that what it takes Python to launch a
    kernel of a few microseconds is not measured with it
    """
    cache = torch.empty(2**28 if device == "cuda" else 1, dtype=torch.uint8, device=device)  # more than any GPU's L2
    times = {name: [] for name in fns}
    for turn in range(repeats + 2):
        for name, fn in fns.items():
            cache.zero_()
            ms = milliseconds(fn, device, queued)
            if turn >= 2:
                times[name].append(ms)
    return {name: statistics.median(some) for name, some in times.items()}


def milliseconds(fn, device, queued=False):
    if device != "cuda":
        start = time.perf_counter()
        fn()
        return 1000 * (time.perf_counter() - start)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(10**6)  # cycles
    start.record()
    fn()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def copy_bandwidth(device, repeats):
    """GB/s that a copy of 512 MB reads and writes."""
    source = torch.empty(2**29 if device == "cuda" else 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = medians({"copy": lambda: target.copy_(source)}, device, repeats)["copy"]
    return 2 * source.nbytes / ms / 1e6


def peak_bytes(fn, device):
    """The most that was allocated at once during fn(), beyond what was there before; 0 on a CPU."""
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fn()
    return torch.cuda.max_memory_allocated() - before
