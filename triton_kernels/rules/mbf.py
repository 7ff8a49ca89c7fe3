"""MBF's steps before and after its blocks are inverted, and that of diagonal blocks; the states say which one it is.

``momentum_buffer, exp_avg_sq``: ``d = b / (v / (1-beta^t) + damping)``, with ``b <- mu b + g`` and
``v <- beta v + (1-beta) g^2``. ``block_momentum``: the same b; p = g, where p is what blocks are made of. None:
``d = g``, where g is b times the inverses.
"""

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight)

from fusedopt.triton_kernels.math import bias_correction, div

name = "mbf"
states = ("momentum_buffer", "exp_avg_sq", "block_momentum")
scalars = ("step",)
hyper = ("momentum", "beta", "damping")
coefficients = ("momentum", "beta", "one_minus_beta", "scale", "damping")
replaces = "block_momentum"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    momentum, beta, damping = h
    return (momentum, beta, 1 - beta, 1 / bias_correction(beta, s[0]), damping), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    momentum, beta, one_minus_beta, scale, damping = c
    if len(state) == 2:
        b, v = momentum * state[0] + g, beta * state[1] + one_minus_beta * (g * g)
        return div(b, scale * v + damping), (b, v)
    elif len(state) == 1:
        return g, (momentum * state[0] + g,)
    else:
        return g, ()
