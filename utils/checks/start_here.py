"""Chapter 00: the warm-up exercise."""

import math

import numpy as np
import torch

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.hardware import tensor_bytes


def cases(rng):
    n, m = pick(rng, 3, 5, 7), pick(rng, 11, 13, 17)
    drawn = [((n, m), torch.float32), ((m,), torch.float64), ((2, n, m), torch.bfloat16), ((n, 1, m), torch.int8)]
    return [Case({"shape": shape, "dtype": dtype}) for shape, dtype in drawn] + [
        Case({"shape": (), "dtype": pick(rng, torch.float32, torch.float16)}, kinds=("scalar",)),
    ]


def product_without_start(shape, dtype):
    numbers = shape[0]
    for length in shape[1:]:
        numbers = numbers * length
    return numbers * dtype.itemsize


def product_by_loop(shape, dtype):
    size = dtype.itemsize
    for length in shape:
        size *= length
    return size


TENSOR_BYTES = Exercise(
    name="tensor_bytes",
    reference=tensor_bytes,
    cases=cases,
    mistakes=(
        Mistake("numbers", lambda shape, dtype: math.prod(shape),
                "You counted numbers, not bytes. How many bytes does one number of this dtype take? dtype.itemsize "
                "says."),
        Mistake("bits", lambda shape, dtype: math.prod(shape) * dtype.itemsize * 8,
                "Your answer is exactly 8 times the expected one: those are bits. dtype.itemsize is in bytes already."),
        Mistake("sum", lambda shape, dtype: sum(shape) * dtype.itemsize,
                "You added the lengths of the axes. A (3, 4) tensor holds 3 * 4 numbers: multiply them."),
        Mistake("always_four", lambda shape, dtype: math.prod(shape) * 4,
                "You took 4 bytes for every number. That is right for float32 only; look at dtype.itemsize."),
        Mistake("always_two", lambda shape, dtype: math.prod(shape) * 2,
                "You took 2 bytes for every number. That is right for float16 and bfloat16 only; look at "
                "dtype.itemsize."),
        Mistake("float_for_scalar", lambda shape, dtype: np.prod(shape) * dtype.itemsize,
                "For shape () yours is a float; return an int, math.prod gives 1 for ()."),
        Mistake("no_scalar", product_without_start, None, "A tensor of shape () holds one number"),
        Mistake("scalar_is_empty", lambda shape, dtype: math.prod(shape) * dtype.itemsize if shape else 0, None,
                "A tensor of shape () holds one number"),
        Mistake("float", lambda shape, dtype: math.prod(shape) * dtype.itemsize / 1, None,
                "a float, and an int is expected"),
        Mistake("tensor", lambda shape, dtype: torch.tensor(math.prod(shape) * dtype.itemsize), None,
                "a Tensor, and an int is expected"),
    ),
    alternatives=(
        product_by_loop,
        lambda shape, dtype: torch.empty(shape, dtype=dtype).nbytes,
        lambda shape, dtype: torch.Size(shape).numel() * torch.empty((), dtype=dtype).element_size(),
    ),
    kinds={
        "scalar": "Works for (n, m) and fails for (). A tensor of shape () holds one number, so an empty product is 1.",
    },
    fact=f"A 4096 x 4096 layer in bfloat16 takes {tensor_bytes((4096, 4096), torch.bfloat16):,} bytes.",
)

EXERCISES = (TENSOR_BYTES,)
