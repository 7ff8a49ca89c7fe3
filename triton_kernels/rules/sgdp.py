"""SGDP: ``b <- mu b + (1 - tau) g``; ``d = g + mu b`` with Nesterov, else b, projected, without Nesterov b itself.

``p <- (1 - lr wd r / (1 - mu)) p - lr d`` with r = ``wd_ratio`` where it was projected, else 1.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels import projected

name = "sgdp"
states = ("momentum",)
scalars = ("step", "n_dims")
hyper = ("momentum", "dampening", "nesterov", "eps", "weight_decay", "delta", "wd_ratio")
coefficients = ("momentum", "gain", "ahead", "g_scale", "eps", "delta", "wd_ratio", "along_buffer", "pull")
measures = projected.measures


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the projection in."""
    momentum, dampening, nesterov, eps, weight_decay, delta, wd_ratio = h
    ahead, g_scale = tl.where(nesterov != 0, momentum, 1.0), tl.where(nesterov != 0, 1.0, 0 * eps)
    pull = weight_decay / (1 - momentum)
    return (momentum, 1 - dampening, ahead, g_scale, eps, delta, wd_ratio, 0 * eps, pull), s


@triton.jit
def step(g, state, c):
    """The step before it is projected, and the buffer."""
    buffer = c[0] * state[0] + c[1] * g
    return c[3] * g + c[2] * buffer, buffer


@triton.jit
def measure(p, g, state, c, STATES):
    """See ``projected``."""
    d, _ = step(g, state, c)
    return projected.sums(p, g, d)


@triton.jit
def score(c, m):
    """See ``projected``."""
    return projected.score_of(c[4], m)


@triton.jit
def finish(c, s, m, whole, largest):
    """The projection."""
    along, pull = projected.project(c[4], c[5], c[6], c[8], s[1], m, whole, largest)
    return c[:7] + (along * (1 - c[3]), pull), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    d, buffer = step(g, state, c)
    return d + c[8] * p, (buffer - c[7] * p,)
