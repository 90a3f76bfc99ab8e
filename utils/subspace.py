"""Training in a random subspace: how many numbers does a task really need?

Li et al. 2018, "Measuring the intrinsic dimension of objective landscapes" (arXiv:1804.08838), and Aghajanyan et al.
2020, "Intrinsic dimensionality explains the effectiveness of language model fine-tuning" (arXiv:2012.13255):

    theta = theta_0 + P v        theta (D,) all weights, frozen at theta_0;  v (d,) trained;  P (D, d) random and fixed

P here has one nonzero per row: weight i follows coordinate c(i) of v with a random sign,

    theta_i = theta_0,i + sign_i * v_c(i) / sqrt(n_c(i))        n_c: how many weights share coordinate c, D/d each

so P costs D numbers instead of D*d. Its columns do not overlap and have length 1: P^T P = I exactly, which makes a step
in v as long as the step in theta it stands for. (Both papers use Fastfood or sparse projections that are nearly so.)
"""

import torch
from torch import nn
from torch.func import functional_call


class Subspace(nn.Module):
    """A model whose weights move only within a random d-dimensional subspace, except those under `keep`.

    model: any nn.Module, frozen by this   d: dimensions of the subspace, 1 to D   seed: which subspace
    keep: names of modules or parameters that are trained as usual (a new classification head)
    Trained are `coordinates` (d,), zero at first, and what is kept; forward is the model's own.
    """

    def __init__(self, model, d, seed=0, keep=()):
        super().__init__()
        self.model = model
        kept = tuple(k + "." for k in keep)
        moved = {name: p for name, p in model.named_parameters() if not f"{name}.".startswith(kept)}
        self.D = sum(p.numel() for p in moved.values())
        if not 1 <= d <= self.D:
            raise ValueError(f"d is {d}; the subspace of {self.D:,} weights has between 1 and {self.D:,} dimensions")
        generator = torch.Generator().manual_seed(seed)
        # a shuffled 0 1 ... d-1 0 1 ...: every coordinate gets the same number of weights, give or take one
        owner = torch.randperm(self.D, generator=generator) % d  # (D,)
        sign = torch.randint(0, 2, (self.D,), generator=generator) * 2.0 - 1  # (D,)
        entry = sign / torch.bincount(owner, minlength=d).float().sqrt()[owner]  # (D,) the nonzeros of P
        self.shapes = {name: p.shape for name, p in moved.items()}
        for p in moved.values():
            p.requires_grad = False
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("entry", entry, persistent=False)
        self.coordinates = nn.Parameter(torch.zeros(d))

    def weights(self):
        """theta_0 + P v, as {name: tensor}."""
        change = self.entry * self.coordinates[self.owner]  # (D,) = P v
        parts = change.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: self.model.get_parameter(name) + part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def forward(self, *args, **kwargs):
        return functional_call(self.model, self.weights(), args, kwargs)
