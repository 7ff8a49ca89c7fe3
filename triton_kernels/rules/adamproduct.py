"""Adam with betas of each step's own: ``d = m / (1 - prod b1) / (sqrt(w) / sqrt(1 - prod b2) + eps)``.

One minus a product is what is kept: ``c <- b c + (1 - b)``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction
from fusedopt.triton_kernels.moments import ratio, ratio_coefficients

name = "adamproduct"
states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
scalars = ("step", "correction1", "correction2")
hyper = ("beta1", "beta2", "eps")
coefficients = ratio_coefficients
direction = ratio


@triton.jit
def advanced(correction, beta, step):
    """After this step. What was not kept before was Adam's."""
    before = tl.where((correction == 0) & (step > 1), bias_correction(beta, step - 1), correction)
    return beta * before + (1 - beta)


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``ratio``."""
    beta1, beta2, eps = h
    correction1, correction2 = advanced(s[1], beta1, s[0]), advanced(s[2], beta2, s[0])
    c = (1 - beta1, beta2, 1 - beta2, 1 / correction1, 0 * eps, 1 / tl.sqrt(correction2), eps)
    return c, (s[0], correction1, correction2)
