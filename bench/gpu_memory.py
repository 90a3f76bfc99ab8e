"""The peak of a training step, predicted and measured, of models of real size with random weights.

    rows = [measure(case) for case in CASES]          on a GPU; tests/test_gpu_memory.py does it for `make gpu-test`

A row whose case ran out of memory stays: `measured` is None, and `predicted` says by how much.
"""

from dataclasses import asdict, dataclass

import torch
from torch import nn

from utils import LoRA, attach
from utils.architectures import architecture
from utils.memory.estimate import estimate, frozen_in_blocks
from utils.memory.instruments import LiveBytes

ADAPTER = LoRA(r=16, targets="all-linear")


@dataclass(frozen=True)
class Case:
    """way: "full, fp32", "full, bf16", "LoRA" (over bf16) or "QLoRA" (over NF4 with double quantization)"""

    model: str
    way: str
    batch: int
    length: int
    checkpointing: bool = False


CASES = (
    Case("GPT-2", "full, fp32", 8, 1024),
    Case("OPT-1.3b", "full, fp32", 4, 1024),
    Case("OPT-1.3b", "full, bf16", 4, 1024),
    Case("Qwen2.5-0.5B", "full, bf16", 4, 1024),
    Case("Llama-2-7B", "LoRA", 1, 1024),
    Case("Llama-2-7B", "LoRA", 4, 2048, checkpointing=True),
    Case("Llama-3-8B", "LoRA", 1, 2048, checkpointing=True),
    Case("Llama-2-7B", "QLoRA", 1, 1024),
    Case("Llama-2-7B", "QLoRA", 4, 2048, checkpointing=True),
    Case("Llama-2-7B", "full, bf16", 1, 1024),
    Case("Llama-2-7B", "full, fp32", 1, 512),
    Case("Llama-2-13B", "full, bf16", 1, 1024, checkpointing=True),
    Case("Llama-2-70B", "QLoRA", 1, 1024, checkpointing=True),
)
RECIPES = {"full, fp32": "fp32", "full, bf16": "pure bf16", "LoRA": "adapters in fp32", "QLoRA": "adapters in fp32"}
NO_DROPOUT = {
    "GPT2Config": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "OPTConfig": {"dropout": 0.0},
}


def predicted(case, device="cuda", base=None):
    """The Estimate of a case. base: a model instead of the table's"""
    return estimate(
        base or case.model, None if case.way.startswith("full") else ADAPTER, recipe=RECIPES[case.way],
        batch=case.batch, length=case.length, checkpointing=case.checkpointing, quantized=case.way == "QLoRA",
        device=device,
    )  # fmt: skip


def filled(model, dtype, device, quantized=False):
    """A model from the meta device with random numbers, made layer by layer on the device. The model is changed.

    quantized: the linear layers of its blocks in NF4, so that no more than one of them is ever there whole
    """
    packed = {id(m.weight) for m in frozen_in_blocks(model.requires_grad_(False))} if quantized else set()
    made = {}  # tied weights stay tied
    for path, module in list(model.named_modules()):
        if hasattr(module, "inv_freq"):  # rotary positions are computed, not random
            model.set_submodule(path, type(module)(module.config).to(device))
        for name, weight in list(module.named_parameters(recurse=False)):
            if id(weight) in packed:
                model.set_submodule(path, in_four_bits(module, dtype, device))
                break
            if id(weight) not in made:
                made[id(weight)] = nn.Parameter(torch.randn(weight.shape, dtype=dtype, device=device) / 50)
            setattr(module, name, made[id(weight)])
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.zeros_like(buffer, device=device))
    return model


def in_four_bits(linear, dtype, device):
    """A layer of bitsandbytes' in place of a linear one, with random numbers."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    layer = Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype,
                       compress_statistics=True, quant_type="nf4", device="meta")  # fmt: skip
    weight = torch.randn(linear.out_features, linear.in_features, dtype=dtype, device=device) / 50
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(device)
    if linear.bias is not None:
        layer.bias = nn.Parameter(torch.zeros(linear.out_features, dtype=dtype, device=device), requires_grad=False)
    return layer


def prepared(case, device="cuda", base=None):
    """(the model, a function that takes one step) of a case; two steps have been taken."""
    if base is None:
        config = architecture(case.model).config
        base = architecture(case.model, use_cache=False, **NO_DROPOUT.get(type(config).__name__, {}))
    dtype = torch.float32 if case.way == "full, fp32" else torch.bfloat16
    model = filled(base, dtype, device, case.way == "QLoRA").train()
    if case.way.startswith("full"):
        model.requires_grad_(True)
    else:
        attach(model, ADAPTER)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
    ids = torch.randint(3, model.config.vocab_size, (case.batch, case.length), device=device)

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step.optimizer, step.ids = optimizer, ids
    for _ in range(2):  # makes the moments, and lets kernels choose their workspaces
        step()
    return model, step


def peak_on_gpu(case):
    """(bytes allocated at the peak of a step, bytes reserved), or (None, None) when it ran out of memory."""
    torch.cuda.empty_cache()
    try:
        _, step = prepared(case)
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    except torch.cuda.OutOfMemoryError:
        return None, None
    finally:
        step = None  # the model goes with it
        torch.cuda.empty_cache()


def peak_on_cpu(case, base):
    """The same as live bytes, for a small model: what checks this file where there is no GPU."""
    model, step = prepared(case, "cpu", base)
    moments = [t for state in step.optimizer.state.values() for t in state.values()]
    own = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in (*model.parameters(), *moments)}
    with LiveBytes([*model.parameters(), *model.buffers(), *moments, step.ids]) as live:
        step()
    return sum(own.values()) + live.peak


def measure(case):
    """A row for data/measurements."""
    expected = predicted(case).peak
    measured, reserved = peak_on_gpu(case)
    ratio = None if measured is None else expected / measured
    return asdict(case) | {"predicted": expected, "measured": measured, "reserved": reserved, "ratio": ratio}
