"""Adadelta: ``v <- rho v + (1 - rho) g^2``, ``d = sqrt(a + eps) / sqrt(v + eps) g``, ``a <- rho a + (1 - rho) d^2``."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight)

from fusedopt.triton_kernels.math import div, sqrt

name = "adadelta"
states = ("square_avg", "acc_delta")
scalars = ("step",)
hyper = ("rho", "eps")
coefficients = ("rho", "one_minus_rho", "eps")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    rho, eps = h
    return (rho, 1 - rho, eps), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    rho, one_minus_rho, eps = c
    v = rho * state[0] + one_minus_rho * (g * g)
    d = div(sqrt(state[1] + eps), sqrt(v + eps)) * g
    return d, (v, rho * state[1] + one_minus_rho * (d * d))
