"""ReplicatedSGD: SGD's step along ``h = g + gamma (p - center)``; center is the mean of replicas."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.rules.sgd import prepare as prepare_sgd

name = "replicatedsgd"
states = ("momentum_buffer", "center")
scalars = ("step",)
hyper = ("momentum", "dampening", "nesterov", "gamma")
coefficients = ("momentum", "kept", "gain", "nesterov", "gamma")


@triton.jit
def prepare(h, s, new_state):
    """Coefficients of ``direction``."""
    momentum, dampening, nesterov, gamma = h
    c, after = prepare_sgd((momentum, dampening, nesterov), s, new_state)
    momentum, kept, gain, nesterov = c
    return (momentum, kept, gain, nesterov, gamma), after


@triton.jit
def direction(p, g, state, c, STATES):
    """See the module's text."""
    momentum, kept, gain, nesterov, gamma = c
    if len(state) == 1:
        return g + gamma * (p - state[0]), state
    else:
        h = g + gamma * (p - state[1])
        buffer = kept * state[0] + gain * h
        return tl.where(nesterov != 0, h + momentum * buffer, buffer), (buffer, state[1])
