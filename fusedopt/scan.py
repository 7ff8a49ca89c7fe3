"""The scan of a step in Python, where no C++ compiler built csrc/host. Same answers, some microseconds a tensor."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks


class Scan:
    """Every tensor of an optimizer that an engine steps on a device; see csrc/host/plan.h.

    Args:
        param_groups: The optimizer's.
        specs: For each group its (states, scalars, hyper) names, (key, index, low, high) of lr, weight decay and the
            rule's hyperparameters, (key, truth) of its switches, and whether decay is decoupled, or which flag says.
        state: The optimizer's.
        mine: ids of the parameters that are stepped.
        fresh: ids of those whose states are new.
        device: Where they are.
    """

    def __init__(
        self,
        param_groups: list[dict[str, Any]],
        specs: list[tuple[Any, ...]],
        state: dict[Any, Any],
        mine: set[int],
        fresh: set[int],
        device: torch.device,
    ) -> None:
        self._param_groups, self._specs, self._state, self._device = param_groups, specs, state, device
        self._groups = list(param_groups)
        self._lists = [group["params"] for group in param_groups]
        self._rows = [
            _Row(p, specs[g][0], state.get(p)) if id(p) in mine else None
            for g, params in enumerate(self._lists)
            for p in params
        ]
        self._mine = [any(id(p) in mine for p in params) for params in self._lists]
        self._params = [p for params in self._lists for p in params]
        self._fresh = {i for i, p in enumerate(self._params) if id(p) in fresh}
        self._gradients: list[Tensor | None] = []
        self._records: list[list[int]] = []

    def scan(self) -> bool:
        """Whether the tables stand; if not, planning anew says what is wrong."""
        self.release_gradients()
        try:
            stands = self._groups_stand() and all(map(self._read, self._rows))
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError):
            stands = False
        if not stands:
            self.release_gradients()
        return stands

    def write(self, live: Tensor) -> bool:
        """Put gradients' addresses and hyperparameters there, see triton_kernels/walk.py; whether anything changed."""
        given = enumerate(self._gradients)
        addresses = [0 if g is None else (g.data_ptr() if g.numel() else 2) + (i in self._fresh) for i, g in given]
        words = torch.tensor([*addresses, *itertools.chain(*self._records)], dtype=torch.int64, device="cpu")
        changed = not torch.equal(words, live)
        live.copy_(words)
        return changed

    def commit(self) -> None:
        """The step happened: states that were new are so no more."""
        self._fresh -= {i for i, g in enumerate(self._gradients) if g is not None}

    def release_gradients(self) -> None:
        """Let go of this step's gradients."""
        self._gradients = []

    def _groups_stand(self) -> bool:
        if len(self._param_groups) != len(self._groups):
            return False
        self._records = []
        pairs = zip(self._param_groups, self._groups, self._lists, self._specs, self._mine, strict=True)
        for group, old, params, spec, mine in pairs:
            if group is not old or group["params"] is not params:
                return False
            if not mine:
                self._records.append([0] * (2 * len(spec[1]) + 2))
                continue
            if any(bool(group[key]) != on for key, on in spec[2]):
                return False
            record = self._record(group, spec)
            if record is None:
                return False
            self._records.append(record)
        now = [p for params in self._lists for p in params]
        return len(now) == len(self._params) and all(map(lambda a, b: a is b, now, self._params))

    def _record(self, group: dict[str, Any], spec: tuple[Any, ...]) -> list[int] | None:
        words = []
        for key, index, low, high in spec[1]:
            value = group[key] if index < 0 else group[key][index]
            source = self._source(value)
            number = 0.0 if source else float(value)
            if not source and not low <= number <= high:
                return None
            words += [_bits(number), source]
        decoupled = group[spec[3]] if isinstance(spec[3], str) else spec[3]
        return [*words, int(bool(decoupled)), -1 if group["maximize"] else 1]

    def _source(self, value: Any) -> int:
        """Where the device finds a hyperparameter; 0 if it does not. Bit 0: as a double."""
        here = isinstance(value, Tensor) and value.device == self._device and value.numel() == 1
        if not here or value.dtype not in (torch.float32, torch.float64):
            return 0
        return value.data_ptr() | (value.dtype == torch.float64)

    def _read(self, row: _Row | None) -> bool:
        g = row.p.grad if row else None
        if g is not None:
            g = resolved(g)
        self._gradients.append(g)
        return row is None or row.stands(self._state.get(row.p), g)


class _Row:
    """A parameter, and where its tensors were when it was planned."""

    def __init__(self, p: Tensor, names: tuple[list[str], ...], state: dict[str, Any] | None) -> None:
        self.p, self.state = p, state
        self.values = list(state.values()) if state else []
        states, scalars, _ = names
        self.watched = [state.get(name) for name in (*states, *scalars)] if state else []
        self.ready = all(t is not None for t in self.watched) and (bool(state) or not (states or scalars))
        self.at = self._where(p)
        self.gradient_dtype = p.dtype if p.grad is None else p.grad.dtype
        self.gradient_stride = significant(p if p.grad is None else resolved(p.grad))
        self.states_at = self._addresses()

    def stands(self, state: dict[str, Any] | None, g: Tensor | None) -> bool:
        """Whether everything is where it was, and a gradient, if there is one, is of the planned kind."""
        if state is not self.state or self._where(self.p) != self.at:
            return False
        if state is not None:
            values = list(state.values())
            if len(values) != len(self.values) or any(a is not b for a, b in zip(values, self.values, strict=True)):
                return False
        if self._addresses() != self.states_at:
            return False
        if g is None:
            return True
        fits = g.device == self.p.device and g.dtype == self.gradient_dtype and g.shape == self.p.shape
        if not self.ready or not fits or g.layout != torch.strided or checks.misaligned(g):
            return False
        return significant(g) == self.gradient_stride

    @staticmethod
    def _where(p: Tensor) -> tuple[Any, ...]:
        return p.data_ptr(), p.shape, p.stride(), p.dtype

    def _addresses(self) -> list[int]:
        return [t.data_ptr() for t in self.watched if isinstance(t, Tensor)]


def resolved(g: Tensor) -> Tensor:
    """g, or what it stands for when it is lazily conjugated or negated."""
    return g.resolve_conj().resolve_neg()


def significant(t: Tensor) -> tuple[int, ...]:
    """The strides that matter: those of dimensions with more than one element, in a tensor with any."""
    return tuple(stride if size > 1 and t.numel() else 0 for stride, size in zip(t.stride(), t.shape, strict=True))


def _bits(number: float) -> int:
    return struct.unpack("<q", struct.pack("<d", number))[0]
