"""EntropySGD: a step of a loop, and what follows its last.

``b <- momentum b + g``; u = b, or ``g + momentum b`` with Nesterov, or g without momentum;
``p <- p - inner_lr (u + gamma (p - x))``, ``mu <- mu + (1-alpha) (p - mu)``; where a loop ends, ``w = x - mu`` along a
buffer of its own as u is along b, ``p <- x - lr w``, x and mu are p, and b is 0. Where it begins x and mu are p, too,
and b is g.
"""

import triton
import triton.language as tl

name = "entropysgd"
states = ("anchor", "inner_average", "momentum_buffer", "inner_momentum_buffer")
scalars = ("step",)
hyper = ("lr", "momentum", "nesterov", "inner_lr", "alpha", "gamma", "begins", "ends")
coefficients = ("lr", "inner_lr", "momentum", "nesterov", "gamma", "one_minus_alpha", "begins", "ends")
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    lr, momentum, nesterov, inner_lr, alpha, gamma, begins, ends = h
    return (lr, inner_lr, momentum, nesterov, gamma, 1 - alpha, begins, ends), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    lr, inner_lr, momentum, nesterov, gamma, one_minus_alpha, begins, ends = c
    x = tl.where(begins != 0, p, state[0])
    mu = tl.where(begins != 0, p, state[1])
    if len(state) == 2:
        d = inner_lr * (g + gamma * (p - x))
        mu = mu + one_minus_alpha * (p - d - mu)
        d = tl.where(ends != 0, (p - x) + lr * (x - mu), d)
        return d, (tl.where(ends != 0, p - d, x), tl.where(ends != 0, p - d, mu))
    else:
        inner = tl.where(begins != 0, g, momentum * state[3] + g)
        u = tl.where(nesterov != 0, g + momentum * inner, inner)
        d = inner_lr * (u + gamma * (p - x))
        mu = mu + one_minus_alpha * (p - d - mu)
        outer = momentum * state[2] + (x - mu)
        w = tl.where(nesterov != 0, (x - mu) + momentum * outer, outer)
        d = tl.where(ends != 0, (p - x) + lr * w, d)
        new = (tl.where(ends != 0, p - d, x), tl.where(ends != 0, p - d, mu))
        return d, (new[0], new[1], tl.where(ends != 0, outer, state[2]), tl.where(ends != 0, 0.0, inner))
