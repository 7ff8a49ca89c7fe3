"""The scan of a step in Python, where no C++ compiler built csrc/host. Same answers, some microseconds a tensor."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks, memory
from fusedopt.layout import NEW_AVERAGE, NEW_STATE, NO_MEMORY, record_width
from fusedopt.options import CAUTIOUS
from fusedopt.state import New


class Scan:
    """Every tensor of an optimizer that an engine steps on a device; see csrc/host/device_table.h.

    Args:
        param_groups: The optimizer's.
        specs: For each group its (states, scalars, hyper) names, averages and what the engine counts among them, and
            those of what codecs may have besides;
            (key, index, count, low, high) of lr, weight decay, the rule's hyperparameters and the engine's numbers (a
            key that is None: 0); (key, truth) of its switches; whether decay is decoupled, or the flag's key; at the
            end (key, value) of what must stay as it is.
        state: The optimizer's.
        members: Which parameters are stepped, counted through all groups.
        new: Those whose states or averages are new.
        device: Where they are.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        specs: list[tuple[Any, ...]],
        state: dict[Any, Any],
        members: list[int],
        new: New,
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
                self._rows.append(_Row(p, spec[0], state.get(p)) if is_member else None)
            self._has_members.append(any(self._rows[first:]))
        self._new_state, self._new_average = set(new.states), set(new.averages)
        self._written = memory.Spans(memory.written(param_groups, state))
        self._gradients: list[Tensor | None] = []
        self._at: list[tuple[Any, ...] | None] = []  # where they were
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

    def rebind(self, param_groups: list[dict[str, Any]]) -> None:
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
                self._records.append([0] * record_width(len(spec[1]) - 2))
                continue
            if any(bool(group.get(key)) != on for key, on in spec[2]):
                return False
            if any(group.get(key) != value for key, value in spec[-1]):
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

    def _record(self, group: dict[str, Any], spec: tuple[Any, ...]) -> list[int] | None:
        words = []
        for key, index, count, low, high in spec[1]:
            value = 0.0 if key is None else group[key]
            if index >= 0:
                if not isinstance(value, (tuple, list)) or len(value) != count:
                    return None
                value = value[index]
            source = self._source(value)
            number = 0.0 if source else checks.number(value, key, "")
            if not source and not low <= number <= high:
                return None
            words += [_bits(number), source]
        decoupled = bool(group[spec[3]] if isinstance(spec[3], str) else spec[3])
        cautious = bool(group.get(CAUTIOUS, False))
        if cautious and not decoupled:
            return None
        return [*words, int(decoupled), -1 if group["maximize"] else 1, int(cautious)]

    def _source(self, value: Any) -> int:
        """Where the device finds a hyperparameter; 0 if it does not. Bit 0: as a double."""
        here = isinstance(value, Tensor) and value.device == self._device and value.numel() == 1
        if not here or value.dtype not in (torch.float32, torch.float64):
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

    def __init__(self, p: Tensor, names: tuple[list[str], ...], state: Any) -> None:
        self.p, self.state = p, state
        self.items = list(state.items()) if state is not None else []
        states, scalars, _, others = names
        tensors = [None if state is None else state.get(name) for name in (*states, *scalars)]
        self.is_whole = all(isinstance(t, Tensor) for t in tensors)
        tensors += [value for name, value in self.items if name in others]
        self.tensors = [p, *(t for t in tensors if isinstance(t, Tensor))]
        self.at = self.where()
        given = None if p.grad is None else memory.local(p.grad)
        g = memory.local(p) if given is None or memory.unreadable(given, lazily=True) else memory.resolved(given)
        self.gradient_dtype, self.gradient_stride = g.dtype, memory.significant(g)
        self.gradient_place = None if p.grad is None else (g.data_ptr(), g.stride())  # the planner saw that it may be

    def is_unchanged(self, state: Any, g: Tensor | None) -> bool:
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

    def where(self) -> list[tuple[Any, ...]]:
        """The geometry of all tensors; asking for the address makes a lazy clone a copy of its own."""
        return [(where(memory.local(t)), t._spec if memory.is_dtensor(t) else None) for t in self.tensors]


def where(t: Tensor) -> tuple[Any, ...]:
    """A tensor's geometry."""
    nbytes = t.untyped_storage().nbytes()
    return type(t), t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, nbytes, memory.unreadable(t)


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]
