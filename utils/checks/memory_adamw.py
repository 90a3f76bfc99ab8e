"""Chapter 01, one step of AdamW."""

import math

import torch

from utils.checks.core import Case, Exercise, Mistake
from utils.checks.draw import normal, pick
from utils.optimizers import adamw_update


def cases(rng):
    """Large rates and decays, so that no two formulas agree within the tolerance.

    In the first case a number never had a gradient, and eps is all that its step is divided by.
    """
    tiny = {"beta1": 0.8, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.2}
    found = []
    for shape, step, settings, kind in (
        ((4, 3), 1, {}, ""),
        ((7,), pick(rng, 2, 3), tiny, ""),
        ((2, 3, 2), pick(rng, 9, 20), {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.3}, ""),
        ((5, 2), pick(rng, 4, 6), {"beta1": 0.7, "beta2": 0.9, "eps": pick(rng, 0.1, 0.2), "weight_decay": 0.1},
         "epsilon"),
        ((6,), 5, tiny, "bf16"),
    ):  # fmt: skip
        p, grad = normal(rng, *shape), normal(rng, *shape)
        m = normal(rng, *shape, std=0.3) if step > 1 else torch.zeros(shape)
        v = normal(rng, *shape) ** 2 if step > 1 else torch.zeros(shape)
        if step == 1:
            grad[0] = 0
        tensors = {"p": p, "grad": grad, "m": m, "v": v + 0.5 if kind == "bf16" else v}
        if kind == "bf16":
            tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        inputs = tensors | {"step": step, "lr": pick(rng, 0.2, 0.3)} | settings
        found.append(Case(inputs, (kind,) if kind else (), {"step": step}, later=bool(kind)))
    return found


def adamw(first=1, second=1, root=torch.sqrt, eps="after", decay="decoupled", sign=-1, square=True, averages=None,
          shift=0, returned=lambda p, m, v, m_hat, v_hat: (p, m, v)):  # fmt: skip
    """An adamw_update with something else in it.

    first, second: powers of the two bias corrections   root: of v'   averages: (m, v) from (m, v, grad, beta1, beta2)
    shift: added to the step
    """

    def adamw_update(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps_=1e-8, weight_decay=0.01):
        if decay == "L2":
            grad = grad + weight_decay * p
        if averages:
            m, v = averages(m, v, grad, beta1, beta2)
        else:
            m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * (grad**2 if square else grad.abs())
        first_factor = (1 - beta1 ** (step + shift)) ** first
        second_factor = (1 - beta2 ** (step + shift)) ** second
        m_hat, v_hat = m / first_factor, v / second_factor
        scale = {
            "after": root(v_hat) + eps_,
            "inside": root(v_hat + eps_),
            "before": (root(v) + eps_) / math.sqrt(second_factor),
            "none": root(v_hat),
        }[eps]
        size = {"decoupled": lr, "without lr": 1, "L2": 0, "none": 0, "after": 0, "grows": -lr}[decay] * weight_decay
        p = p - size * p + sign * lr * m_hat / scale
        if decay == "after":
            p = p - lr * weight_decay * p
        return returned(p, m, v, m_hat, v_hat)

    return adamw_update


def L2_in_the_gradient(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    grad = grad + weight_decay * p
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**step)
    v_hat = v / (1 - beta2**step)
    p = p - lr * m_hat / (v_hat**0.5 + eps)
    return p, m, v


