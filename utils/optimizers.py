"""AdamW as a function of numbers and nothing else: what an optimizer keeps, and why; and the same in 8 bits.

AdamW keeps two numbers for each trained one, the moments m and v: 8 bytes in float32. Block-wise 8-bit optimizers
(Dettmers et al. 2022, https://arxiv.org/abs/2110.02861) keep a code book's index for each, and one float32 scale per
256 of them: 2 (1 + 4/256) = 2.03 bytes. A LoRA of rank 64 on Llama-2-7B trains 160 M numbers: 1.28 GB or 0.32 GB.

m is signed; v never is, and has a code book of its own. Both reach over seven decades, since the numbers of a block do;
neighbours differ by 1.4 % of the block's largest at the top. Every step decodes, updates in float32, and encodes again.

What 8 bits cannot hold: a v below 1.6e-7 of its block's largest becomes 0, while its m, the root of it in size, does
not. Should the next gradients be zero, that m is divided by eps alone, and the weight leaps. Dense gradients never get
there. Those of an embedding do, whose rows are seldom used: give it a group of its own with a large min_8bit_size.
"""

import math
from functools import lru_cache, partial

import torch

from utils.methods.settings import is_number, whole
from utils.quantization.blocks import dequantize_blockwise, quantize_blockwise
from utils.quantization.codebooks import dynamic_codebook

BLOCK = 256  # moments per scale
PIECE = 2**22  # numbers updated at once: a whole tensor's moments in float32 would take back what 8 bits save


def adamw_update(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    """One step of AdamW (Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101).

    m <- beta1 m + (1 - beta1) grad              the mean of the gradients, m and v starting at zero
    v <- beta2 v + (1 - beta2) grad^2            the mean of their squares
    p <- p - lr weight_decay p - lr m' / (sqrt(v') + eps)
    m' = m / (1 - beta1^step), v' = v / (1 - beta2^step): without them the first steps would be too small

    p, grad, m, v: tensors of one shape   step: counts from 1
    returns the new p, m and v, in the arguments' dtype; the arguments stay as they are
    """
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**step)
    scale = math.sqrt(1 - beta2**step)
    p = p - lr * weight_decay * p - lr * m_hat / (v.sqrt() / scale + eps)
    return p, m, v


@lru_cache(maxsize=8)
def moment_codebooks(device):
    """(m's, v's): the signed and the unsigned dynamic code book, (256,) float32 each, on this device."""
    return dynamic_codebook(signed=True).to(device), dynamic_codebook(signed=False).to(device)


def adamw8bit_update(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    """One step of AdamW whose moments are kept in 8 bits: decode them, `adamw_update` in float32, encode the new ones.

    p, grad: tensors of one shape, n numbers   step: counts from 1
    m, v: (index, absmax) each: (n,) uint8, and (ceil(n / 256),) float32, one per block of 256
    returns the new p in its dtype, m and v; the arguments stay as they are
    """
    signed, unsigned = moment_codebooks(p.device)
    m = dequantize_blockwise(*m, signed, BLOCK).view_as(p)
    v = dequantize_blockwise(*v, unsigned, BLOCK).view_as(p)
    new, m, v = adamw_update(p.float(), grad.float(), m, v, step, lr, beta1, beta2, eps, weight_decay)
    return new.to(p.dtype), quantize_blockwise(m, signed, BLOCK), quantize_blockwise(v, unsigned, BLOCK)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with 8-bit moments: a torch.optim.AdamW in use, a quarter of it in memory.

    A tensor of fewer than min_8bit_size numbers keeps float32 moments, as in bitsandbytes: little is saved there, and
    biases and norms are sensitive. A group may have its own min_8bit_size, like any other setting.

    The steps are those of bitsandbytes.optim.AdamW8bit on a CPU, but for one thing: before it encodes, its CPU code
    rounds to a grid of 65,536 values, so that a v below 1.6e-5 of its block's largest never becomes smaller than that.

    state of a parameter: step (an int), m and v; in 8 bits these are (n,) uint8, with (blocks,) float32 m_absmax and
    v_absmax beside them   raises ValueError for settings, parameters, gradients or states it has no use for
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, min_8bit_size=4096):
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "min_8bit_size": min_8bit_size}
        super().__init__(params, defaults)

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns what `closure` returns, None without one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise ValueError("AdamW8bit has no use for sparse gradients: build the embedding with sparse=False")
                state = self.state[p]
                if not state:
                    state.update(_fresh_state(p, group["min_8bit_size"]))
                state["step"] += 1
                update = _update_8bit if "m_absmax" in state else _update_float32
                update(p, state, settings)
        return loss

    def load_state_dict(self, state_dict):
        """Continue from what `state_dict` gave. (Torch alone would cast the scales to the parameters' dtype.)"""
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        saved = state_dict["state"]
        for number, p in zip(numbers, params, strict=False):  # super() refuses lists of different lengths
            if number in saved and not _is_state(saved[number], p):
                raise ValueError(f"The state of parameter {number} is not one that AdamW8bit keeps for this shape.")
        super().load_state_dict(state_dict)
        for number, p in zip(numbers, params, strict=True):
            if number in saved:
                self.state[p] = {
                    key: value.to(p.device, copy=True) if torch.is_tensor(value) else value
                    for key, value in saved[number].items()
                }


