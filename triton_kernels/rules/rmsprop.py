"""RMSprop: ``v <- a v + (1 - a) g^2``, ``u = g / (sqrt(v) + eps)``, ``d = u``.

centered: ``m <- a m + (1 - a) g``, and ``max(v - m^2, 0)`` in place of v (the difference can round below 0);
momentum: ``b <- mu b + u``, ``d = b``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import div, lerp, sqrt
from fusedopt.triton_kernels.signatures import has, index

name = "rmsprop"
states = ("square_avg", "momentum_buffer", "grad_avg")
scalars = ("step",)
hyper = ("alpha", "eps", "momentum")
coefficients = ("alpha", "one_minus_alpha", "eps", "momentum")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    alpha, eps, momentum = h
    return (alpha, 1 - alpha, eps, momentum), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    alpha, one_minus_alpha, eps, momentum = c
    v = alpha * state[0] + one_minus_alpha * (g * g)
    variance = v
    if has(STATES, "grad_avg"):
        mean = lerp(state[index(STATES, "grad_avg")], g, one_minus_alpha)
        variance = v - mean * mean
        variance = tl.where(variance < 0, 0.0, variance)
    d = div(g, sqrt(variance) + eps)
    new = (v,)
    if has(STATES, "momentum_buffer"):
        d = momentum * state[1] + d
        new = new + (d,)
    if has(STATES, "grad_avg"):
        new = new + (mean,)
    return d, new
