"""The bare loops over a step's streams, in Triton: read what is measured; read all, write all but the gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program; a stream's length is a multiple, so that nothing is masked
WARPS = 8


@triton.jit
def _measure(streams, sums, tile: tl.constexpr):  # pyright: ignore
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    total = tl.load(streams[0] + at)
    for k in tl.static_range(1, len(streams)):
        total += tl.load(streams[k] + at)
    tl.store(sums + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _touch(updated, gradient, streams: tl.constexpr, tile: tl.constexpr):  # pyright: ignore
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    g = tl.load(gradient + at)
    for k in tl.static_range(streams):
        tl.store(updated[k] + at, tl.load(updated[k] + at) * 0.5 + g)


def measure(streams: list[Tensor], sums: Tensor) -> None:
    """Read some streams once.

    Args:
        streams: Float32, of equal length, a multiple of ``TILE``.
        sums: Float32, gets one for each tile.
    """
    _measure[(sums.numel(),)](tuple(streams), sums, TILE, num_warps=WARPS)


def touch(updated: list[Tensor], gradient: Tensor) -> None:
    """Read and write some streams once, and read one more.

    Args:
        updated: Float32, of equal length, a multiple of ``TILE``.
        gradient: The one that is only read, as long as those.
    """
    _touch[(gradient.numel() // TILE,)](tuple(updated), gradient, len(updated), TILE, num_warps=WARPS)
