"""AdamW as a function of numbers and nothing else: what an optimizer keeps, and why it keeps it."""

import math


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
