"""AMSGD: ``b = clip(sum(g^2 + lam d (2 g - d)) / sum((d - g)^2), 0, b_max)``, 0 where the second sum is 0.

``d <- ((b + lam) d + (1 - b) g) / (1 + lam)``. Before a tensor's first step, d is its gradient.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.memory import memory_of

name = "amsgd"
states = ("momentum_buffer",)
scalars = ("step", "beta")
hyper = ("lam", "beta_max")
coefficients = ("lam", "beta_max", "is_new", "kept", "taken")
measures = ("gain", "difference")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the memory in."""
    lam, beta_max = h
    return (lam, beta_max, tl.where(new_state, 1.0, 0 * lam), 0 * lam, 0 * lam), s


@triton.jit
def measure(p, g, state, c, STATES):
    """See the module's text."""
    d = tl.where(c[2] != 0, g, state[0])
    return (g * g + c[0] * d * (2 * g - d), (d - g) * (d - g))


@triton.jit
def finish(c, s, m, whole, largest):
    """The memory, and what it makes of both directions."""
    lam = c[0]
    beta = memory_of(whole[0], whole[1], c[1])
    return c[:3] + ((beta + lam) / (1 + lam), (1 - beta) / (1 + lam)), (s[0], beta)


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    d = tl.where(c[2] != 0, g, c[3] * state[0] + c[4] * g)
    return d, (d,)
