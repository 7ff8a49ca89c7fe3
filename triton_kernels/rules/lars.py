"""LARS: SGD on ``trust (g + wd p)``, ``trust = eta |p| / (|g| + wd |p| + eps)``, norms over the tensor.

It is 1 where either norm is 0, and where nothing decays unless ``always_adapt``.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.rules import sgd

name = "lars"
states = sgd.states
scalars = ()
hyper = (*sgd.hyper, "weight_decay", "trust_coefficient", "eps", "always_adapt")
coefficients = (*sgd.coefficients, "weight_decay", "trust_coefficient", "eps", "adapts", "trust")
measures = ("param", "grad")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients; ``finish`` puts the ratio in."""
    weight_decay, trust_coefficient, eps, always_adapt = h[3:]
    c, s = sgd.prepare(h[:3], s, new_state)
    adapts = tl.where((weight_decay != 0) | (always_adapt != 0), 1.0, 0.0)
    return c + (weight_decay, trust_coefficient, eps, adapts, 1 + 0 * eps), s


@triton.jit
def measure(p, g, state, c, STATES):
    """The squares of both norms."""
    return (p * p, g * g)


@triton.jit
def finish(c, s, m, whole, largest):
    """The ratio."""
    weight_decay, trust_coefficient, eps, adapts, trust = c[4:]
    p, g = tl.sqrt(m[0]), tl.sqrt(m[1])
    adapts = (adapts != 0) & (p > 0) & (g > 0)
    trust = tl.where(adapts, trust_coefficient * p / (g + weight_decay * p + eps), trust)
    return c[:8] + (trust,), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    return sgd.direction(p, c[8] * (g + c[4] * p), state, c[:4], STATES)
