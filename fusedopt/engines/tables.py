"""The tables of a plan in the memory of a device.

A launch finds everything in two tables: ``rows``, which stands as long as the plan, and ``live``, which is
composed on the host in every scan and sent when it differs from what the device has. The words of both are
described in triton_kernels/walk.py.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from typing import Any

import torch
from torch import Tensor

from fusedopt import memory

HEADER = 3  # words of `live` before the rows: max_norm, whether the norm was measured, whether it may skip
ROW = 5  # words of a row besides its states and scalars: numel, kind, layout, group, the parameter's address
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}


def is_capturing(device: torch.device) -> bool:
    """Whether the device's current stream records a graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse_capture(device: torch.device, why: str) -> None:
    """Raises while a graph is captured, because of what cannot be part of a graph."""
    if is_capturing(device):
        raise RuntimeError(
            f"{why} while a CUDA graph was being captured on {device}; do a step before the capture, with the same "
            "parameters, groups and options"
        )


class Verdict:
    """What launches tell: on the device, so that nobody waits for it. It belongs to an optimizer, not to a plan.

    Attributes:
        squared, norm: float64, of the gradients: as they are, and after unscaling.
        skipped_steps, skipped: int32: how many steps were skipped, and whether the last one was.
    """

    def __init__(self, device: torch.device) -> None:
        self.doubles = torch.zeros(2, dtype=torch.float64, device=device)
        self.counts = torch.zeros(3, dtype=torch.int32, device=device)
        self.squared, self.norm = self.doubles.unbind()
        _, self.skipped_steps, self.skipped = self.counts.unbind()
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.zero = torch.zeros_like(self.one)


class Live:
    """The table that changes from step to step: its words on the host, and their copy on the device.

    A copy that a graph records reads host memory of its own, which is never written again.

    Args:
        words: How many.
        device: Where launches read them.
        by_value: Whether launches take them as an argument instead.
    """

    SLOTS = 4  # copies in flight before the host waits for one
    SPARES = 4  # captures without a step in between

    def __init__(self, words: int, device: torch.device, by_value: bool) -> None:
        self.words = torch.zeros(words, dtype=torch.int64, device="cpu")
        self.on_device = self.words
        self.device, self.captured, self._stale = device, [], True
        self.by_value = by_value
        self._copied = device.type != "cpu" and not by_value
        if self._copied:
            self.on_device = torch.zeros(words, dtype=torch.int64, device=device)
            module = torch.get_device_module(device)
            self._slots = [(self._pinned(), module.Event()) for _ in range(self.SLOTS)]
            self._spares: list[Tensor] = []
            self._next = 0

    def _pinned(self) -> Tensor:
        return torch.empty_like(self.words, pin_memory=True)

    def set_header(self, max_norm: float, measured: bool, skip_nonfinite: bool) -> None:
        """What the step, not the optimizer's tensors, decides."""
        header = [struct.unpack("<q", struct.pack("<d", max_norm))[0], int(measured), int(skip_nonfinite)]
        if self.words[:HEADER].tolist() != header:
            self.words[:HEADER] = torch.tensor(header, device="cpu")
            self._stale = True

    def changed(self, yes: bool) -> None:
        """The words were written; yes if any is another now."""
        self._stale |= yes

    def send(self) -> None:
        """Bring the device's copy up to date, in the order of the current stream."""
        if not self._copied:
            return
        if is_capturing(self.device):
            if not self._spares:
                refuse_capture(self.device, "more steps than there is memory set aside for were recorded")
            slot = self._spares.pop()
            slot.copy_(self.words)
            self.on_device.copy_(slot, non_blocking=True)
            self.captured.append(slot)
            return
        self._spares += [self._pinned() for _ in range(self.SPARES - len(self._spares))]
        if self._stale or self.captured:  # a graph's replay may have put its own words there
            slot, event = self._slots[self._next]
            self._next = (self._next + 1) % self.SLOTS
            event.synchronize()
            slot.copy_(self.words)
            self.on_device.copy_(slot, non_blocking=True)
            event.record()
            self._stale = False


class Rows:
    """The table that stands: where everything is, and how it is shared among programs.

    Args:
        optimizer: Whose parameters.
        members: Those that the plan steps, counted through all groups.
        device: Where they are.
        names: The rule's states, and its scalars, in the engine's order.
        programs: How many the engine launches at most.
        tile: Elements of a tile.
    """

    def __init__(
        self,
        optimizer: Any,
        members: list[int],
        device: torch.device,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        programs: int,
        tile: int,
    ) -> None:
        self.width = ROW + len(names[0]) + len(names[1])
        self._names, self._kinds = names, {}
        self._layouts: list[int] = []
        which = set(members)
        everyone = [(g, group, p) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
        rows = [
            (self._row(optimizer, p, group, g) if i in which else None) or [0] * self.width
            for i, (g, group, p) in enumerate(everyone)
        ]
        tiles = [0]
        for row in rows:
            tiles.append(tiles[-1] + -(-row[0] // tile))
        self.programs = max(1, min(programs, tiles[-1]))
        begins = [tiles[-1] * k // self.programs for k in range(self.programs)]
        shares = [(begin, min(bisect_right(tiles, begin) - 1, len(rows) - 1)) for begin in begins]
        shares.append((tiles[-1], len(rows) - 1))

        def on_device(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.count = len(rows)
        self.rows, self.tiles, self.shares = on_device(rows), on_device(tiles), on_device(shares)
        self.layouts = on_device(self._layouts or [0])
        self.kinds = ";".join(self._kinds)

    def _row(self, optimizer: Any, p: Tensor, group: Any, number: int) -> list[int] | None:
        """The words of a row; None while it lacks a state, and so has no gradient."""
        state = optimizer.state.get(p, {})
        active = [s.name for s in optimizer.rule.active_states(group)]
        if any(state.get(name) is None for name in (*active, *self._names[1])):
            return None
        operands = {"param": p, "grad": p if p.grad is None else memory.resolved(p.grad)}
        operands.update({name: state[name] for name in active})
        dense = not memory.has_gaps(p) and len({memory.significant(t) for t in operands.values()}) == 1
        types = " ".join(f"{name}={TYPES[_part(t.dtype)]}" for name, t in operands.items())
        kind = self._kinds.setdefault(f"{'dense' if dense else 'strided'} {types}", len(self._kinds))
        layout = 0 if dense else self._layout(p, list(operands.values()))
        addresses = [state[name].data_ptr() for name in active]
        addresses += [0] * (len(self._names[0]) - len(addresses))
        scalars = [state[name] for name in self._names[1]]
        if any(t.device != p.device for t in scalars):
            return None  # without a gradient yet; it is planned anew before it is stepped
        counters = [t.data_ptr() | (t.dtype == torch.float64) for t in scalars]
        return [p.numel() * (2 if p.is_complex() else 1), kind, layout, number, p.data_ptr(), *addresses, *counters]

    def _layout(self, p: Tensor, operands: list[Tensor]) -> int:
        """Enter sizes and strides, innermost first; complex numbers are pairs. Returns where."""
        at = len(self._layouts)
        parts = 2 if p.is_complex() else 1
        dims = [[2, *[1] * len(operands)]] if p.is_complex() else []
        dims += [[p.shape[d], *(t.stride(d) * parts for t in operands)] for d in reversed(range(p.dim()))]
        self._layouts += [len(dims), *(word for dim in dims for word in dim)]
        return at


def _part(dtype: torch.dtype) -> torch.dtype:
    return PARTS.get(dtype, dtype)
