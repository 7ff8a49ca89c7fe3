"""The Triton rules of sum_rules.py: classes in place of modules."""

from functools import cache

import triton
import triton.language as tl

from fusedopt.engines import triton as engine
from fusedopt.triton_kernels import rules


@triton.jit
def prepare_channel(h, s, new_state):
    momentum, eps = h
    return (momentum, eps, 1 / s[0], 0 * eps), s


@triton.jit
def measure_channel(p, g, state, c, STATES):
    return (p * p + 1, g * g)


@triton.jit
def score_channel(c, m):
    return c[2] * m[0] / (1 + m[1])


@triton.jit
def finish_channel(c, s, m, whole, largest):
    scale = (2 + largest / (1 + whole[0])) / (tl.sqrt(m[1]) + c[1]) / (1 + tl.sqrt(whole[1]))
    return c[:3] + (scale,), s


@triton.jit
def direction_channel(p, g, state, c, STATES):
    buffer = c[0] * state[0] + c[3] * g
    return buffer, (buffer,)


@triton.jit
def prepare_sharing(h, s, new_state):
    return (h[0], 1 / s[0]), s


@triton.jit
def measure_sharing(p, g, state, c, STATES):
    return (g * g,)


@triton.jit
def score_sharing(c, m):
    return m[0] * c[1]


@triton.jit
def finish_sharing(c, s, m, whole, largest):
    level = c[0] * s[1] + (1 - c[0]) * tl.sqrt(whole[0])
    return (c[0], (1 + m[0] * c[1]) / (1 + largest) / (1 + level)), (s[0], level)


@triton.jit
def direction_sharing(p, g, state, c, STATES):
    return c[1] * g, state


@triton.jit
def prepare_concluding(h, s, new_state):
    return (h[0], (1 + tl.abs(s[2])) / (1 + s[1]) / s[0]), s


@triton.jit
def direction_concluding(p, g, state, c, STATES):
    buffer = c[0] * state[0] + c[1] * g
    return buffer, (buffer,)


@triton.jit
def conclude_concluding(p, g, d, state, c, STATES):
    return (d * d + 1, d * g + 0 * p)


@triton.jit
def prepare_layer(h, s, new_state):
    momentum, beta, eps, weight_decay = h
    return (momentum, tl.where(new_state, 1.0, 1 - beta), eps, weight_decay, 0 * eps), s


@triton.jit
def finish_layer(c, s, m, whole, largest):
    norm_sq = s[1] + c[1] * (m[0] - s[1])
    return c[:4] + (1 / (tl.sqrt(norm_sq) + c[2]),), (s[0], norm_sq)


@triton.jit
def direction_layer(p, g, state, c, STATES):
    buffer = c[0] * state[0] + c[4] * g + c[3] * p
    return buffer, (buffer,)


class Channel:
    name, states, scalars, hyper = "channel", ("momentum_buffer",), ("step",), ("momentum", "eps")
    coefficients, measures = ("momentum", "eps", "weight", "scale"), ("param", "grad")
    prepare, measure, score, finish = prepare_channel, measure_channel, score_channel, finish_channel
    direction = direction_channel


class Sharing:
    name, states, scalars, hyper = "sharing", (), ("step", "level"), ("momentum",)
    coefficients, measures = ("momentum", "scale"), ("grad",)
    prepare, measure, score, finish = prepare_sharing, measure_sharing, score_sharing, finish_sharing
    direction = direction_sharing


class Concluding:
    name, states, scalars, hyper = "concluding", ("momentum_buffer",), ("step", "length", "along"), ("momentum",)
    coefficients, epilogue = ("momentum", "scale"), ("length", "along")
    prepare, direction, conclude = prepare_concluding, direction_concluding, conclude_concluding


class Layer:
    name, states, scalars = "layer", ("momentum_buffer",), ("step", "norm_sq")
    hyper = ("momentum", "beta", "eps", "weight_decay")
    coefficients, measures = ("momentum", "beta", "eps", "decay", "scale"), ("grad",)
    prepare, measure, finish, direction = prepare_layer, measure_sharing, finish_layer, direction_layer


def know(monkeypatch):
    """The Triton engine has them, too."""
    known = {**rules.by_name(), **{rule.name: rule for rule in (Channel, Sharing, Concluding, Layer)}}
    monkeypatch.setattr(rules, "by_name", lambda: known)
    monkeypatch.setattr(engine, "kernels", cache(engine.kernels.__wrapped__))
