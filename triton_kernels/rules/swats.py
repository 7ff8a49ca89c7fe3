"""SWATS: Adam, ``q = -lr m sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps)``, until the rate of SGD settles.

The sums ``<q, q>`` and ``<q, g>`` over the scope tell the rate of the SGD step that is projected on it,
``r = <q, q> / -<q, g>``, ``l <- b2 l + (1 - b2) r``; once ``l / (1 - b2^k)`` settles at r, SGD with that rate:
``b <- b1 b + g``, ``p <- p - (1 - b1) rate b``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import bias_correction, div, sqrt

name = "swats"
states = ("exp_avg", "exp_avg_sq")
scalars = ("step", "phase", "rate", "scope_step", "adam_lr", "sgd_lr", "buffered", "step_square", "step_grad")
hyper = ("lr", "beta1", "beta2", "eps", "tol")
coefficients = ("lr", "keep", "take", "beta2", "one_minus_beta2", "scale", "root_scale", "eps")
epilogue = ("step_square", "step_grad")


@triton.jit
def decided(beta2, tol, phase, rate, scope_step, sgd_lr, square, grad):
    """What the last step's sums tell: the phase, the running rate, and the rate of SGD."""
    tells = (phase == 0) & (scope_step >= 1) & (grad != 0)
    r = square / tl.where(tells, grad, 1.0)
    rate = tl.where(tells, beta2 * rate + (1 - beta2) * r, rate)
    settled = rate / tl.where(tells, bias_correction(beta2, scope_step), 1.0)
    is_near = tl.abs(settled - r) < tol + 1e-6 * tl.abs(r)
    switches = tells & (scope_step > 1) & (settled > 0) & is_near
    return tl.where(switches, 1.0, phase), rate, tl.where(switches, settled, sgd_lr)


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of whichever phase it is."""
    lr, beta1, beta2, eps, tol = h
    step, phase, rate, scope_step, adam_lr, sgd_lr, buffered, square, grad = s
    phase, rate, sgd_lr = decided(beta2, tol, phase, rate, scope_step, sgd_lr, square, grad)
    is_sgd = phase != 0
    base = tl.where(adam_lr > 0, adam_lr, lr)
    sgd_scale = tl.where(base > 0, (1 - beta1) * sgd_lr / tl.where(base > 0, base, 1.0), 0.0)
    adam_scale = tl.sqrt(bias_correction(beta2, step)) / bias_correction(beta1, step)
    c = (
        lr,
        tl.where(is_sgd & (buffered == 0), 0.0, beta1),
        tl.where(is_sgd, 1.0, 1 - beta1),
        tl.where(is_sgd, 1.0, beta2),
        tl.where(is_sgd, 0.0, 1 - beta2),
        tl.where(is_sgd, sgd_scale, adam_scale),
        tl.where(is_sgd, 0.0, 1.0 + 0 * eps),
        tl.where(is_sgd, 1.0, eps),
    )
    adam_lr = tl.where(is_sgd, adam_lr, lr)
    buffered = tl.where(is_sgd, 1.0, buffered)
    return c, (step, phase, rate, scope_step + 1, adam_lr, sgd_lr, buffered, square, grad)


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    _, keep, take, beta2, one_minus_beta2, scale, root_scale, eps = c
    m = keep * state[0] + take * g
    if len(state) == 2:
        v = beta2 * state[1] + one_minus_beta2 * (g * g)
        return div(scale * m, root_scale * sqrt(v) + eps), (m, v)
    else:
        return scale * m, (m,)


@triton.jit
def conclude(p, g, d, state, c, STATES):
    """``<q, q>`` and ``-<q, g>``."""
    q = c[0] * d
    return (q * q, q * g)
