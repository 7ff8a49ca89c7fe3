"""EntropySGD: a step of a loop, and what follows its last.

``b <- inner_momentum b + g``; u = b, or ``g + inner_momentum b`` with Nesterov, or g without such momentum;
``p <- p - inner_lr (u + gamma (p - x))``, ``mu <- mu + (1-alpha) (p - mu)``; where a loop ends, ``w = x - mu`` along a
buffer of its own as u is along b, ``p <- x - lr w``, x and mu are p, and b is 0. Where it begins x and mu are p, too,
and b is g. Where lr is 0, so is inner_lr.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.signatures import has

name = "entropysgd"
states = ("anchor", "inner_average", "momentum_buffer", "inner_momentum_buffer")
scalars = ("step",)
hyper = ("lr", "momentum", "inner_momentum", "nesterov", "inner_lr", "alpha", "gamma", "begins", "ends")
coefficients = (
    "lr",
    "inner_lr",
    "momentum",
    "inner_momentum",
    "nesterov",
    "gamma",
    "one_minus_alpha",
    "begins",
    "ends",
)
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    lr, momentum, inner_momentum, nesterov, inner_lr, alpha, gamma, begins, ends = h
    inner_lr = tl.where(lr != 0, inner_lr, 0.0)
    return (lr, inner_lr, momentum, inner_momentum, nesterov, gamma, 1 - alpha, begins, ends), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    lr, inner_lr, momentum, inner_momentum, nesterov, gamma, one_minus_alpha, begins, ends = c
    x = tl.where(begins != 0, p, state[0])
    mu = tl.where(begins != 0, p, state[1])
    u, inner, outer = g, g, g
    if has(STATES, "inner_momentum_buffer"):
        b = tl.where(begins != 0, g, inner_momentum * state[len(state) - 1] + g)
        u = tl.where(nesterov != 0, g + inner_momentum * b, b)
        inner = tl.where(ends != 0, 0.0, b)
    d = inner_lr * (u + gamma * (p - x))
    mu = mu + one_minus_alpha * (p - d - mu)
    w = x - mu
    if has(STATES, "momentum_buffer"):
        along = momentum * state[2] + w
        w = tl.where(nesterov != 0, w + momentum * along, along)
        outer = tl.where(ends != 0, along, state[2])
    d = tl.where(ends != 0, (p - x) + lr * w, d)
    x, mu = tl.where(ends != 0, p - d, x), tl.where(ends != 0, p - d, mu)
    if len(state) == 2:
        return d, (x, mu)
    elif len(state) == 4:
        return d, (x, mu, outer, inner)
    elif has(STATES, "momentum_buffer"):
        return d, (x, mu, outer)
    else:
        return d, (x, mu, inner)
