"""``p <- p + weight (z - p)``, where the gradient is z: what makes parameters others and these again."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight)

name = "interpolation"
states = ()
scalars = ()
hyper = ("weight",)
coefficients = ("weight",)
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    return h, s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    return c[0] * (p - g), ()
