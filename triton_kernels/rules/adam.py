"""Adam, AdamW, AMSGrad: ``d = m / (1 - b1^t) / (sqrt(w) / sqrt(1 - b2^t) + eps)``."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction
from fusedopt.triton_kernels.moments import ratio, ratio_coefficients

name = "adam"
states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
scalars = ("step",)
hyper = ("beta1", "beta2", "eps")
coefficients = ratio_coefficients
direction = ratio


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``ratio``."""
    beta1, beta2, eps = h
    m_scale = 1 / bias_correction(beta1, s[0])
    root_scale = 1 / tl.sqrt(bias_correction(beta2, s[0]))
    return (1 - beta1, beta2, 1 - beta2, m_scale, 0 * eps, root_scale, eps), s
