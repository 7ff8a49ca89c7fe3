"""RAdam (torch form), with r_inf = 2 / (1 - b2) - 1 and r_t = r_inf - 2 t b2^t / (1 - b2^t).

r_t > 5: ``d = m / (1 - b1^t) rect sqrt(1 - b2^t) / (sqrt(v) + eps)``; else ``d = m / (1 - b1^t)``;
``rect = sqrt((r_t - 4) (r_t - 2) r_inf / ((r_inf - 4) (r_inf - 2) r_t))``
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, sqrt
from fusedopt.triton_kernels.moments import update_moments

name = "radam"
states = ("exp_avg", "exp_avg_sq")
scalars = ("step",)
hyper = ("beta1", "beta2", "eps")
coefficients = ("one_minus_beta1", "beta2", "one_minus_beta2", "m_scale", "rectified", "eps")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``; ``rectified`` is 0 or 1."""
    beta1, beta2, eps = h
    correction2 = bias_correction(beta2, s[0])
    limit = 2 / (1 - beta2) - 1
    rho = limit - 2 * s[0] * (1 - correction2) / correction2
    rectified = rho > 5
    safe = tl.where(rectified, rho, 6.0)
    variance = (safe - 4) * (safe - 2) * limit / ((limit - 4) * (limit - 2) * safe)
    m_scale = tl.where(rectified, tl.sqrt(variance * correction2), 1.0) / bias_correction(beta1, s[0])
    return (1 - beta1, beta2, 1 - beta2, m_scale, rectified.to(tl.float64), eps), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    one_minus_beta1, beta2, one_minus_beta2, m_scale, rectified, eps = c
    v, new = update_moments(g, state, one_minus_beta1, beta2, one_minus_beta2)
    return div(m_scale * new[0], tl.where(rectified != 0, sqrt(v) + eps, 1.0).to(v.dtype)), new
