"""KOALA-V: ``s <- s + q``, ``h = g + wd p``, ``S = s |h|^2 + R``, ``p <- p - lr s / S (loss + wd |p|^2 / 2) h``.

``s <- s - s^2 max |h|^2 / S`` over all tensors. As the authors' code has it, the step is along g.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels import koala

name = "koalav"
states = ()
scalars = ("step", "sigma", "noise")
hyper = ("weight_decay", "q", "r", "online", "match_reference", "loss", "loss_square", "measured")
coefficients = ("weight_decay", "sigma", "noise", "loss", "measured", "gain", "decay")
measures = koala.measures


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the gain in."""
    weight_decay, q, r, online, match_reference, loss, loss_square, measured = h
    sigma = tl.where(measured != 0, s[1] + q, s[1])
    noise = koala.noise_after(r, online, loss_square, measured, s[2])
    decay = tl.where(match_reference != 0, 0.0, weight_decay)
    return (weight_decay, sigma, noise, loss, measured, 0 * q, decay), (s[0], sigma, noise)


@triton.jit
def measure(p, g, state, c, STATES):
    """See ``koala``."""
    return koala.sums(p, g, c[0])


@triton.jit
def score(c, m):
    """``|h|^2 / S``."""
    return koala.over_innovation(m[1], m, c[1], c[2])


@triton.jit
def finish(c, s, m, whole, largest):
    """The gain, and the variance that is left."""
    weight_decay, sigma, noise, loss, measured, gain, decay = c
    k = koala.over_innovation(loss + 0.5 * weight_decay * m[2], m, sigma, noise)
    gain = tl.where(measured != 0, sigma * k, 0.0)
    most = tl.where((measured != 0) & (largest > 0), largest, 0.0)
    c = (weight_decay, sigma, noise, loss, measured, gain, decay * gain)
    return c, (s[0], sigma * (1 - sigma * most), s[2])


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    return c[5] * g + c[6] * p, ()
