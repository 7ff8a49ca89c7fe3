"""What a parameter's state is before its first step, and what becomes of one from elsewhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from typing import NamedTuple, TypeGuard, cast

import torch
from torch import Tensor

from fusedopt import memory, options, storage
from fusedopt.aliases import Group, ParamState, Stored
from fusedopt.rule import LAST_FLOAT_STEP, PARAM, Rule, Scalar

NewState = list[tuple[int, Tensor, tuple[str, ...]]]  # which parameter, and the names of states made for a step


class New(NamedTuple):
    """Which parameters have something that was made for the step to come.

    Attributes:
        states: Those with new states or scalars of the rule.
        averages: Those with a new average.
    """

    states: list[int]
    averages: list[int]

    @classmethod
    def of(cls, rule: type[Rule], made: NewState) -> New:
        """By the names of what was made."""
        own = {*(spec.name for spec in rule.states), *rule.scalars}
        averages = {spec.name for spec in options.STATES.values()}
        return cls(*([i for i, _, names in made if kind & set(names)] for kind in (own, averages)))

    def among(self, members: Iterable[int]) -> New:
        """Those that are members."""
        which = set(members)
        return New([i for i in self.states if i in which], [i for i in self.averages if i in which])


HALVES = (torch.bfloat16, torch.float16, torch.complex32)


def initial_state(rule: type[Rule], p: Tensor, group: Group) -> dict[str, Tensor]:
    """What a rule has of a parameter before its first step: scalars, then tensors."""
    state = {name: _scalar(_first(value, p, group)) for name, value in rule.scalars.items()}
    for spec in rule.active_states(group):
        value = group[spec.init] if isinstance(spec.init, str) and spec.init != PARAM else spec.init
        state |= storage.new_state(spec, p, group, None if value == PARAM else float(value))
    return state


def _first(value: Scalar, p: Tensor, group: Group) -> float:
    return value(p) if callable(value) else group[value] if isinstance(value, str) else value


def initial_options(rule: type[Rule], p: Tensor, group: Group) -> dict[str, Tensor]:
    """The same of what the engine has: its count of steps, the master, and the average, which is the parameter."""
    state = {options.STEP: _scalar(0.0)} if options.counts(rule, group) else {}
    state |= storage.new_master(p, group)
    if average := options.average_state(group):
        dtype = torch.promote_types(p.dtype, torch.float32)
        state[average.name] = torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).detach()
        state[average.name].copy_(p.detach())
    return state


def _scalar(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=_scalar_dtype(), device="cpu")


def widened(rule: type[Rule], state: ParamState) -> ParamState:
    """A state from elsewhere, what must be exact as wide as float32: torch's is as wide as the parameter.

    Torch's momentum of sparse gradients is sparse; here it is not.
    """
    if rule.sparse:
        state = {k: v.to_dense() if isinstance(v, Tensor) and v.is_sparse else v for k, v in state.items()}
    exact = {s.name for s in (*rule.states, *options.STATES.values()) if s.exact}
    halves = {k: v for k, v in state.items() if k in exact and isinstance(v, Tensor) and v.dtype in HALVES}
    return {**state, **{key: t.to(torch.promote_types(t.dtype, torch.float32)) for key, t in halves.items()}}


def adopt_state(rule: type[Rule], p: Tensor, state: Stored, *, copy: bool) -> ParamState:
    """A parameter's state from another optimizer or a checkpoint, in the form that engines take.

    Tensors keep their dtype and go to the parameter's device; scalars become float tensors on the CPU.
    """
    adopted: ParamState = {}
    tensors = storage.names_of(rule)
    for key, value in state.items():
        if key in rule.scalars or key == options.STEP:
            adopted[key] = _counter(value)
        elif key in tensors and value is None:
            continue  # torch's SGD says so that there is no momentum buffer yet
        elif key in tensors or (isinstance(value, Tensor) and value.dim()):
            moved = value.detach().to(memory.local(p).device)
            is_same = memory.local(moved).data_ptr() == memory.local(value).data_ptr()
            adopted[key] = moved.clone() if copy and is_same else moved
        else:
            adopted[key] = deepcopy(value) if copy else value
    return adopted


def unfit(counter: object, device: torch.device, value: float | None = None) -> bool:
    """Whether a scalar state is not a float there, or a float32 at the end of its exact range.

    Args:
        counter: The state.
        device: Where the engine keeps counters.
        value: What it is, if that is known; a device need not be waited for then.
    """
    if not isinstance(counter, Tensor) or counter.device != device or counter.dim():
        return True
    if counter.dtype != torch.float32:
        return counter.dtype != torch.float64
    return (float(counter) if value is None else value) >= LAST_FLOAT_STEP


def lacks_state(rule: type[Rule], state: Stored, group: Group, device: torch.device) -> bool:
    """Whether a parameter lacks a state that its group's options ask for, or has a counter unfit to count there."""
    tensors = storage.tensors_of(rule, group, state)
    scalars = [state.get(name) for name in options.scalars_of(rule, group)]
    return any(state.get(name) is None for name in tensors) or any(s is None or unfit(s, device) for s in scalars)


