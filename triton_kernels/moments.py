"""What the Adam family shares: moments, and the step that is a ratio of both."""

import triton
import triton.language as tl  # noqa: F401 (the interpreter wants it in sight)

from fusedopt.triton_kernels.math import div, lerp, maximum, sqrt

ratio_coefficients = ("one_minus_beta1", "beta2", "one_minus_beta2", "m_scale", "g_scale", "root_scale", "eps")


@triton.jit
def update_moments(g, state, one_minus_beta1, beta2, one_minus_beta2):
    """``m <- b1 m + (1 - b1) g``, ``v <- b2 v + (1 - b2) g^2``, and ``x <- max(x, v)`` if there is a third state.

    Returns the second moment that the step divides by, and the new state.
    """
    m = lerp(state[0], g, one_minus_beta1)
    v = beta2 * state[1] + one_minus_beta2 * (g * g)
    if len(state) == 3:
        x = maximum(state[2], v)
        return x, (m, v, x)
    else:
        return v, (m, v)


@triton.jit
def ratio(p, g, state, c, STATES):
    """``d = (m_scale m + g_scale g) / (root_scale sqrt(w) + eps)``."""
    one_minus_beta1, beta2, one_minus_beta2, m_scale, g_scale, root_scale, eps = c
    w, new = update_moments(g, state, one_minus_beta1, beta2, one_minus_beta2)
    return div(m_scale * new[0] + g_scale * g, root_scale * sqrt(w) + eps), new
