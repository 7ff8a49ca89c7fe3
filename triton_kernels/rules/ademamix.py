"""AdEMAMix: ``d = (m / (1 - b1^t) + a n) / (sqrt(v) / sqrt(1 - b2^t) + eps)``, with a slow average n beside Adam's m.

``n <- b n + (1 - b) g``; until they are warm, a is alpha t / T, and b has a half-life that grows linearly in t.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, lerp, sqrt

name = "ademamix"
states = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
scalars = ("step",)
hyper = ("beta1", "beta2", "beta3", "eps", "alpha", "alpha_warmup", "beta3_warmup")
coefficients = (
    "one_minus_beta1",
    "one_minus_beta3",
    "beta2",
    "one_minus_beta2",
    "m_scale",
    "alpha",
    "root_scale",
    "eps",
)


@triton.jit
def _inverse_log(beta):
    """To which half-lives are in proportion; 0 of a beta of 0."""
    return tl.where(beta > 0, 1 / tl.log(tl.where(beta > 0, beta, 0.5)), 0.0)


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    beta1, beta2, beta3, eps, alpha, alpha_warmup, beta3_warmup = h
    share = s[0] / tl.where(beta3_warmup > s[0], beta3_warmup, s[0])
    inverse = (1 - share) * _inverse_log(beta1) + share * _inverse_log(beta3)
    warm = tl.where(inverse != 0, tl.exp(1 / tl.where(inverse != 0, inverse, 1.0)), 0.0)
    slow = tl.where(s[0] >= beta3_warmup, beta3, warm)
    a = tl.where(s[0] >= alpha_warmup, alpha, alpha * (s[0] / tl.where(alpha_warmup > s[0], alpha_warmup, s[0])))
    m_scale, root_scale = 1 / bias_correction(beta1, s[0]), 1 / tl.sqrt(bias_correction(beta2, s[0]))
    return (1 - beta1, 1 - slow, beta2, 1 - beta2, m_scale, a, root_scale, eps), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    one_minus_beta1, one_minus_beta3, beta2, one_minus_beta2, m_scale, alpha, root_scale, eps = c
    m, n = lerp(state[0], g, one_minus_beta1), lerp(state[1], g, one_minus_beta3)
    v = beta2 * state[2] + one_minus_beta2 * (g * g)
    return div(m_scale * m + alpha * n, root_scale * sqrt(v) + eps), (m, n, v)
