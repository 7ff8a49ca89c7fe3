"""The scan of a step in Python, where no C++ compiler built csrc/host. Same answers, some microseconds a tensor."""

# DTensors have no public names for what is asked of them.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from fusedopt import checks, memory
from fusedopt.aliases import Group, ParamGroups, ParamState, States
from fusedopt.layout import NEW_AVERAGE, NEW_STATE, NO_MEMORY, record_width
from fusedopt.options import CAUTIOUS
from fusedopt.rule import Hyper

Geometry = tuple[type, int, torch.Size, tuple[int, ...], torch.dtype, torch.device, int, str | None]


class Names(NamedTuple):
    """What is called how, of a group.

    Attributes:
        states: The rule's, and the average.
        scalars: The rule's, and what the engine counts.
        others: What codecs may have besides.
    """

    states: list[str]
    scalars: list[str]
    others: set[str]


class Key(NamedTuple):
    """Where a hyperparameter is in a group, and what it may be.

    Attributes:
        key: In the group; None for the number 0.
        place: In the value, if that is a pair or more; else -1.
        size: Of how many it is one.
        low, high: What it lies between.
    """

    key: str | None
    place: int
    size: int
    low: float
    high: float

    @classmethod
    def of(cls, h: Hyper | None, size: int, most: float) -> Key:
        """That of a hyperparameter, or of 0; at most so much."""
        if h is None:
            return cls(None, -1, 0, 0.0, 0.0)
        low, high = checks.step_domain(h)
        return cls(h.key, h.index, size, low, high if h.infinite else min(high, most))


class GroupSpec(NamedTuple):
    """What a scan must know of a group; csrc/host/groups.cpp reads it by places.

    Attributes:
        kernel: ``Names``, or a capsule that has them.
        keys: Of lr, weight decay, the kernel's hyperparameters and the engine's numbers.
        switches: Keys of options, and whether they are on.
        decoupled: Whether weight decay is decoupled, or the key of the flag that says so.
        average: The name of the average; None if there is none.
        counts: Whether the engine counts steps.
        master, master_state: What masters are asked for, and the state that has them; None for none.
        signed: Of each of the rule's states whether it can be negative.
        constants: Keys and values that must stay as they are.
    """

    kernel: object
    keys: list[Key]
    switches: list[tuple[str, bool]]
    decoupled: bool | str
    average: str | None
    counts: bool
    master: str | None
    master_state: str | None
    signed: list[bool]
    constants: list[tuple[str, object]]


