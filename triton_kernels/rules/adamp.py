"""AdamP: ``d = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)``, with Nesterov of ``b1 m + (1 - b1) g``, projected.

``p <- (1 - lr wd r) p - lr d`` with r = ``wd_ratio`` where it was projected, else 1.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels import projected
from fusedopt.triton_kernels.math import bias_correction
from fusedopt.triton_kernels.moments import ratio, ratio_coefficients

name = "adamp"
states = ("exp_avg", "exp_avg_sq")
scalars = ("step", "n_dims")
hyper = ("beta1", "beta2", "eps", "weight_decay", "delta", "wd_ratio", "nesterov")
coefficients = (*ratio_coefficients, "delta", "wd_ratio", "pull")
measures = projected.measures


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the projection in."""
    beta1, beta2, eps, weight_decay, delta, wd_ratio, nesterov = h
    scale = 1 / bias_correction(beta1, s[0])
    m_scale = tl.where(nesterov != 0, scale * beta1, scale)
    g_scale = tl.where(nesterov != 0, scale * (1 - beta1), 0.0)
    root_scale = 1 / tl.sqrt(bias_correction(beta2, s[0]))
    c = (1 - beta1, beta2, 1 - beta2, m_scale, g_scale, root_scale, eps, delta, wd_ratio, weight_decay)
    return c, s


@triton.jit
def measure(p, g, state, c, STATES):
    """See ``projected``."""
    d, _ = ratio(p, g, state, c[:7], STATES)
    return projected.sums(p, g, d)


@triton.jit
def score(c, m):
    """See ``projected``."""
    return projected.score_of(c[6], m)


@triton.jit
def finish(c, s, m, whole, largest):
    """The projection."""
    _, pull = projected.project(c[6], c[7], c[8], c[9], s[1], m, whole, largest)
    return c[:9] + (pull,), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    d, new = ratio(p, g, state, c[:7], STATES)
    return d + c[9] * p, new