def numbers(t: Tensor) -> list[float]:
    """A vector's elements; waits for its device."""
    return cast("list[float]", t.tolist())


def is_far(t: object) -> TypeGuard[Tensor]:
    """Whether reading a tensor's value means waiting for a device."""
    return isinstance(t, Tensor) and t.device.type != "cpu"


def _counter(value: Tensor | float) -> Tensor:
    """A scalar state of its own: float64 if it was or must be, else float32. One that is far stays so, unread."""
    if is_far(value) and value.is_floating_point() and not value.dim():
        return value.detach().clone()
    wide = isinstance(value, Tensor) and value.dtype == torch.float64
    return _made(float(value), wide)


def _made(number: float, wide: bool) -> Tensor:
    dtype = torch.float64 if wide or number >= LAST_FLOAT_STEP else _scalar_dtype()
    return torch.tensor(number, dtype=dtype, device="cpu")


class StepCounters:
    """What scalar states are, and those to be made: all of a device at once, for it is slow to ask one by one."""

    def __init__(self, states: Iterable[Stored], names: Iterable[str]) -> None:
        far: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
        for value in (state[name] for state in states for name in names if name in state):
            if is_far(value) and not value.dim():
                far[value.device, value.dtype].append(value)
        self._far = far  # kept: an id tells a tensor only while it lives
        self._read = {
            id(t): number
            for ts in far.values()
            for t, number in zip(ts, numbers(torch.stack([t.detach() for t in ts])), strict=True)
        }
        self._wanted: dict[torch.device, list[tuple[ParamState, str, Tensor]]] = defaultdict(list)

    def unfit(self, value: object, device: torch.device) -> bool:
        """Whether it cannot count there."""
        return unfit(value, device, self._read.get(id(value)))

    def want(self, state: ParamState, name: str, value: Tensor | float, device: torch.device) -> None:
        """One is to be made of a value, there."""
        wide = isinstance(value, Tensor) and value.dtype == torch.float64
        number = self._read[id(value)] if id(value) in self._read else float(value)
        self._wanted[device].append((state, name, _made(number, wide)))

    def make(self) -> None:
        """Make them."""
        for device, wanted in self._wanted.items():
            made = [counter for _, _, counter in wanted]
            if device.type != "cpu":
                made = _moved(made, device)
            for (state, name, _), counter in zip(wanted, made, strict=True):
                state[name] = counter


def _moved(counters: list[Tensor], device: torch.device) -> list[Tensor]:
    """The same numbers on a device: as parts of one tensor for each dtype."""
    made: dict[int, Tensor] = {}
    for dtype in {c.dtype for c in counters}:
        chosen = [i for i, c in enumerate(counters) if c.dtype == dtype]
        made.update(zip(chosen, torch.stack([counters[i] for i in chosen]).to(device).unbind(), strict=True))
    return [made[i] for i in range(len(counters))]


def _scalar_dtype() -> torch.dtype:
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
