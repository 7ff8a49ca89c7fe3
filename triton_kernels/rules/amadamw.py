"""AMAdamW: ``v <- b2 v + (1 - b2) g^2``, ``P = (1 - b_max prod b) (sqrt(v / (1 - b2^t)) + eps)``.

With ``M = 1 / (P (1 + lam P))`` and ``gap = (lr before) / lr sum(g (d / P + wd p))`` the memory is
``clip(((1 + lr wd) gap - sum((d - g) (g + lam P d) M + wd p (d - g))) / sum((d - g)^2 M), 0, b_max)``, in the first
step ``b_max``; ``d <- ((1 - b) g + (lam P + b) d) / (1 + lam P)``, and the step is ``d / P``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, sqrt
from fusedopt.triton_kernels.memory import memory_of

name = "amadamw"
states = ("direction", "exp_avg_sq")
scalars = ("step", "beta", "beta_product", "last_lr")
hyper = ("lr", "weight_decay", "beta2", "eps", "lam", "beta_max")
coefficients = (
    "beta2", "one_minus_beta2", "scale", "root_scale", "eps", "lam", "weight_decay", "lr", "gap_scale", "beta_max",
    "beta",
)  # fmt: skip
measures = ("gain", "difference")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the memory in."""
    lr, weight_decay, beta2, eps, lam, beta_max = h
    step, _, product, last_lr = s
    root_scale = 1 / tl.sqrt(bias_correction(beta2, step))
    moved = lr != 0
    gap_scale = tl.where(moved, (1 + weight_decay * lr) * last_lr / tl.where(moved, lr, 1.0), 0.0)
    scale = 1 - beta_max * product
    return (beta2, 1 - beta2, scale, root_scale, eps, lam, weight_decay, lr, gap_scale, beta_max, 0 * eps), s


@triton.jit
def metric(g, state, c):
    """``P``, and the new second moment."""
    v = c[0] * state[1] + c[1] * (g * g)
    return c[2] * (c[3] * sqrt(v) + c[4]), v


@triton.jit
def measure(p, g, state, c, STATES):
    """See the module's text."""
    lam, weight_decay, d = c[5], c[6], state[0]
    stiffness, _ = metric(g, state, c)
    weight = div(1 + 0 * stiffness, stiffness * (1 + lam * stiffness))
    change = d - g
    gap = g * (div(d, stiffness) + weight_decay * p)
    rest = change * (g + lam * stiffness * d) * weight + weight_decay * p * change
    return (c[8] * gap - rest, change * change * weight)


@triton.jit
def finish(c, s, m, whole, largest):
    """The memory."""
    step, _, product, _ = s
    beta = tl.where(product == 1, c[9], memory_of(whole[0], whole[1], c[9]))
    return c[:10] + (beta,), (step, beta, product * beta, c[7])


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    stiffness, v = metric(g, state, c)
    regularised, beta = c[5] * stiffness, c[10]
    d = div((1 - beta) * g + (regularised + beta) * state[0], 1 + regularised)
    return div(d, stiffness), (d, v)
