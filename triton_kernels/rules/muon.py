"""Muon's steps before and after its matrix function, and the AdamW beside it; the states say which a parameter takes.

``exp_avg, exp_avg_sq``: ``d = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)``.
``momentum_buffer``: ``p = m + (1 - ahead) (g - m)`` with ``m <- mu m + (1 - mu) g``; p is what the function is of.
None: ``d = g``, where g is what the function made.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, lerp, sqrt
from fusedopt.triton_kernels.moments import update_moments

name = "muon"
states = ("exp_avg", "exp_avg_sq", "momentum_buffer")
scalars = ("step",)
hyper = ("momentum", "nesterov", "beta1", "beta2", "eps")
coefficients = (
    "one_minus_momentum",
    "ahead",
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "m_scale",
    "root_scale",
    "eps",
)
replaces = "momentum_buffer"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    momentum, nesterov, beta1, beta2, eps = h
    ahead = tl.where(nesterov != 0, momentum, 1.0)
    m_scale, root_scale = 1 / bias_correction(beta1, s[0]), 1 / tl.sqrt(bias_correction(beta2, s[0]))
    return (1 - momentum, ahead, 1 - beta1, beta2, 1 - beta2, m_scale, root_scale, eps), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    one_minus_momentum, ahead, one_minus_beta1, beta2, one_minus_beta2, m_scale, root_scale, eps = c
    if len(state) == 2:
        v, new = update_moments(g, state, one_minus_beta1, beta2, one_minus_beta2)
        return div(m_scale * new[0], root_scale * sqrt(v) + eps), new
    elif len(state) == 1:
        m = lerp(state[0], g, one_minus_momentum)
        return lerp(g, m, ahead), (m,)
    else:
        return g, ()
