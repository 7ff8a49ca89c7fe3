"""LAMB: ``u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + wd p``, ``d = |p| / |u| u``, norms over the tensor.

The ratio is 1 where either norm is 0, and where nothing decays unless ``always_adapt``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, sqrt
from fusedopt.triton_kernels.moments import update_moments

name = "lamb"
states = ("exp_avg", "exp_avg_sq")
scalars = ("step",)
hyper = ("beta1", "beta2", "eps", "weight_decay", "always_adapt")
coefficients = (
    "one_minus_beta1", "beta2", "one_minus_beta2", "m_scale", "root_scale", "eps", "weight_decay", "adapts", "trust",
)  # fmt: skip
measures = ("param", "update")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the ratio in."""
    beta1, beta2, eps, weight_decay, always_adapt = h
    m_scale = 1 / bias_correction(beta1, s[0])
    root_scale = 1 / tl.sqrt(bias_correction(beta2, s[0]))
    adapts = tl.where((weight_decay != 0) | (always_adapt != 0), 1.0, 0.0)
    return (1 - beta1, beta2, 1 - beta2, m_scale, root_scale, eps, weight_decay, adapts, 1 + 0 * eps), s


@triton.jit
def update(p, g, state, c):
    """``u``, and the new state."""
    one_minus_beta1, beta2, one_minus_beta2, m_scale, root_scale, eps, weight_decay, _, _ = c
    v, new = update_moments(g, state, one_minus_beta1, beta2, one_minus_beta2)
    return div(m_scale * new[0], root_scale * sqrt(v) + eps) + weight_decay * p, new


@triton.jit
def measure(p, g, state, c, STATES):
    """The squares of both norms."""
    u, _ = update(p, g, state, c)
    return (p * p, u * u)


@triton.jit
def finish(c, s, m, whole, largest):
    """The ratio of the norms."""
    adapts = (c[7] != 0) & (m[0] > 0) & (m[1] > 0)
    return c[:8] + (tl.where(adapts, tl.sqrt(m[0]) / tl.sqrt(m[1]), c[8]),), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    u, new = update(p, g, state, c)
    return c[8] * u, new
