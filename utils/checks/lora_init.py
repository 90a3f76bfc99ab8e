"""Chapter 02, the starting values of A and B, judged by their statistics."""

import math

import torch

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import pick
from utils.methods import lora


def init_cases(rng):
    """Large enough that a standard deviation is known to 2 % and no dimension can be taken for another."""
    drawn = [(256, 128, 32), (100, 300, pick(rng, 70, 80)), (512, pick(rng, 192, 256), 24)]
    return [Case({"d_in": i, "d_out": o, "r": r}, numbers={"d_in": i, "d_out": o, "r": r}) for i, o, r in drawn]


def init_findings(attempt, d_in, d_out, r):
    drawn = [attempt(d_in, d_out, r), attempt(d_in, d_out, r)]
    drawn += [attempt(d_in, d_out, r, torch.Generator().manual_seed(7)) for _ in range(2)]
    for pair in drawn:
        if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(t, torch.Tensor) for t in pair)):
            return {"two tensors": False}
    (A, B), (A2, _), (A3, _), (A4, _) = [[t.detach() for t in pair] for pair in drawn]
    found = {"two tensors": True, "shape of A": tuple(A.shape), "shape of B": tuple(B.shape),
             "dtypes": (str(A.dtype), str(B.dtype))}
    A, B = A.double(), B.double()
    return found | {
        "B is zero": not B.any().item(),
        "A is zero": not A.any().item(),
        "rows of A differ": not torch.equal(A[0], A[-1]),
        "standard deviation of A": A.std().item(),
        "A is centred": abs(A.mean()).item() < 0.1 * A.std().clamp_min(1e-9).item(),
        "A is uniform": A.abs().max().item() < 2 * A.std().item(),
        "two calls differ": not torch.equal(A, A2.double()),
        "the generator decides": torch.equal(A3, A4),
    }


def uniform(rows, columns, bound, generator=None):
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


def init_kaiming(d_in, d_out, r, generator=None):
    A = torch.empty(r, d_in)
    torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    return A, torch.zeros(d_out, r)


def init_kaiming_default(d_in, d_out, r, generator=None):
    A = torch.empty(r, d_in)
    torch.nn.init.kaiming_uniform_(A, generator=generator)
    return A, torch.zeros(d_out, r)


GAUSSIAN = (
    "That is Gaussian, as in the paper's text; the authors' code, and this exercise, draw uniformly in +-1/sqrt(d_in)."
)

