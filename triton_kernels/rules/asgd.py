"""ASGD: ``d = lambd eta p + eta g``, ``ax <- ax + mu (p - d - ax)``, and then eta and mu of the next step.

``eta <- lr / (1 + lambd lr t)^alpha``, ``mu <- 1 / max(1, t - t0)``
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.math import power

name = "asgd"
states = ("ax",)
scalars = ("step", "eta", "mu")
hyper = ("lr", "lambd", "alpha", "t0")
coefficients = ("shrinkage", "eta", "mu")
step_scale = "one"


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``; advances eta and mu."""
    lr, lambd, alpha, t0 = h
    step, eta, mu = s
    following = lr / power(1 + lambd * lr * step, alpha)
    return (lambd * eta, eta, mu), (step, following, 1 / tl.maximum(step - t0, 1.0))


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    shrinkage, eta, mu = c
    d = shrinkage * p + eta * g
    stepped = p - d
    return d, (tl.where(mu == 1, stepped, state[0] + mu * (stepped - state[0])),)
