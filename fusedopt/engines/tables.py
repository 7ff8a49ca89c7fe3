"""The tables of a plan in the memory of a device, which fusedopt/layout.py describes.

Those of ``Rows`` stand as long as the plan; the step table is composed on the host in every scan and sent when it
differs from what the device has.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from fusedopt import codecs, memory, noise, options, storage
from fusedopt.aliases import ParamGroup
from fusedopt.context import Context
from fusedopt.layout import ADDRESSES, RowWord, StepWord, SumsWord, row_width
from fusedopt.operands import BLOCK, Signature
from fusedopt.sums import CHANNEL, Segments

# Shares of the tiles, as many as programs of each size, from the first tile to the last, in 1/120 of what a program has
# to do on average. Updates claim the last first, so that programs which are done early take the small ones over.
SHARE_SIZES = (1, 2, 4, 8, 105)


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


def partition(n_tiles: int, programs: int, sizes: tuple[int, ...]) -> list[int]:
    """The first tile of each share, for a launch of up to ``programs``; how many compute them, and which, is free."""
    sizes = sizes if n_tiles >= sum(sizes) * programs else (1,)
    n = max(1, min(programs, n_tiles))
    bounds = [0, *accumulate(size for size in sizes for _ in range(n))]
    return [n_tiles * bound // bounds[-1] for bound in bounds[:-1]]


def _is_whole(first: int, end: int, begins: list[int]) -> bool:
    """Whether a share has a row's tiles, and there are any."""
    return first < end and bisect_right(begins, first) == bisect_left(begins, end)


def _words_of_sums(places: Segments, i: int, length: int, tiles: list[int], begins: list[int]) -> list[int]:
    words = [0] * len(SumsWord)
    words[SumsWord.FIRST_SEGMENT], words[SumsWord.SEGMENT_LENGTH] = places.first[i], max(length, 1)
    words[SumsWord.SCOPE] = places.scopes[i]
    words[SumsWord.FIRST_SHARE] = bisect_right(begins, tiles[i]) - 1
    words[SumsWord.LAST_SHARE] = max(bisect_left(begins, tiles[i + 1]) - 1, words[SumsWord.FIRST_SHARE])
    return words


class StepTable:
    """What changes from step to step: its words on the host, and their copy on the device.

    A copy that a graph records reads host memory of its own, which is never written again.

    Args:
        words: How many.
        device: Where launches read them.
        by_value: Whether launches take them as an argument instead.
    """

    words: Tensor
    on_device: Tensor
    device: torch.device

    SLOTS = 4  # copies in flight before the host waits for one
    SPARES = 4  # captures without a step in between

    def __init__(self, words: int, device: torch.device, by_value: bool) -> None:
        self.words = torch.zeros(words, dtype=torch.int64, device="cpu")
        self.on_device = self.words
        self.device, self._is_stale = device, True
        self.captured: list[Tensor] = []
        self.by_value = by_value
        self._is_copied = device.type != "cpu" and not by_value
        if self._is_copied:
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
        if self.words[: StepWord.GRADS].tolist() != header:
            self.words[: StepWord.GRADS] = torch.tensor(header, device="cpu")
            self._is_stale = True

    def changed(self, yes: bool) -> None:
        """The words were written; yes if any is another now."""
        self._is_stale |= yes

    def send(self) -> None:
        """Bring the device's copy up to date, in the order of the current stream."""
        if not self._is_copied:
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
        if self._is_stale or self.captured:  # a graph's replay may have put its own words there
            slot, event = self._slots[self._next]
            self._next = (self._next + 1) % self.SLOTS
            event.synchronize()
            slot.copy_(self.words)
            self.on_device.copy_(slot, non_blocking=True)
            event.record()
            self._is_stale = False


