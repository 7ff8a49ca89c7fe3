"""AdaBound, AMSBound. The bounds divided by lr do not depend on lr, so the clamp is a direction.

``d = clamp(sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(w) + eps), lo, hi) m``,
lo = f (1 - 1 / (gamma t + 1)), hi = f (1 + 1 / (gamma t)), f = final_lr / base_lr
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, clamp, div, sqrt
from fusedopt.triton_kernels.moments import update_moments

name = "adabound"
states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
scalars = ("step",)
hyper = ("beta1", "beta2", "eps", "final_lr", "gamma", "base_lr")
coefficients = ("one_minus_beta1", "beta2", "one_minus_beta2", "scale", "low", "high", "eps")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    beta1, beta2, eps, final_lr, gamma, base_lr = h
    scale = tl.sqrt(bias_correction(beta2, s[0])) / bias_correction(beta1, s[0])
    final = final_lr / base_lr
    growth = gamma * s[0]
    return (1 - beta1, beta2, 1 - beta2, scale, final * (1 - 1 / (growth + 1)), final * (1 + 1 / growth), eps), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    one_minus_beta1, beta2, one_minus_beta2, scale, low, high, eps = c
    w, new = update_moments(g, state, one_minus_beta1, beta2, one_minus_beta2)
    return clamp(div(tl.zeros_like(w) + scale, sqrt(w) + eps), low, high) * new[0], new
