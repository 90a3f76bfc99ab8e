"""GPU kernels: one file each, with the Triton kernel and a PyTorch reference of the same signature beside it.

A function of this folder runs its kernel where Triton can: for tensors on an NVIDIA GPU, or anywhere under Triton's
interpreter (set TRITON_INTERPRET=1 before Python starts; then print() inside a kernel works too). Otherwise, and for
float64, it runs the reference, which says in plain torch what the kernel computes. Nothing here needs Triton to import.
"""

import os
from types import SimpleNamespace

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no Triton; these two let the kernels' files be read all the same
    triton, tl = SimpleNamespace(jit=lambda kernel: kernel), SimpleNamespace(constexpr=None)
    INSTALLED = False
else:
    INSTALLED = True

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def runs_triton(x):
    """Whether the kernels take this tensor; else the references do."""
    return INSTALLED and x.dtype in DTYPES and (INTERPRETED or x.is_cuda)


def capability_of(x):
    """(major, minor) of the tensor's GPU, or None under the interpreter."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def dot_dtype(dtype, capability):
    """The type in which tl.dot gets its factors; it adds in float32 in any case.

    dtype: of the larger factor   capability: (major, minor), or None for the interpreter
    float32, and not the tensor's own 16 bits, in two cases:
    - the interpreter: its tl.dot takes the bits of a bfloat16 for an integer, and says nothing (1 becomes 16256);
    - below capability 8.0, a T4's 7.5 among them: no bfloat16 in hardware, and Triton uses no tensor cores there, so
      16-bit factors would gain nothing.
    """
    if capability is None or capability < (8, 0) or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def power_of_two(n, least=16):
    """The first power of two that is neither below n nor below `least`; no side of a tl.dot may be shorter than 16."""
    return max(least, 1 << (n - 1).bit_length())
