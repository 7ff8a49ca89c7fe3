"""NAdam (torch form), with mu_t = b1 (1 - 0.96^(t psi) / 2) and the running product P_t of the mu.

``d = [(1 - mu_t) / (1 - P_t) g + mu_{t+1} / (1 - P_t mu_{t+1}) m] / (sqrt(v / (1 - b2^t)) + eps)``
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, power
from fusedopt.triton_kernels.moments import ratio, ratio_coefficients

name = "nadam"
states = ("exp_avg", "exp_avg_sq")
scalars = ("step", "mu_product")
hyper = ("beta1", "beta2", "eps", "momentum_decay")
coefficients = ratio_coefficients
direction = ratio


@triton.jit
def mu(beta1, decay, t):
    """The momentum of step t."""
    return beta1 * (1 - 0.5 * power(0.96 + 0 * t, t * decay))


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``ratio``; advances the product."""
    beta1, beta2, eps, decay = h
    step, product = s
    now = mu(beta1, decay, step)
    after = mu(beta1, decay, step + 1)
    product *= now
    root_scale = 1 / tl.sqrt(bias_correction(beta2, step))
    m_scale = after / (1 - product * after)
    return (1 - beta1, beta2, 1 - beta2, m_scale, (1 - now) / (1 - product), root_scale, eps), (step, product)
