"""KOALA-M, with a velocity u and an average e for each parameter, and a covariance P of 2 by 2 for all.

Predicted (``p <- p + u``, ``u <- a u`` beforehand): ``qw <- 0.9 qw + 0.1 drift``, ``P <- F P F' + diag(qw, qv)`` with
``F = (1 1; 0 a)``. Then ``h = g + wd p``, ``S = P00 |h|^2 + R``, ``k = (loss + wd |p|^2 / 2) / S``:
``p <- p - lr P00 k h``, ``u <- u - lr P10 k h``, ``e <- 0.9 e + 0.1 p``, ``P <- P - max |h|^2 / S P[:,0] P[:,0]'``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels import koala

name = "koalam"
states = ("velocity", "average")
scalars = ("step", "p00", "p10", "p11", "qw", "noise", "predictions")
hyper = (
    "lr",
    "weight_decay",
    "a",
    "qv",
    "r",
    "online",
    "loss",
    "loss_square",
    "measured",
    "drift",
    "predictions",
)
coefficients = (
    "lr",
    "weight_decay",
    "p00",
    "p10",
    "p11",
    "noise",
    "loss",
    "measured",
    "gain",
    "velocity_gain",
    "follow",
)
measures = koala.measures


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the gains in."""
    lr, weight_decay, a, qv, r, online, loss, loss_square, measured, drift, predictions = h
    step, p00, p10, p11, qw, before, done = s
    for _ in tl.static_range(2):
        goes = done < predictions
        qw = tl.where(goes, 0.9 * qw + 0.1 * drift, qw)
        p00 = tl.where(goes, p00 + 2 * p10 + p11 + qw, p00)
        p10 = tl.where(goes, a * (p10 + p11), p10)
        p11 = tl.where(goes, a * a * p11 + qv, p11)
        done = tl.where(goes, done + 1, done)
    noise = koala.noise_after(r, online, loss_square, measured, before)
    c = (lr, weight_decay, p00, p10, p11, noise, loss, measured, 0 * lr, 0 * lr, 0 * lr)
    return c, (step, p00, p10, p11, qw, noise, done)


@triton.jit
def measure(p, g, state, c, STATES):
    """See ``koala``."""
    return koala.sums(p, g, c[1])


@triton.jit
def score(c, m):
    """``|h|^2 / S``."""
    return koala.over_innovation(m[1], m, c[2], c[5])


@triton.jit
def finish(c, s, m, whole, largest):
    """The gains, and the covariance that is left."""
    lr, weight_decay, p00, p10, p11, noise, loss, measured, _, _, _ = c
    k = koala.over_innovation(loss + 0.5 * weight_decay * m[2], m, p00, noise)
    k = tl.where(measured != 0, k, 0.0)
    follow = tl.where((measured != 0) & koala.is_measured(m), 0.1 + 0 * noise, 0.0)
    most = tl.where((measured != 0) & (largest > 0), largest, 0.0)
    left = 1 - most * p00
    s = (s[0], p00 * left, p10 * left, p11 - most * p10 * p10, s[4], s[5], s[6])
    return (lr, weight_decay, p00, p10, p11, noise, loss, measured, p00 * k, lr * p10 * k, follow), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    h = g + c[1] * p
    d = c[8] * h
    return d, (state[0] - c[9] * h, state[1] + c[10] * (p - c[0] * d - state[1]))
