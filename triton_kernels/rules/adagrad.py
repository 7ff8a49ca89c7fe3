"""Adagrad: ``S <- S + g^2``, ``d = g / (sqrt(S) + eps) / (1 + (t - 1) lr_decay)``."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight)

from fusedopt.triton_kernels.math import div, sqrt

name = "adagrad"
states = ("sum",)
scalars = ("step",)
hyper = ("lr_decay", "eps")
coefficients = ("scale", "eps")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    lr_decay, eps = h
    return (1 / (1 + (s[0] - 1) * lr_decay), eps), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    scale, eps = c
    total = state[0] + g * g
    return div(scale * g, sqrt(total) + eps), (total,)
