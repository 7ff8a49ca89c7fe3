"""What the engine does with a step's operands around the rule, the same for all of them."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.noise import noise
from fusedopt.triton_kernels.signatures import average, draws, n_states, replaces
from fusedopt.triton_kernels.tile import fetch, locate, put


@triton.jit
def operands(
    segment, start, engine, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """SIZE elements, as a rule sees them: where they are, the parameter, the gradient, and the states."""
    words, layouts, origin, numel, addresses = segment
    at = locate(words, layouts, origin, start, numel, SIGNATURES, K, SIZE)
    p = fetch(addresses, at, SIGNATURES, K, 0, SIZE, FULL)
    g = fetch(addresses, at, SIGNATURES, K, 1, SIZE, FULL) * engine[0]
    if draws(SIGNATURES, K):
        g += noise(words, at, engine[8:], SIGNATURES, K, SIZE)
    state = ()
    for k in tl.static_range(n_states(SIGNATURES, K)):
        state = state + (fetch(addresses, at, SIGNATURES, K, 2 + k, SIZE, FULL),)
    if replaces(SIGNATURES, K):
        return at, p, g, state  # and p is not read, where the rule does not
    else:
        return at, p, tl.where(engine[1] != 0, g + engine[1] * p, g), state


@triton.jit
def decayed(p, d, engine):
    """The parameter after decoupled decay, which may be cautious."""
    if len(engine) > 4:
        return tl.where(d * p < 0, engine[4], engine[2]) * p
    else:
        return engine[2] * p


@triton.jit
def _lerp(a, b, w):
    return tl.where(w < 0.5, a + w * (b - a), b - (1 - w) * (b - a))


@triton.jit
def averaged(
    addresses, at, p, engine, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The parameter after its average, which is written."""
    PLACE: tl.constexpr = 2 + n_states(SIGNATURES, K)
    if average(SIGNATURES, K) == "ema":
        ema = fetch(addresses, at, SIGNATURES, K, PLACE, SIZE, FULL)
        put(addresses, at, _lerp(ema, p, engine[5]), None, SIGNATURES, K, PLACE, SIZE, FULL)
    elif average(SIGNATURES, K) == "slow":
        if engine[7] != 0:
            slow = _lerp(fetch(addresses, at, SIGNATURES, K, PLACE, SIZE, FULL), p, engine[6])
            put(addresses, at, slow, None, SIGNATURES, K, PLACE, SIZE, FULL)
            p = slow
    return p
