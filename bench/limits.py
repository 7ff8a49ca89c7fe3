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


def limits(kind: str, nbytes: int, states: int) -> dict[str, Limit]:
    """The limit for a step, and on GPUs a plain copy too; the copy alone where there is nothing better.

    Streams of floats, as many as a float32 step has (one is read, one and one more for each state are read and
    written), so long that together they are as many bytes as the step moves, but no longer than ``LONGEST``.

    Args:
        kind: Of device.
        nbytes: What the step moves.
        states: How many the optimizer has.
    """
    if kind == "cpu":
        return {LIMIT: _threads(nbytes, states) if cpu.available() is None else copy(kind, nbytes)}
    plain = copy(kind, nbytes)
    try:
        streams = _triton(kind, nbytes, states)
        streams.step()  # compiles
    except Exception:  # no triton, or no compiler for its launcher
        return {LIMIT: plain}
    return {LIMIT: streams, COPY: plain}


def resident_bytes(kind: str, nbytes: int, states: int) -> int:
    """How much memory ``limits`` takes."""
    streams = FLOAT * (states + 2) * _length(kind, nbytes, 2 * states + 3)
    return streams if kind == "cpu" else streams + 2 * FLOAT * _length(kind, nbytes, 2)


def _length(kind: str, nbytes: int, passes: int) -> int:
    return min(max(1, math.ceil(nbytes / (FLOAT * passes))), LONGEST.get(kind, LONGEST["cuda"]))


def _stream(kind: str, numel: int) -> Tensor:
    # Written, not torch.zeros: pages that were never written are all one page, in cache.
    return torch.empty(numel, device=kind).uniform_(0.5, 1.5)


def _threads(nbytes: int, states: int) -> Limit:
    """The loop of the CPU engine without a rule, on as many threads."""
    passes = 2 * states + 3
    numel = _length("cpu", nbytes, passes)
    updated, gradient = [_stream("cpu", numel) for _ in range(1 + states)], _stream("cpu", numel)
    touch, threads = cpu.load()[1].stream, torch.get_num_threads()

    def step() -> None:
        # Addresses are taken here, so that the function keeps its streams alive.
        touch([u.data_ptr() for u in updated], [gradient.data_ptr()], numel, threads)

    return Limit("streams", step, FLOAT * numel * passes)


def _triton(kind: str, nbytes: int, states: int) -> Limit:
    from fusedopt.bench.streams import TILE, touch

    passes = 2 * states + 3
    numel = math.ceil(_length(kind, nbytes, passes) / TILE) * TILE
    updated, gradient = [_stream(kind, numel) for _ in range(1 + states)], _stream(kind, numel)
    return Limit("streams", lambda: touch(updated, gradient), FLOAT * numel * passes)


def copy(kind: str, nbytes: int) -> Limit:
    """A plain copy of as many bytes, or of the longest stream."""
    numel = _length(kind, nbytes, 2)
    source, target = _stream(kind, numel), _stream(kind, numel)
    return Limit("copy", lambda: target.copy_(source), 2 * FLOAT * numel)
