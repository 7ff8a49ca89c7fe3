"""What KoalaV and KoalaM share: the loss is a measurement of a Kalman filter, ``h = g + wd p`` its derivative."""

import triton
import triton.language as tl

measures = ("grad", "slope", "param")


@triton.jit
def sums(p, g, weight_decay):
    """The squares of the gradient, of h, and of the parameter."""
    h = g + weight_decay * p
    return (g * g, h * h, p * p)


@triton.jit
def is_measured(m):
    """Whether a tensor's gradient is at least 1e-9 long; others are left out."""
    return m[0] >= 1e-18


@triton.jit
def over_innovation(x, m, variance, noise):
    """``x / S`` with ``S = variance |h|^2 + noise``; 0 of what is left out."""
    S = variance * m[1] + noise
    fits = is_measured(m) & (S > 0)
    return tl.where(fits, x / tl.where(fits, S, 1.0), 0.0)


@triton.jit
def noise_after(r, online, loss_square, measured, noise):
    """That of the measurement after this step: fixed, or a running mean of the losses' squares."""
    return tl.where(online == 0, r, tl.where(measured != 0, 0.9 * noise + 0.1 * loss_square, noise))
