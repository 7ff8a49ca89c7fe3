"""Schedule-free SGD: ``u = g + wd y``; y goes towards z and along -u."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.schedule_free import scheduled

name = "schedulefreesgd"
states = ("z",)
scalars = ("step", "weight_sum", "lr_max")
hyper = ("lr", "weight_decay", "beta1", "warmup_steps", "r", "weight_lr_power")
coefficients = ("is_new", "share", "along", "lr", "decay")
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    lr, weight_decay, beta1, warmup_steps, r, weight_lr_power = h
    share, along, now, after = scheduled(lr, beta1, warmup_steps, r, weight_lr_power, s)
    return (tl.where(new_state, 1.0, 0.0), share, along, now, weight_decay), after


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    is_new, share, along, lr, decay = c
    z = tl.where(is_new != 0, p, state[0])
    u = g + decay * p
    return share * (p - z) + along * u, (z - lr * u,)
