"""Prodigy: ``m <- b1 m + (1 - b1) d g``, ``v <- b2 v + (1 - b2) d^2 g^2``, ``s <- b3 s + lr d^2 / d0 g``.

Over everything ``r <- b3 r + lr d^2 / d0 sum g (p0 - p)`` and ``d <- max(d, coef r / sum |s|)``;
``p <- p - d lr (m / (sqrt(v) + d eps) + wd p)`` with the d before, but for that beside eps.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, sqrt

name = "prodigy"
states = ("s", "p0", "exp_avg", "exp_avg_sq")
scalars = ("step", "d", "d_max", "d_numerator")
hyper = (
    "lr", "weight_decay", "beta1", "beta2", "beta3", "eps", "d0", "d_coef", "growth_rate", "decouple",
    "use_bias_correction", "safeguard_warmup",
)  # fmt: skip
coefficients = (
    "is_new", "moves", "coupled", "decay", "keep_m", "take_m", "keep_v", "take_v", "keep_s", "take_s", "slope_scale",
    "beta3", "d0", "d_coef", "growth_rate", "eps", "d_lr",
)  # fmt: skip
measures = ("slope", "size")
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the new estimate in."""
    lr, weight_decay, beta1, beta2, beta3, eps, d0, d_coef, growth_rate, decouple, corrects, safeguard = h
    step, d, _, _ = s
    scale = tl.sqrt(bias_correction(beta2, step)) / bias_correction(beta1, step)
    d_lr = d * lr * tl.where(corrects != 0, scale, 1.0)
    rate = tl.where(beta3 > 0, beta3, tl.sqrt(beta2))
    moves = tl.where(lr > 0, 1.0, 0.0)
    stays = 1 - moves
    coupled, decay = tl.where(decouple != 0, 0.0, weight_decay), tl.where(decouple != 0, weight_decay, 0.0)
    moments = (
        moves * beta1 + stays, moves * d * (1 - beta1), moves * beta2 + stays, moves * d * d * (1 - beta2),
        moves * rate + stays, moves * (d / d0) * tl.where(safeguard != 0, d, d_lr),
    )  # fmt: skip
    rest = (d / d0) * d_lr, rate, d0, d_coef, growth_rate, eps, d_lr
    return (tl.where(new_state, 1.0, 0.0), moves, coupled, decay) + moments + rest, s


@triton.jit
def measure(p, g, state, c, STATES):
    """See the module's text."""
    g = g + c[2] * p
    start = tl.where(c[0] != 0, p, state[1])
    return (c[10] * (g * (start - p)), c[1] * tl.abs(c[8] * state[0] + c[9] * g))


@triton.jit
def finish(c, s, m, whole, largest):
    """The estimate."""
    step, d, d_max, numerator = s
    is_known = whole[1] > 0
    found = c[11] * numerator + whole[0]
    estimate = c[13] * found / tl.where(is_known, whole[1], 1.0)
    start = tl.where((d <= c[12] * (1 + 1e-6)) & (estimate > d), estimate, d)
    most = tl.where(estimate > d_max, estimate, d_max)
    grown = start * c[14]
    new = tl.where(is_known, tl.where(grown < most, grown, most), d)
    after = step, new, tl.where(is_known, most, d_max), tl.where(is_known, found, numerator)
    return c[:15] + (c[15] * new, tl.where(is_known, c[16], 0.0)), after


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    g = g + c[2] * p
    s = c[8] * state[0] + c[9] * g
    start = tl.where(c[0] != 0, p, state[1])
    m, v = c[4] * state[2] + c[5] * g, c[6] * state[3] + c[7] * (g * g)
    return c[16] * (div(m, sqrt(v) + c[15]) + c[3] * p), (s, start, m, v)
