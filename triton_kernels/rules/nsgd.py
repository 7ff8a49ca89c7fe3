"""NSGD: SGD, whose step is divided by the power of the input of the layer that a parameter is of, or of each channel.

Its inverse is kept in ``scale``, and in ``channel_scale`` for each element; 1 where there is none.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.signatures import has

name = "nsgd"
states = ("momentum_buffer", "channel_scale")
scalars = ("step", "scale")
hyper = ("momentum", "dampening", "nesterov")
coefficients = ("momentum", "kept", "gain", "nesterov", "scale")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``. The first step puts the gradient into the buffer, whatever is there."""
    momentum, dampening, nesterov = h
    kept, gain = tl.where(new_state, 0.0, momentum), tl.where(new_state, 1.0, 1 - dampening)
    return (momentum, kept, gain, nesterov, s[1]), s


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    momentum, kept, gain, nesterov, scale = c
    d, new = g, state
    if has(STATES, "momentum_buffer"):
        buffer = kept * state[0] + gain * g
        d = tl.where(nesterov != 0, g + momentum * buffer, buffer)
        if has(STATES, "channel_scale"):
            new = (buffer, state[1])
        else:
            new = (buffer,)
    if has(STATES, "channel_scale"):
        d = d * state[len(state) - 1]
    return d * scale, new