class Scan:
    """Every tensor of an optimizer that an engine steps on a device; see csrc/host/device_table.h.

    Args:
        param_groups: The optimizer's.
        specs: For each group what must be known of it.
        state: The optimizer's.
        members: Which parameters are stepped, counted through all groups.
        new_states: Those whose states are new.
        new_averages: Those whose averages are.
        device: Where they are.
    """

    def __init__(
        self,
        param_groups: ParamGroups,
        specs: list[GroupSpec],
        state: States,
        members: list[int],
        new_states: list[int],
        new_averages: list[int],
        device: torch.device,
    ) -> None:
        self._param_groups, self._specs, self._state, self._device = param_groups, specs, state, device
        self._groups = list(param_groups)
        if len(self._groups) != len(specs):
            raise RuntimeError("the param groups changed while the step was being planned")
        self._params = [list(group["params"]) for group in self._groups]
        which = set(members)
        self._rows: list[_Row | None] = []
        self._has_members: list[bool] = []
        for params, spec in zip(self._params, specs, strict=True):
            first = len(self._rows)
            for p in params:
                is_member = len(self._rows) in which
                self._rows.append(_Row(p, spec.kernel, state.get(p)) if is_member else None)
            self._has_members.append(any(self._rows[first:]))
        self._new_state, self._new_average = set(new_states), set(new_averages)
        self._written = memory.Spans(memory.written(param_groups, state))
        self._gradients: list[Tensor | None] = []
        self._at: list[Geometry | None] = []  # where they were
        self._records: list[list[int]] = []

    def scan(self, threads: int) -> bool:
        """Whether the tables are valid; if not, planning anew says what is wrong. One thread does it all."""
        self.release()
        try:
            valid = self._groups_are_unchanged() and all(map(self._read, self._rows))
        except (KeyError, IndexError, AttributeError, RuntimeError, TypeError, ValueError):
            valid = False
        if not valid:
            self.release()
        return valid

    def rebind(self, param_groups: ParamGroups) -> None:
        """The same groups stand in another list now."""
        self._param_groups = param_groups

    def check(self, threads: int) -> None:
        """Raise if any tensor or gradient is not what it was in the last scan."""
        rows = zip(self._rows, self._gradients, self._at, strict=True)
        if any(row and (row.where() != row.at or (g is not None and where(g) != at)) for row, g, at in rows):
            raise RuntimeError("a parameter, gradient or state was changed while a step was under way")

    def write(self, words: Tensor) -> bool:
        """Put the gradients' words and the groups' records there, see fusedopt/layout.py; whether anything changed."""
        now = torch.tensor(
            [*map(self._grad_word, range(len(self._gradients))), *itertools.chain(*self._records)],
            dtype=torch.int64,
            device="cpu",
        )
        changed = not torch.equal(now, words)
        words.copy_(now)
        return changed

    def _grad_word(self, i: int) -> int:
        g = self._gradients[i]
        if g is None:
            return 0
        address = g.data_ptr() if g.numel() else NO_MEMORY
        return address + NEW_STATE * (i in self._new_state) + NEW_AVERAGE * (i in self._new_average)

    def commit(self) -> None:
        """The step happened: states that were new are so no more."""
        stepped = {i for i, g in enumerate(self._gradients) if g is not None}
        self._new_state -= stepped
        self._new_average -= stepped

    def increment_versions(self) -> None:
        """Tell autograd that the parameters with gradients were written."""
        rows = zip(self._rows, self._gradients, strict=True)
        torch.autograd.graph.increment_version([row.p for row, g in rows if row and g is not None])

    def release(self) -> None:
        """Let go of this step's gradients."""
        self._gradients, self._at = [], []

    def _groups_are_unchanged(self) -> bool:
        """Reads the hyperparameters first: a number of the user's own may change the groups."""
        if len(self._param_groups) != len(self._groups):
            return False
        self._records = []
        for group, spec, has_members in zip(self._groups, self._specs, self._has_members, strict=True):
            if not has_members:
                self._records.append([0] * record_width(len(spec.keys) - 2))
                continue
            if any(bool(group.get(key)) != on for key, on in spec.switches):
                return False
            if any(group.get(key) != value for key, value in spec.constants):
                return False
            record = self._record(group, spec)
            if record is None:
                return False
            self._records.append(record)
        now = list(self._param_groups)
        if len(now) != len(self._groups) or any(map(lambda a, b: a is not b, now, self._groups)):
            return False
        for group, params in zip(now, self._params, strict=True):
            if len(group["params"]) != len(params) or any(map(lambda a, b: a is not b, group["params"], params)):
                return False
        return True

    def _record(self, group: Group, spec: GroupSpec) -> list[int] | None:
        words: list[int] = []
        for key, place, size, low, high in spec.keys:
            value = 0.0 if key is None else group[key]
            if place >= 0:
                if not isinstance(value, (tuple, list)) or len(numbers := cast("Sequence[object]", value)) != size:
                    return None
                value = numbers[place]
            source = self._source(value)
            number = 0.0 if source else checks.number(value, key, "")
            if not source and not low <= number <= high:
                return None
            words += [_bits(number), source]
        decoupled = bool(group[spec.decoupled] if isinstance(spec.decoupled, str) else spec.decoupled)
        cautious = bool(group.get(CAUTIOUS, False))
        if cautious and not decoupled:
            return None
        return [*words, int(decoupled), -1 if group["maximize"] else 1, int(cautious)]

    def _source(self, value: object) -> int:
        """Where the device finds a hyperparameter; 0 if it does not. Bit 0: as a double."""
        if not isinstance(value, Tensor) or value.device != self._device or value.numel() != 1:
            return 0
        if value.dtype not in (torch.float32, torch.float64):
            return 0
        if memory.unreadable(value) or memory.shortage(value):
            return 0
        return value.data_ptr() | (value.dtype == torch.float64)

    def _read(self, row: _Row | None) -> bool:
        g = None
        if row and row.p.grad is not None:
            if not row.is_placed_like(row.p.grad):
                return False
            g = memory.local(row.p.grad)
            if memory.unreadable(g, lazily=True):
                return False
            is_lazy = g.is_conj() or g.is_neg()
            if (is_lazy or row.gradient_place != (g.data_ptr(), g.stride())) and self._written.meet(g):
                return False
            g = memory.resolved(g)
        self._gradients.append(g)
        self._at.append(None if g is None else where(g))
        return row is None or row.is_unchanged(self._state.get(row.p), g)


