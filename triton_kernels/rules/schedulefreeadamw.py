"""Schedule-free AdamW: ``u = g / (sqrt(v) / sqrt(1 - b2^t) + eps) + wd y``; y goes towards z and along -u."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, sqrt
from fusedopt.triton_kernels.schedule_free import scheduled

name = "schedulefreeadamw"
states = ("z", "exp_avg_sq")
scalars = ("step", "weight_sum", "lr_max")
hyper = ("lr", "weight_decay", "beta1", "beta2", "eps", "warmup_steps", "r", "weight_lr_power")
coefficients = ("share", "along", "lr", "decay", "beta2", "one_minus_beta2", "root_scale", "eps")
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    lr, weight_decay, beta1, beta2, eps, warmup_steps, r, weight_lr_power = h
    share, along, now, after = scheduled(lr, beta1, warmup_steps, r, weight_lr_power, s)
    root_scale = 1 / tl.sqrt(bias_correction(beta2, s[0]))
    return (share, along, now, weight_decay, beta2, 1 - beta2, root_scale, eps), after


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    share, along, lr, decay, beta2, one_minus_beta2, root_scale, eps = c
    z = state[0]
    v = beta2 * state[1] + one_minus_beta2 * (g * g)
    u = div(g, root_scale * sqrt(v) + eps) + decay * p
    return share * (p - z) + along * u, (z - lr * u, v)
