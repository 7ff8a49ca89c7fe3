"""The bare loop over a step's streams, in Triton: read all, write all but the gradient."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of a program; a stream's length is a multiple, so that nothing is masked
WARPS = 8


@triton.jit
def _touch(updated, gradient, streams: tl.constexpr, tile: tl.constexpr):  # pyright: ignore
    at = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    g = tl.load(gradient + at)
    for k in tl.static_range(streams):
        tl.store(updated[k] + at, tl.load(updated[k] + at) * 0.5 + g)


def touch(updated: list[Tensor], gradient: Tensor) -> None:
    """Read and write some streams once, and read one more.

    Args:
        updated: Float32, of equal length, a multiple of ``TILE``.
        gradient: The one that is only read, as long as those.
    """
    _touch[(gradient.numel() // TILE,)](tuple(updated), gradient, len(updated), TILE, num_warps=WARPS)
