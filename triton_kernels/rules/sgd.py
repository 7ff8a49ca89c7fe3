"""SGD: ``b <- mu b + (1 - tau) g`` (first step: ``b <- g``), ``d = g + mu b`` with Nesterov, else b; mu = 0: d = g."""

import triton
import triton.language as tl

name = "sgd"
states = ("momentum_buffer",)
scalars = ()
hyper = ("momentum", "dampening", "nesterov")
coefficients = ("momentum", "kept", "gain", "nesterov")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``. The first step puts the gradient into the buffer, whatever is there."""
    momentum, dampening, nesterov = h
    return (momentum, tl.where(new_state, 0.0, momentum), tl.where(new_state, 1.0, 1 - dampening), nesterov), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    if len(state) == 0:
        return g, state
    else:
        momentum, kept, gain, nesterov = c
        buffer = kept * state[0] + gain * g
        return tl.where(nesterov != 0, g + momentum * buffer, buffer), (buffer,)
