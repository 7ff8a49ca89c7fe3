"""The limit of a step: how fast this machine moves the same streams of memory and does nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fusedopt.engines import cpu

FLOAT = 4


def step_bytes(numel: int, states: int) -> int:
    """What a float32 step must move: parameter and states are read and written, gradients are read."""
    return numel * FLOAT * (2 * (1 + states) + 1)


class StreamLimit:
    """Flat streams, as many elements each as a suite, that the engine's bare loop touches.

    Args:
        numel: Elements of a stream.
    """

    def __init__(self, numel: int) -> None:
        self._numel = numel
        self._gradient = self._stream()
        self._updated: list[Tensor] = []

    def _stream(self) -> Tensor:
        # Written, not torch.zeros: pages that were never written are all one page, in cache.
        return torch.empty(self._numel).uniform_(0.5, 1.5)

    def step(self, states: int) -> Callable[[], None]:
        """What moves the bytes of one step of an optimizer with so many states per element."""
        while len(self._updated) < 1 + states:
            self._updated.append(self._stream())
        streams = self._updated[: 1 + states]
        stream, n, threads = cpu.load()[1].stream, self._numel, torch.get_num_threads()

        def touch() -> None:
            # The addresses are taken here, so that the function keeps its streams alive.
            stream([u.data_ptr() for u in streams], [self._gradient.data_ptr()], n, threads)

        return touch
