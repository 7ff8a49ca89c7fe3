"""Schedule-free SGD: ``u = g + wd y``; y goes towards z and along -u."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight)

from fusedopt.triton_kernels.schedule_free import scheduled

name = "schedulefreesgd"
states = ("z",)
scalars = ("step", "weight_sum", "lr_max")
hyper = ("lr", "weight_decay", "beta1", "warmup_steps", "r", "weight_lr_power")
coefficients = ("share", "along", "lr", "decay")
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    lr, weight_decay, beta1, warmup_steps, r, weight_lr_power = h
    share, along, now, after = scheduled(lr, beta1, warmup_steps, r, weight_lr_power, s)
    return (share, along, now, weight_decay), after


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    share, along, lr, decay = c
    z = state[0]
    u = g + decay * p
    return share * (p - z) + along * u, (z - lr * u,)