def _fresh_state(p, min_8bit_size):
    if p.numel() < min_8bit_size:
        return {"step": 0} | {key: torch.zeros_like(p, dtype=torch.float32) for key in ("m", "v")}
    index = {key: torch.zeros(p.numel(), dtype=torch.uint8, device=p.device) for key in ("m", "v")}
    blocks = -(-p.numel() // BLOCK)  # an absmax of zero makes every index a zero
    return {"step": 0} | index | {f"{key}_absmax": torch.zeros(blocks, device=p.device) for key in ("m", "v")}


def _is_state(state, p):
    """Whether this may be the state of p: the right keys, dtypes and sizes, in 8 bits or in float32."""
    if type(state.get("step")) is not int:
        return False
    blocks = -(-p.numel() // BLOCK)
    eight = {"m": (torch.uint8, (p.numel(),)), "v": (torch.uint8, (p.numel(),)),
             "m_absmax": (torch.float32, (blocks,)), "v_absmax": (torch.float32, (blocks,))}  # fmt: skip
    full = {"m": (torch.float32, tuple(p.shape)), "v": (torch.float32, tuple(p.shape))}
    return {k: (t.dtype, tuple(t.shape)) for k, t in state.items() if torch.is_tensor(t)} in (eight, full)


def _update_float32(p, state, settings):
    new, state["m"], state["v"] = adamw_update(
        p.float(), p.grad.float(), state["m"], state["v"], state["step"], *settings
    )
    p.copy_(new)


def _update_8bit(p, state, settings):
    """Blocks do not depend on each other, so a large tensor is updated piece by piece."""
    flat, grad = p.reshape(-1), p.grad.reshape(-1)  # of the parameter itself where it lies in one piece
    for first in range(0, len(flat), PIECE):
        numbers, blocks = slice(first, first + PIECE), slice(first // BLOCK, (first + PIECE) // BLOCK)
        m, v = ((state[key][numbers], state[f"{key}_absmax"][blocks]) for key in ("m", "v"))
        flat[numbers], m, v = adamw8bit_update(flat[numbers], grad[numbers], m, v, state["step"], *settings)
        for key, (index, absmax) in (("m", m), ("v", v)):
            state[key][numbers], state[f"{key}_absmax"][blocks] = index, absmax
    if not p.is_contiguous():
        p.copy_(flat.view_as(p))


def _check(group):
    for name in ("lr", "eps", "weight_decay"):
        if not is_number(group[name]) or not 0 <= group[name] < math.inf:
            raise ValueError(f"{name} is {group[name]!r}; it must be a number from 0 up")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2 or not all(is_number(b) and 0 <= b < 1 for b in betas):
        raise ValueError(f"betas is {betas!r}; it must be two numbers from 0 to below 1")
    whole("min_8bit_size", group["min_8bit_size"])
    for p in group["params"]:
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"AdamW8bit updates float32, bfloat16 and float16 parameters, not {p.dtype}")


def paged_adamw(params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, bits=32):
    """bitsandbytes' paged AdamW, with moments of 32 or 8 bits: the optimizer that QLoRA was trained with.

    Moments of tensors with 100,000 numbers or more lie in CUDA's unified memory: the driver moves their pages to the
    CPU while something else needs the GPU's memory, and they are fetched before their update. `utils.paging` simulates
    that, and says when it helps. After load_state_dict, bitsandbytes keeps its state on the GPU, and pages no more.

    params: parameters or optimizer groups, on a CUDA device
    returns bitsandbytes' PagedAdamW32bit or PagedAdamW8bit   raises ValueError where there is no unified memory
    """
    if bits not in (32, 8):
        raise ValueError(f"bits is {bits!r}; a paged optimizer keeps moments of 32 or of 8 bits")
    params = [{**p, "params": list(p["params"])} if isinstance(p, dict) else p for p in params]
    tensors = [p for item in params for p in (item["params"] if isinstance(item, dict) else [item])]
    elsewhere = sorted({p.device.type for p in tensors} - {"cuda"})
    if elsewhere:
        raise ValueError(
            f"Paging needs CUDA's unified memory, and these parameters are on {' and '.join(elsewhere)}: "
            "use AdamW8bit or torch.optim.AdamW, which work on any device."
        )
    import bitsandbytes  # only here: it takes a second, and warns where there is no GPU

    build = bitsandbytes.optim.PagedAdamW32bit if bits == 32 else bitsandbytes.optim.PagedAdamW8bit
    return build(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


paged_adamw8bit = partial(paged_adamw, bits=8)
