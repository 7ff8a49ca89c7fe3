"""Adamax: ``m <- b1 m + (1 - b1) g``, ``u <- max(b2 u, |g| + eps)``, ``d = m / (1 - b1^t) / u``."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, lerp, maximum

name = "adamax"
states = ("exp_avg", "exp_inf")
scalars = ("step",)
hyper = ("beta1", "beta2", "eps")
coefficients = ("one_minus_beta1", "beta2", "eps", "scale")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    beta1, beta2, eps = h
    return (1 - beta1, beta2, eps, 1 / bias_correction(beta1, s[0])), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    one_minus_beta1, beta2, eps, scale = c
    m = lerp(state[0], g, one_minus_beta1)
    u = maximum(beta2 * state[1], tl.abs(g) + eps)
    return div(scale * m, u), (m, u)