class Rows:
    """The tables that stand: where everything is, and how it is shared among programs.

    Args:
        context: Of the optimizer.
        members: Those that the plan steps, counted through all groups.
        device: Where they are.
        names: The rule's states, and its scalars, in the engine's order.
        programs: How many the engine launches at most.
        tile: Elements of a tile.
        sizes: Of shares, see SHARE_SIZES.
        places: Where the rule's sums go; None if it has none.

    Attributes:
        rows, tiles, shares, borders, layouts, row_sums: On the device.
        width: Words of a row.
        count, n_shares, n_borders: How many rows, shares and borders.
        programs: How many to launch.
        signatures: Of the rows; a row has its number among them.
        has_options: Whether any group asks for averages, noise or cautious decay.
        has_average: Whether any asks for an average, so that rows have room for its address.
    """

    rows: Tensor
    tiles: Tensor
    shares: Tensor
    borders: Tensor
    layouts: Tensor
    row_sums: Tensor
    width: int
    count: int
    n_shares: int
    n_borders: int
    programs: int
    signatures: tuple[Signature, ...]
    has_options: bool
    has_average: bool

    def __init__(
        self,
        context: Context,
        members: list[int],
        device: torch.device,
        names: tuple[tuple[str, ...], tuple[str, ...]],
        programs: int,
        tile: int,
        sizes: tuple[int, ...],
        places: Segments | None,
    ) -> None:
        self._in_channels = places is not None and places.scope == CHANNEL
        groups = context.param_groups
        self.has_options = any(map(options.are_asked, groups))
        self.has_average = any(map(options.average_state, groups))
        self.width = row_width(len(names[0]) + self.has_average, len(names[1]))
        self._names, self._signatures = names, dict[Signature, int]()
        self._layouts: list[int] = []
        which = set(members)
        everyone = [(g, group, p) for g, group in enumerate(context.param_groups) for p in group["params"]]
        planned = [
            self._row(context, i, p, group, g) if i in which else None for i, (g, group, p) in enumerate(everyone)
        ]
        rows = [row or [0] * self.width for row in planned]
        counts = [max(after - first, 1) for first, after in pairwise(places.first)] if places else [1] * len(rows)
        lengths = [row[RowWord.NUMEL] // n for row, n in zip(rows, counts, strict=True)]
        tiles = [0, *accumulate(n * -(-length // tile) for length, n in zip(lengths, counts, strict=True))]
        begins = partition(tiles[-1], programs, sizes)
        shares = [(begin, min(bisect_right(tiles, begin), len(rows)) - 1) for begin in begins]
        borders = [i for i, row in enumerate(planned) if row and not _is_whole(tiles[i], tiles[i + 1], begins)]
        self.count, self.n_shares, self.n_borders = len(rows), len(shares), len(borders)
        self.programs = min(programs, self.n_shares)

        def on_device(values: Sequence[object]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        self.rows, self.tiles = on_device(rows), on_device(tiles)
        self.shares = on_device([*shares, (tiles[-1], len(rows) - 1)])
        self.borders = on_device(borders or [0])
        row_sums = [[0] * len(SumsWord)]
        if places:
            row_sums[0][SumsWord.FIRST_SEGMENT] = places.first[-1]
            row_sums[:0] = (_words_of_sums(places, i, lengths[i], tiles, begins) for i in range(len(rows)))
        self.row_sums = on_device(row_sums)
        self.layouts = on_device(self._layouts or [0])
        self.signatures = tuple(self._signatures)

    def _row(self, context: Context, i: int, whole: Tensor, group: ParamGroup, number: int) -> list[int] | None:
        """The words of a row; None while it lacks a state, and so has no gradient."""
        state, rule = context.state.get(whole, {}), context.rule
        needed = storage.tensors_of(rule, group, state)
        counts = [options.STEP] if options.counts(rule, group) else []
        if any(state.get(name) is None for name in (*needed, *self._names[1], *counts)):
            return None
        scalars = [state[name] for name in self._names[1]]
        counters = [state[name] for name in counts]
        if any(t.device != whole.device for t in (*scalars, *counters)):
            return None  # without a gradient yet; it is planned anew before it is stepped
        g = whole if whole.grad is None else whole.grad
        p = memory.local(whole)
        operands = storage.operands_of(rule, whole, memory.resolved(memory.local(g)), group, state)
        shaped = [operand.tensors[0] for operand in operands]
        shaped += [t for operand in operands for t in operand.tensors[1:] if operand.codec.block == 1]
        has_blocks = any(operand.codec.block > 1 for operand in operands)
        slices, length = codecs.slices_of(p.shape)
        is_padded = has_blocks and slices > 1 and length % BLOCK != 0
        is_dense = not is_padded and not memory.has_gaps(p) and len(set(map(memory.significant, shaped))) == 1
        is_dense &= not self._in_channels or memory.begins_with_slices(p)
        is_dense &= not has_blocks or p.is_contiguous()
        draws, strides = options.draws(group), None
        words = [0] * self.width
        if draws:
            tensor, stream, words[RowWord.FIRST_ELEMENT], strides = noise.place(context, i, whole)
            words[RowWord.DRAW] = tensor | stream << 32
            is_dense &= all(p.shape[d] == 1 or p.stride(d) == strides[d] for d in range(p.dim()))
        signature = Signature.of(not is_dense, operands, group.get(options.NOISE) is not None, is_padded)
        words[RowWord.NUMEL] = p.numel() * (2 if p.is_complex() else 1)
        if is_padded:
            words[RowWord.NUMEL] = slices * -(-length // BLOCK) * BLOCK
            words[RowWord.SLICE] = length
        words[RowWord.SIGNATURE] = self._signatures.setdefault(signature, len(self._signatures))
        words[RowWord.LAYOUT] = 0 if is_dense else self._layout(p, shaped, strides)
        words[RowWord.GROUP] = number
        for counter in counters:
            words[RowWord.COUNTER] = counter.data_ptr() | (counter.dtype == torch.float64)
        for k, operand in enumerate([operands[0], *operands[2:]]):
            for j, t in enumerate(operand.tensors):
                words[RowWord.OPERAND_ADDRESSES + ADDRESSES * k + j] = t.data_ptr()
        for k, t in enumerate(scalars):
            words[k - len(scalars)] = t.data_ptr() | (t.dtype == torch.float64)
        return words

    def _layout(self, p: Tensor, operands: list[Tensor], index: Sequence[int] | None) -> int:
        """Enter sizes and strides, innermost first; complex numbers are pairs. Returns where."""
        at = len(self._layouts)
        parts = 2 if p.is_complex() else 1
        strides = [t.stride() for t in operands] + ([index] if index is not None else [])
        dims = [[2, *[1] * len(strides)]] if p.is_complex() else []
        dims += [[p.shape[d], *(stride[d] * parts for stride in strides)] for d in reversed(range(p.dim()))]
        self._layouts += [len(dims), 1 + len(strides), *(word for dim in dims for word in dim)]
        return at
