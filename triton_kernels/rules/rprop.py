"""Rprop: ``e <- clamp(e eta, min, max)``, ``d = e sign(g)``.

Where ``g prev > 0`` eta is etaplus; where it is negative, etaminus, and g becomes 0; elsewhere it is 1. As in torch, an
element whose gradient is NaN stays where it is.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import clamp

name = "rprop"
states = ("prev", "step_size")
scalars = ("step",)
hyper = ("etaminus", "etaplus", "step_size_min", "step_size_max")
coefficients = hyper
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    return h, s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    etaminus, etaplus, step_size_min, step_size_max = c
    change = g * state[0]
    eta = tl.where(change > 0, etaplus, tl.where(change < 0, etaminus, 1.0))
    size = clamp(state[1] * eta, step_size_min, step_size_max)
    g = tl.where(change < 0, 0.0, g)
    return size * tl.where(g > 0, 1.0, tl.where(g < 0, -1.0, 0.0)), (g, size)