class _Row:
    """A parameter, and where its tensors were when it was planned."""

    def __init__(self, p: Tensor, names: object, state: ParamState | None) -> None:
        self.p, self.state = p, state
        self.items = list(state.items()) if state is not None else []
        assert isinstance(names, Names)
        tensors = [None if state is None else state.get(name) for name in (*names.states, *names.scalars)]
        self.is_whole = all(isinstance(t, Tensor) for t in tensors)
        tensors += [value for name, value in self.items if name in names.others]
        self.tensors = [p, *(t for t in tensors if isinstance(t, Tensor))]
        self.at = self.where()
        own = None if p.grad is None else memory.local(p.grad)
        g = memory.local(p) if own is None or memory.unreadable(own, lazily=True) else memory.resolved(own)
        self.gradient_dtype, self.gradient_stride = g.dtype, memory.significant(g)
        self.gradient_place = None if p.grad is None else (g.data_ptr(), g.stride())  # the planner saw that it may be

    def is_unchanged(self, state: ParamState | None, g: Tensor | None) -> bool:
        """Whether everything is as it was, and a gradient, if there is one, is of the planned kind."""
        if state is not self.state or self.where() != self.at:
            return False
        items = list(state.items()) if state is not None else []
        if len(items) != len(self.items):
            return False
        if any(a is not c or b is not d for (a, b), (c, d) in zip(items, self.items, strict=True)):
            return False
        if g is None:
            return True
        p = memory.local(self.p)
        fits = g.device == p.device and g.dtype == self.gradient_dtype and g.shape == p.shape
        if not self.is_whole or not fits or any(memory.shortage(t) for t in (*map(memory.local, self.tensors), g)):
            return False
        return not memory.misaligned(g) and memory.significant(g) == self.gradient_stride

    def is_placed_like(self, g: Tensor) -> bool:
        """Whether a gradient is a DTensor if the parameter is, on the same ranks and in the same parts."""
        p = self.p
        if not memory.is_dtensor(p) or not memory.is_dtensor(g):
            return memory.is_dtensor(p) == memory.is_dtensor(g)
        return g.device_mesh == p.device_mesh and g.placements == p.placements

    def where(self) -> list[tuple[Geometry, object]]:
        """The geometry of all tensors; asking for the address makes a lazy clone a copy of its own."""
        return [(where(memory.local(t)), t._spec if memory.is_dtensor(t) else None) for t in self.tensors]


def where(t: Tensor) -> Geometry:
    """A tensor's geometry."""
    nbytes = t.untyped_storage().nbytes()
    return type(t), t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, nbytes, memory.unreadable(t)


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]
