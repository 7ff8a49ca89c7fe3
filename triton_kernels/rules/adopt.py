"""ADOPT, whose second moment is that of the steps before, and divides before the first is taken.

``n = clamp((g + l2 p) / max(sqrt(v), eps), -clip, clip)``, ``m <- b1 m + (1 - b1) n``, ``v <- b2 v + (1 - b2) g^2``,
``d = m + decay p``; the first step only sets ``v <- g^2``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import clamp, div, lerp, maximum, power, sqrt

name = "adopt"
states = ("exp_avg", "exp_avg_sq")
scalars = ("step",)
hyper = ("weight_decay", "beta1", "beta2", "eps", "clip_exp", "clips", "decoupled")
coefficients = ("one_minus_beta1", "keep_sq", "take_sq", "eps", "clip", "coupled", "decay")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    weight_decay, beta1, beta2, eps, clip_exp, clips, decoupled = h
    is_first = s[0] == 1
    clip = tl.where(clips != 0, power(tl.maximum(s[0] - 1, 1.0), clip_exp), float("inf"))
    keep, take = tl.where(is_first, 1.0, beta2), tl.where(is_first, 1.0, 1 - beta2)
    coupled = tl.where(decoupled != 0, 0.0, weight_decay)
    decay = tl.where((decoupled != 0) & (is_first == 0), weight_decay, 0.0)
    return (1 - beta1, keep, take, eps, tl.where(is_first, 0.0, clip), coupled, decay), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    one_minus_beta1, keep_sq, take_sq, eps, clip, coupled, decay = c
    g = g + coupled * p
    n = clamp(div(g, maximum(sqrt(state[1]), tl.zeros_like(g) + eps)), -clip, clip)
    m = lerp(state[0], n, one_minus_beta1)
    return m + decay * p, (m, keep_sq * state[1] + take_sq * (g * g))