def by_torch(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    parameter = torch.nn.Parameter(p.clone())
    optimizer = torch.optim.AdamW([parameter], lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay)
    state = {"step": torch.tensor(float(step - 1)), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
    optimizer.state[parameter] = state
    parameter.grad = grad.clone()
    optimizer.step()
    return parameter.detach(), state["exp_avg"], state["exp_avg_sq"]


def by_lerp(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = torch.lerp(grad, m, beta1), torch.lerp(grad * grad, v, beta2)
    mean, square = m.div(1 - beta1**step), v.div(1 - beta2**step)
    return (1 - lr * weight_decay) * p - lr * mean / square.sqrt().add(eps), m, v


def in_place(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m.mul_(beta1).add_(grad, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    scale = (v / (1 - beta2**step)).sqrt() + eps
    return p - lr * weight_decay * p - lr * m / (1 - beta1**step) / scale, m, v


def parameter_in_place(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    new, m, v = by_lerp(p, grad, m, v, step, lr, beta1, beta2, eps, weight_decay)
    return p.copy_(new), m, v


def in_float32(p, grad, m, v, *settings):
    return adamw_update(p.float(), grad.float(), m.float(), v.float(), *settings)


def cast_back(p, grad, m, v, *settings):
    return tuple(tensor.to(p.dtype) for tensor in in_float32(p, grad, m, v, *settings))


def with_settings(**fixed):
    """An adamw_update that does not look at some of its settings."""

    def update(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
        settings = {"beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay} | fixed
        return adamw_update(p, grad, m, v, step, lr, **settings)

    return update


def powerless(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    return p - lr * weight_decay * p - lr * m / (1 - beta1) / ((v / (1 - beta2)).sqrt() + eps), m, v


def times_step(p, grad, m, v, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01):
    m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
    m_hat, v_hat = m / (1 - beta1 * step), v / (1 - beta2 * step)
    return p - lr * weight_decay * p - lr * m_hat / (v_hat.sqrt() + eps), m, v


def signed(m, v, grad, beta1, beta2):
    return beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad


def old_m_whole(m, v, grad, beta1, beta2):
    return m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2


def old_v_whole(m, v, grad, beta1, beta2):
    return beta1 * m + (1 - beta1) * grad, v + (1 - beta2) * grad**2


def old_whole(m, v, grad, beta1, beta2):
    return m + (1 - beta1) * grad, v + (1 - beta2) * grad**2


def betas_swapped(m, v, grad, beta1, beta2):
    return beta2 * m + (1 - beta2) * grad, beta1 * v + (1 - beta1) * grad**2


def weights_swapped(m, v, grad, beta1, beta2):
    return (1 - beta1) * m + beta1 * grad, (1 - beta2) * v + beta2 * grad**2


def sums(m, v, grad, beta1, beta2):
    return beta1 * m + grad, beta2 * v + grad**2


def square_of_mean(m, v, grad, beta1, beta2):
    m = beta1 * m + (1 - beta1) * grad
    return m, beta2 * v + (1 - beta2) * m**2


def unmoved(m, v, grad, beta1, beta2):
    return (1 - beta1) * grad, (1 - beta2) * grad**2


ADAMW_UPDATE = Exercise(
    name="adamw_update",
    reference=adamw_update,
    cases=cases,
    mistakes=(
        Mistake("no_correction", adamw(first=0, second=0),
                "Bias correction is missing: m and v start at zero and are too small at first. Divide them by "
                "1 - beta^step, each with its own beta."),
        Mistake("first_uncorrected", adamw(first=0),
                "You corrected v and not m. m starts at zero too: divide it by 1 - beta1^step."),
        Mistake("second_uncorrected", adamw(second=0),
                "You corrected m and not v. v starts at zero too: divide it by 1 - beta2^step."),
        Mistake("corrected_twice", adamw(first=2, second=2),
                "Bias correction is applied twice. Once is enough: m' = m / (1 - beta1^step), v' the same with beta2."),
        Mistake("corrected_are_kept", adamw(returned=lambda p, m, v, m_hat, v_hat: (p, m_hat, v_hat)),
                "p is right, but you returned m' and v'. The next step would start from the corrected ones and correct "
                "them again: return m and v."),
        Mistake("step_from_zero", adamw(shift=1),
                "You raised the betas to step + 1. step counts from 1 already."),
        Mistake("step_before", adamw(shift=-1),
                "You raised the betas to step - 1. step counts from 1: in the first step you divide by 1 - beta^0, "
                "which is zero."),
        Mistake("powerless", powerless,
                "The power is missing in the bias correction: divide by 1 - beta^step, not by 1 - beta. The two agree "
                "in the first step alone."),
        Mistake("times_step", times_step,
                "You multiplied the betas by step in the bias correction. It is a power: 1 - beta^step."),
        Mistake("L2", L2_in_the_gradient,
                "You added weight_decay * p to the gradient. That is L2 regularisation in Adam: the moments then "
                "divide the decay away where gradients are large. AdamW shrinks p itself."),
        Mistake("no_decay", adamw(decay="none"),
                "Weight decay is missing. That is Adam; AdamW also takes lr * weight_decay * p away."),
        Mistake("decay_without_lr", adamw(decay="without lr"),
                "Your decay is weight_decay * p. It is scaled by the learning rate as well."),
        Mistake("decay_after", adamw(decay="after"),
                "You shrank the parameter after the step. The equation takes lr * weight_decay of the old p."),
        Mistake("decay_grows", adamw(decay="grows"), "Your weight decay has the wrong sign: it lets p grow."),
        Mistake("ascent", adamw(sign=1), "You went up the gradient. Subtract lr m' / (sqrt(v') + eps)."),
        Mistake("no_root", adamw(root=lambda v: v),
                "The square root of v' is missing. v' has the size of a squared gradient, and m' that of a gradient."),
        Mistake("not_squared", adamw(square=False), "v is a mean of squares; you did not square the gradient."),
        Mistake("signed", adamw(averages=signed),
                "v is a mean of squares; you did not square the gradient. The root of a negative v is NaN."),
        Mistake("old_m_whole", adamw(averages=old_m_whole),
                "The old m is kept whole. Its weight is beta1, so that old and new add up to one."),
        Mistake("old_v_whole", adamw(averages=old_v_whole),
                "The old v is kept whole. Its weight is beta2, so that old and new add up to one."),
        Mistake("old_whole", adamw(averages=old_whole),
                "The old m and v are kept whole. Their weights are beta1 and beta2, so that old and new add up to "
                "one."),
        Mistake("square_of_mean", adamw(averages=square_of_mean),
                "Your v averages m squared. It averages the squares of the gradients themselves."),
        Mistake("betas_swapped", adamw(averages=betas_swapped),
                "The betas are swapped in the two means: beta1 belongs to m, beta2 to v."),
        Mistake("weights_swapped", adamw(averages=weights_swapped),
                "The weights of old and new are swapped: beta keeps the old mean, 1 - beta takes in the new gradient."),
        Mistake("sums", adamw(averages=sums),
                "The new gradient comes in whole. Its weight is 1 - beta, so that old and new add up to one."),
        Mistake("unmoved", adamw(averages=unmoved),
                "The old m and v have no part in the new ones. They are what the optimizer remembers."),
        Mistake("no_eps", adamw(eps="none"),
                "eps is missing in the denominator. Without it a number that never had a gradient is divided by zero."),
        Mistake("fixed_eps", with_settings(eps=1e-8),
                "You wrote 1e-8. Use the argument eps: it may be another number."),
        Mistake("fixed_beta1", with_settings(beta1=0.9), "You wrote 0.9. Use the argument beta1."),
        Mistake("fixed_beta2", with_settings(beta2=0.999), "You wrote 0.999. Use the argument beta2."),
        Mistake("fixed_betas", with_settings(beta1=0.9, beta2=0.999),
                "You wrote 0.9 and 0.999. Use the arguments beta1 and beta2."),
        Mistake("fixed_decay", with_settings(weight_decay=0.01), "You wrote 0.01. Use the argument weight_decay."),
        Mistake("eps_inside", adamw(eps="inside"),
                "Your eps stands inside the root. Outside, eps is the smallest denominator; inside, its root is."),
        Mistake("eps_before", adamw(eps="before"),
                "You added eps to sqrt(v) before v was corrected. It is added to the root of the corrected v'."),
        Mistake("in_place", in_place, None, "Your function changed m (max difference "),
        Mistake("parameter_in_place", parameter_in_place, None, "Your function changed p (max difference "),
        Mistake("parameter_alone", adamw(returned=lambda p, m, v, m_hat, v_hat: p), None,
                "a Tensor, and a tuple of 3 is expected"),
        Mistake("order", adamw(returned=lambda p, m, v, m_hat, v_hat: (p, v, m)),
                "m and v are returned in the wrong order: p, m, v."),
        Mistake("parameter_last", adamw(returned=lambda p, m, v, m_hat, v_hat: (m, v, p)),
                "You returned m, v and p. The order is p, m, v."),
        Mistake("in_float32", in_float32, None, "wrong dtype: p is bfloat16, you returned float32"),
        Mistake("first_step_only", adamw(averages=unmoved, first=1, second=1, decay="none"), None,
                "The first returned value"),
    ),
    alternatives=(by_torch, by_lerp, adamw(), cast_back),
    kinds={"epsilon": "Right when eps is tiny and wrong when it counts. It is added to sqrt(v'), outside the root."},
    fact="m and v are two float32 tensors as large as the weights: 8 bytes per trained number, for a 7B model "
    f"{8 * 6_738_415_616 / 2**30:.0f} GiB. The first step moves every number by about lr, however small its gradient.",
)

EXERCISES = (ADAMW_UPDATE,)
