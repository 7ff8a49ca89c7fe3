"""Prodigy: ``s <- b3 s + d/d0 d lr g``, ``r <- b3 r + d/d0 d lr <g, p0 - p>``; p0 is p before its first step.

``m <- b1 m + d (1-b1) g``, ``v <- b2 v + d^2 (1-b2) g^2``, ``D = max(d, d_coef r / |s|_1)`` with sums over the scope,
``p <- p - d lr (m / (sqrt(v) + D eps) + wd p)``, or with ``wd p`` in the gradient where decay is coupled.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, sqrt

name = "prodigy"
states = ("s", "p0", "exp_avg", "exp_avg_sq")
scalars = ("step", "d", "d_max", "d_numerator", "k")
hyper = (
    "lr", "beta1", "beta2", "beta3", "eps", "weight_decay", "decouple", "use_bias_correction", "safeguard_warmup",
    "d0", "d_coef", "growth_rate",
)  # fmt: skip
coefficients = (
    "lr", "keep", "take", "keep_square", "take_square", "keep_sum", "take_sum", "coupled", "decoupled",
    "corrected", "weight", "beta3", "d0", "d_coef", "growth_rate", "scale", "eps",
)  # fmt: skip
measures = ("along", "length")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts what d makes of them in."""
    lr, beta1, beta2, beta3, eps, weight_decay, decouple, corrects, safeguard, d0, d_coef, growth_rate = h
    _, d, _, _, k = s
    corrected = tl.sqrt(bias_correction(beta2, k + 1)) / bias_correction(beta1, k + 1)
    corrected = tl.where(corrects != 0, corrected, 1.0)
    weight, moves = d / d0 * d, lr > 0
    c = (
        lr,
        tl.where(moves, beta1, 1.0),
        d * (1 - beta1),
        tl.where(moves, beta2, 1.0),
        d * d * (1 - beta2),
        tl.where(moves, beta3, 1.0),
        weight * tl.where(safeguard != 0, 1.0, lr * corrected),
        tl.where(decouple != 0, 0.0, weight_decay),
        tl.where(decouple != 0, weight_decay, 0.0),
        corrected,
        weight,
        beta3,
        d0,
        d_coef,
        growth_rate,
        tl.where(moves, d * corrected, 0.0),
        eps,
    )
    return c, s


@triton.jit
def advance(p, g, state, c):
    """The gradient with coupled decay, or 0 of what does not move, and the new sum of gradients."""
    h = tl.where(c[0] > 0, g + c[7] * p, 0.0)
    return h, c[5] * state[0] + c[6] * h


@triton.jit
def measure(p, g, state, c, STATES):
    """``g (p0 - p)`` and ``|s|``, of what moves."""
    h, s = advance(p, g, state, c)
    return (c[9] * h * (state[1] - p), tl.where(c[0] > 0, tl.abs(s), 0.0))


@triton.jit
def score(c, m):
    """The learning rate of a tensor's group."""
    return c[0] + 0 * m[0]


@triton.jit
def finish(c, s, m, whole, largest):
    """The estimate, unless nothing has moved anything yet; float32 makes of d0 what is nearer to it than 1e-7."""
    step, before, d_max, numerator, k = s
    goes = whole[1] != 0
    lr = tl.where(largest == float("-inf"), c[0], largest)
    numerator = tl.where(goes, c[11] * numerator + c[10] * lr * whole[0], numerator)
    estimate = c[13] * numerator / tl.where(goes, whole[1], 1.0)
    d = tl.where((before <= c[12] * (1 + 1e-7)) & (estimate > before), estimate, before)
    d_max = tl.where(goes & (estimate > d_max), estimate, d_max)
    limit = d * c[14]
    d = tl.where(goes, tl.where(limit < d_max, limit, d_max), before)
    c = c[:15] + (tl.where(goes, c[15], 0.0), d * c[16])
    return c, (step, d, d_max, numerator, tl.where(goes, k + 1, k))


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    h, s = advance(p, g, state, c)
    m = c[1] * state[2] + c[2] * h
    v = c[3] * state[3] + c[4] * (h * h)
    return c[15] * (div(m, sqrt(v) + c[16]) + c[8] * p), (s, state[1], m, v)