LORA_INIT = Exercise(
    name="lora_init",
    reference=lora.lora_init,
    cases=init_cases,
    call=init_findings,
    tolerance=0.06,
    mistakes=(
        Mistake("both_zero", lambda i, o, r, g=None: (torch.zeros(r, i), torch.zeros(o, r)),
                "A and B are both zero. The gradient of A holds B and that of B holds A, so both are zero too and "
                "stay so: a saddle that training never leaves. Draw one of them at random."),
        Mistake("constant_A", lambda i, o, r, g=None: (torch.full((r, i), i**-0.5), torch.zeros(o, r)),
                "All entries of A are the same. Then its {r} rows get the same gradient at every step and stay equal: "
                "you pay for rank {r} and train rank 1. Draw A at random."),
        Mistake("A_zero_B_random", lambda i, o, r, g=None: (torch.zeros(r, i), uniform(o, r, r**-0.5, g)),
                "A is zero and B random. That starts at the base model and trains too, but it is the other way round: "
                "the paper and peft draw A and set B to zero."),
        Mistake("both_random", lambda i, o, r, g=None: (uniform(r, i, i**-0.5, g), uniform(o, r, i**-0.5, g)),
                "B is not zero, so B A is not, and the model has changed before the first step. Set B to zero."),
        Mistake("unit_normal", lambda i, o, r, g=None: (torch.randn(r, i, generator=g), torch.zeros(o, r)),
                "A is drawn from N(0, 1). It should be uniform in +-1/sqrt(d_in), so that A x is no larger than x, "
                "whatever d_in ({d_in} here)."),
        Mistake("gaussian", lambda i, o, r, g=None: (torch.randn(r, i, generator=g) * i**-0.5, torch.zeros(o, r)),
                GAUSSIAN),
        Mistake("gaussian_of_r", lambda i, o, r, g=None: (torch.randn(r, i, generator=g) / r, torch.zeros(o, r)),
                GAUSSIAN),
        Mistake("gaussian_as_wide",
                lambda i, o, r, g=None: (torch.randn(r, i, generator=g) * (3 * i) ** -0.5, torch.zeros(o, r)),
                GAUSSIAN),
        Mistake("bound_of_r", lambda i, o, r, g=None: (uniform(r, i, r**-0.5, g), torch.zeros(o, r)),
                "Your bound is 1/sqrt(r). Each entry of A x sums d_in products, not r: the bound is 1/sqrt(d_in)."),
        Mistake("bound_of_d_out", lambda i, o, r, g=None: (uniform(r, i, o**-0.5, g), torch.zeros(o, r)),
                "Your bound is 1/sqrt(d_out). A reads the input, so d_in belongs there."),
        Mistake("bound_not_rooted", lambda i, o, r, g=None: (uniform(r, i, 1 / i, g), torch.zeros(o, r)),
                "Your bound is 1/d_in; the square root is missing."),
        Mistake("kaiming_default", init_kaiming_default,
                "A is sqrt(6) times too wide: kaiming_uniform_ gives the bound 1/sqrt(d_in) only with a=sqrt(5)."),
        Mistake("only_positive",
                lambda i, o, r, g=None: (torch.rand(r, i, generator=g) / math.sqrt(i), torch.zeros(o, r)),
                "A holds no negative numbers: torch.rand is uniform in 0 to 1. Shift it to be centred on zero."),
        Mistake("shapes_swapped", lambda i, o, r, g=None: (uniform(i, r, i**-0.5, g), torch.zeros(r, o)),
                "Both shapes are transposed: A is (r, d_in) and B is (d_out, r), as nn.Linear stores weights."),
        Mistake("order_swapped", lambda i, o, r, g=None: (torch.zeros(o, r), uniform(r, i, i**-0.5, g)),
                "You returned B first. A comes first, then B."),
        Mistake("generator_ignored", lambda i, o, r, g=None: (uniform(r, i, i**-0.5), torch.zeros(o, r)),
                "The generator has no effect: the same seed gave two different A. Hand it to the function that draws."),
        Mistake("always_the_same",
                lambda i, o, r, g=None: (uniform(r, i, i**-0.5, torch.Generator().manual_seed(0)), torch.zeros(o, r)),
                "Two calls gave the same A. Layers that start alike are not independent: do not seed inside."),
        Mistake("half", lambda i, o, r, g=None: (uniform(r, i, i**-0.5, g).half(), torch.zeros(o, r)), None,
                "float32 is expected for A and B"),
        Mistake("a_list", lambda i, o, r, g=None: uniform(r, i, i**-0.5, g), None, "return A, B"),
    ),
    alternatives=(
        init_kaiming,
        lambda i, o, r, g=None: ((2 * torch.rand(r, i, generator=g) - 1) * i**-0.5, torch.zeros(o, r)),
        lambda i, o, r, g=None: (torch.nn.Parameter(uniform(r, i, i**-0.5, g)), torch.nn.Parameter(torch.zeros(o, r))),
    ),
    explain={
        "two tensors": "Two tensors are expected, as a tuple: return A, B.",
        "A is centred": "A is not centred on zero. Draw from -1/sqrt(d_in) to 1/sqrt(d_in).",
        "A is uniform": "The spread of A is right and its shape is not uniform: values beyond 1/sqrt(d_in) occur.",
        "standard deviation of A": "The standard deviation of A is {yours:.4f}, and {expected:.4f} is expected: a "
        "number uniform in +-b has b/sqrt(3), and b is 1/sqrt(d_in).",
        "dtypes": "float32 is expected for A and B; yours are {yours}.",
    },
    fact=lambda cases: "With B = 0 the first step moves B alone: the gradient of A holds a factor B. "
    f"Here A is drawn with standard deviation 1/sqrt(3 * {cases[0].inputs['d_in']}) = "
    f"{(3 * cases[0].inputs['d_in']) ** -0.5:.3f}.",
)

EXERCISES = (LORA_INIT,)
