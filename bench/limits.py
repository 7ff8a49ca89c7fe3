"""The limit of a step: how fast this machine moves the same streams of memory and does nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt.bench.rows import COPY, LIMIT
from fusedopt.engines import cpu

FLOAT = 4
# Elements of a stream. Longer ones would only take memory: none of this length is kept in a cache.
LONGEST = {"cpu": 2**26, "cuda": 2**28}


@dataclass(frozen=True)
class Limit:
    """Memory that is touched as a step touches it.

    Attributes:
        how: For reports.
        step: Touches it once.
        nbytes: What that moves.
    """

    how: str
    step: Callable[[], object]
    nbytes: int


def limits(kind: str, nbytes: int, states: int, measured: int = 0) -> dict[str, Limit]:
    """The limit for a step, and on GPUs a plain copy too; the copy alone where there is nothing better.

    Streams of floats, as many as a float32 step has (those that it measures are read; then one is read, one and one
    more for each state are read and written), so long that together they are as many bytes as the step moves, but no
    longer than ``LONGEST``.

    Args:
        kind: Of device.
        nbytes: What the step moves.
        states: How many the optimizer has.
        measured: How many of parameter, gradient and states it reads once before.
    """
    if kind == "cpu":
        return {LIMIT: _threads(nbytes, states, measured) if cpu.available() is None else copy(kind, nbytes)}
    plain = copy(kind, nbytes)
    try:
        streams = _triton(kind, nbytes, states, measured)
        streams.step()  # compiles
    except Exception:  # no triton, or no compiler for its launcher
        return {LIMIT: plain}
    return {LIMIT: streams, COPY: plain}


def resident_bytes(kind: str, nbytes: int, states: int, measured: int = 0) -> int:
    """How much memory ``limits`` takes."""
    streams = FLOAT * (states + 2) * _length(kind, nbytes, _passes(states, measured))
    return streams if kind == "cpu" else streams + 2 * FLOAT * _length(kind, nbytes, 2)


def _passes(states: int, measured: int) -> int:
    return measured + 2 * states + 3


def _length(kind: str, nbytes: int, passes: int) -> int:
    return min(max(1, math.ceil(nbytes / (FLOAT * passes))), LONGEST.get(kind, LONGEST["cuda"]))


def _stream(kind: str, numel: int) -> Tensor:
    # Written, not torch.zeros: pages that were never written are all one page, in cache.
    return torch.empty(numel, device=kind).uniform_(0.5, 1.5)


def _streams(kind: str, numel: int, states: int) -> list[Tensor]:
    """In the order of a step's operands."""
    return [_stream(kind, numel) for _ in range(2 + states)]


def _threads(nbytes: int, states: int, measured: int) -> Limit:
    """The loops of the CPU engine without a rule, on as many threads."""
    passes = _passes(states, measured)
    numel = _length("cpu", nbytes, passes)
    streams = _streams("cpu", numel, states)
    touch, threads = cpu.load()[1].stream, torch.get_num_threads()

    def step() -> None:
        # Addresses are taken here, so that the function keeps its streams alive.
        touch([stream.data_ptr() for stream in streams], measured, numel, threads)

    return Limit("streams", step, FLOAT * numel * passes)


def _triton(kind: str, nbytes: int, states: int, measured: int) -> Limit:
    from fusedopt.bench.streams import TILE, measure, touch

    passes = _passes(states, measured)
    tiles = math.ceil(_length(kind, nbytes, passes) / TILE)
    streams, sums = _streams(kind, tiles * TILE, states), _stream(kind, tiles)
    parameter, gradient, *others = streams

    def step() -> None:
        if measured:
            measure(streams[:measured], sums)
        touch([parameter, *others], gradient)

    return Limit("streams", step, FLOAT * tiles * TILE * passes)


def copy(kind: str, nbytes: int) -> Limit:
    """A plain copy of as many bytes, or of the longest stream."""
    numel = _length(kind, nbytes, 2)
    source, target = _stream(kind, numel), _stream(kind, numel)
    return Limit("copy", lambda: target.copy_(source), 2 * FLOAT * numel)
