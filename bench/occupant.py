"""A kernel that occupies some of a GPU's processors while a step beside it is timed.

A processor of NVIDIA's has 65,536 registers. A program of this kernel has 32 warps of 32 lanes, each of which keeps 64:
that is all of them. So nothing else runs on a processor with such a program, and as many are occupied as there are
programs. No shared memory is touched, and no memory that a step could want.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

WARPS, REGISTERS = 32, 64
OPTIONS = {"num_warps": WARPS, "maxnreg": REGISTERS}
PROCESSORS = 16  # as many as a communication kernel may take
SECONDS = 6e-3  # longer than a step is held back and then takes


@triton.jit
def _clock(at):
    return tl.inline_asm_elementwise("mov.u32 $0, %clock;", "=r,r", [at], tl.int32, is_pure=False, pack=1)


@triton.jit
def occupy(unused, nanoseconds):
    """Run for a while. Nothing is written; no compiler can know, so a lane's 56 numbers stay in registers meanwhile."""
    end = globaltimer() + nanoseconds
    a, b, c = _clock(tl.arange(0, 32768)), _clock(tl.arange(0, 16384)), _clock(tl.arange(0, 8192))
    while globaltimer() < end:
        pass
    if nanoseconds < 0:
        tl.store(unused + tl.arange(0, 32768), a)
        tl.store(unused + tl.arange(0, 16384), b)
        tl.store(unused + tl.arange(0, 8192), c)


class Occupant:
    """Occupies processors of the current GPU, on a stream of its own."""

    def __init__(self) -> None:
        self._stream: Any = torch.cuda.Stream()
        self._unused = torch.empty(1, dtype=torch.int32, device="cuda")

    def start(self) -> None:
        """Occupy them as soon as the device has done what it was given so far. The current stream does not wait."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            occupy[(PROCESSORS,)](self._unused, int(SECONDS * 1e9), **OPTIONS)

    def wait(self) -> None:
        """Wait until they are free again."""
        self._stream.synchronize()
