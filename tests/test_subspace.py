"""utils/subspace.py: theta = theta_0 + P v."""

import pytest
import torch
from torch import nn

from utils.subspace import Subspace


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))  # 16 + 10 = 26 weights


def projection(subspace):
    """P (D, d), column by column: where the weights go when one coordinate is 1."""
    start, columns = torch.cat([w.flatten() for w in subspace.weights().values()]), []
    for j in range(len(subspace.coordinates)):
        with torch.no_grad():
            subspace.coordinates.zero_()[j] = 1
        columns.append(torch.cat([w.flatten() for w in subspace.weights().values()]) - start)
    return torch.stack(columns, dim=1).detach()


@pytest.mark.parametrize("d", [1, 5, 26])
def test_the_columns_of_p_are_orthonormal_and_every_weight_belongs_to_one(d):
    P = projection(Subspace(small(), d))
    assert P.shape == (26, d)
    assert torch.allclose(P.T @ P, torch.eye(d), atol=1e-6)
    assert ((P != 0).sum(1) == 1).all()
    assert (P != 0).sum(0).max() - (P != 0).sum(0).min() <= 1


def test_at_zero_it_is_the_model():
    model, x = small(), torch.randn(5, 3)
    expected = model(x)
    assert torch.equal(Subspace(model, 7)(x), expected)


def test_only_coordinates_and_what_is_kept_are_trained():
    model = small()
    subspace = Subspace(model, 4, keep=("2",))
    assert subspace.D == 16
    trained = {n for n, p in subspace.named_parameters() if p.requires_grad}
    assert trained == {"coordinates", "model.2.weight", "model.2.bias"}
    before, head = model[0].weight.clone(), model[2].weight.clone()
    optimizer = torch.optim.SGD([p for p in subspace.parameters() if p.requires_grad], lr=0.1)
    subspace(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert not torch.equal(model[2].weight, head)
    assert not torch.equal(subspace.weights()["0.weight"], before)


def test_the_gradient_is_that_of_the_weights_seen_through_p():
    model, x = small(), torch.randn(5, 3)
    model(x).square().sum().backward()
    full = torch.cat([p.grad.flatten() for p in model.parameters()])  # (D,)
    subspace = Subspace(model, 6)
    subspace(x).square().sum().backward()
    got = subspace.coordinates.grad.clone()
    assert torch.allclose(got, projection(subspace).T @ full, atol=1e-5)


def test_the_seed_chooses_the_subspace():
    one, same, other = (projection(Subspace(small(), 5, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids):
            return self.out(self.embed(ids))

    subspace, ids = Subspace(Tied(), 4), torch.tensor([0, 3])
    assert subspace.D == 15
    with torch.no_grad():
        subspace.coordinates += 0.5
    weight = subspace.weights()["embed.weight"]
    assert torch.allclose(subspace(ids), weight[ids] @ weight.T)


@pytest.mark.parametrize("d", [0, 27])
def test_a_d_that_does_not_fit_changes_nothing(d):
    model = small()
    with pytest.raises(ValueError, match="between 1 and 26"):
        Subspace(model, d)
    assert all(p.requires_grad for p in model.parameters())
