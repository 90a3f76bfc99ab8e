"""AdamW's update: by hand, and against torch's over many steps."""

import torch

from utils.optimizers import adamw_update


def test_first_step_by_hand():
    """m' is the gradient and v' its square, so the step is lr in the gradient's direction, whatever its length."""
    p, grad, zero = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -0.5]), torch.zeros(2)
    new, m, v = adamw_update(p, grad, zero, zero, step=1, lr=0.1, weight_decay=0.0)
    torch.testing.assert_close(new, torch.tensor([0.9, 2.1]))
    torch.testing.assert_close(m, 0.1 * grad)
    torch.testing.assert_close(v, 0.001 * grad**2)
    assert p.tolist() == [1, 2] and zero.tolist() == [0, 0]


def test_torch_takes_the_same_steps():
    torch.manual_seed(0)
    theirs = torch.nn.Parameter(torch.randn(5, 3))
    optimizer = torch.optim.AdamW([theirs], lr=0.02, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    p, m, v = theirs.detach().clone(), torch.zeros(5, 3), torch.zeros(5, 3)
    for step in range(1, 12):
        theirs.grad = torch.randn(5, 3)
        p, m, v = adamw_update(p, theirs.grad, m, v, step, 0.02, 0.8, 0.95, 1e-6, 0.1)
        optimizer.step()
        torch.testing.assert_close(p, theirs.detach(), rtol=1e-6, atol=1e-6)
