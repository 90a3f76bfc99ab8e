"""Random inputs for the cases of an exercise. rng is a torch.Generator: fresh in a notebook, seeded in the tests."""

import torch


def pick(rng, *options):
    return options[torch.randint(len(options), (), generator=rng).item()]


def normal(rng, *shape, std=1.0, dtype=torch.float32):
    return (std * torch.randn(shape, generator=rng)).to(dtype)


def low_rank(rng, d_out, d_in, r, dtype=torch.float32):
    """W (d_out, d_in), A (r, d_in) and B (d_out, r), with W x and B A x of about the size of x."""
    W = normal(rng, d_out, d_in, std=d_in**-0.5, dtype=dtype)
    return W, normal(rng, r, d_in, std=d_in**-0.5, dtype=dtype), normal(rng, d_out, r, std=r**-0.5, dtype=dtype)


def layers(rng):
    """(d_out, d_in, r, alpha, kinds) of three layers. Ranks and alphas are chosen so that no two formulas agree."""
    return [
        (32, 32, 8, 16, ()),
        (7, 5, 2, pick(rng, 3, 5, 12), ("rectangular",)),
        (pick(rng, 20, 23, 26), pick(rng, 31, 34, 37), pick(rng, 3, 5, 6), pick(rng, 1, 24, 32), ("rectangular",)),
    ]


def spaced_code(rng, k):
    """A code book (k,) from -1 to 1, whose gaps differ up to threefold."""
    steps = (1 + 2 * torch.rand(k - 1, generator=rng)).cumsum(0)
    return torch.cat([torch.tensor([-1.0]), 2 * steps / steps[-1] - 1])


def near(rng, code, places):
    """Values (n,) whose nearest code book numbers are code[places], none of them close to a midpoint."""
    ordered, order = code.sort()
    half = ordered.diff() / 2
    edge = half.new_zeros(1)
    rank = order.argsort()[places]
    side = 1.6 * torch.rand(len(places), generator=rng) - 0.8
    room = torch.where(side < 0, torch.cat([edge, half])[rank], torch.cat([half, edge])[rank])
    return code[places] + side * room
