"""Adan, with the difference e of two gradients.

``m <- b1 m + (1 - b1) g``, ``y <- b2 y + (1 - b2) e``, ``v <- b3 v + (1 - b3) (g + b2 e)^2``,
``d = (m / (1 - b1^t) + b2 y / (1 - b2^t)) / (sqrt(v) / sqrt(1 - b3^t) + eps)``; decay is proximal,
``p <- (p - lr d) / (1 + lr wd)``, or decoupled.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, lerp, sqrt

name = "adan"
states = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")
scalars = ("step",)
hyper = ("lr", "weight_decay", "beta1", "beta2", "beta3", "eps", "no_prox")
coefficients = (
    "one_minus_beta1",
    "beta2",
    "one_minus_beta2",
    "beta3",
    "one_minus_beta3",
    "before",
    "m_scale",
    "diff_scale",
    "root_scale",
    "eps",
    "decay",
    "shrink",
)


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    lr, weight_decay, beta1, beta2, beta3, eps, no_prox = h
    m_scale, diff_scale = 1 / bias_correction(beta1, s[0]), beta2 / bias_correction(beta2, s[0])
    root_scale = 1 / tl.sqrt(bias_correction(beta3, s[0]))
    before = tl.where(new_state, 0.0, 1.0)
    shrink = tl.where(no_prox != 0, 1.0, 1 / (1 + lr * weight_decay))
    own = 1 - beta1, beta2, 1 - beta2, beta3, 1 - beta3
    return own + (before, m_scale, diff_scale, root_scale, eps, weight_decay, shrink), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, before, m_scale, diff_scale = c[:8]
    root_scale, eps, decay, shrink = c[8:]
    change = tl.where(before != 0, g + state[3], 0.0).to(g.dtype)
    ahead = g + beta2 * change
    m, y = lerp(state[0], g, one_minus_beta1), beta2 * state[1] + one_minus_beta2 * change
    v = beta3 * state[2] + one_minus_beta3 * (ahead * ahead)
    d = div(m_scale * m + diff_scale * y, root_scale * sqrt(v) + eps)
    return (d + decay * p) * shrink, (m, y, v, -g)
