"""Lion: ``d = sign(b1 m + (1 - b1) g)``, ``m <- b2 m + (1 - b2) g``."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight)

from fusedopt.triton_kernels.math import sign

name = "lion"
states = ("exp_avg",)
scalars = ()
hyper = ("beta1", "beta2")
coefficients = ("beta1", "one_minus_beta1", "beta2", "one_minus_beta2")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    beta1, beta2 = h
    return (beta1, 1 - beta1, beta2, 1 - beta2), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    beta1, one_minus_beta1, beta2, one_minus_beta2 = c
    update = beta1 * state[0] + one_minus_beta1 * g
    return sign(update), (beta2 * state[0] + one_minus_beta2 * g,)
