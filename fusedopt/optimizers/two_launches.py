"""Steps of two launches, and a function of all gradients of a parameter between them.

The first launch is a step of the gradients: it unscales, clips and adds noise, steps what the function is not for, and
writes what the function is of into memory of its own. The second is a step of what the function is for, whose gradient
is what the function made: decay, average, masters. The rule's parts are told apart by ``algorithm``:

=================  =======================  ================================  ===========================
``algorithm``      parameter                gradient                          state
=================  =======================  ================================  ===========================
others             the optimizer's          its own                           the optimizer's
``of_function``    its update               the optimizer's parameter's       what ``kept`` names; a step of its own
AFTER              the optimizer's,         its update                        the optimizer's
                   detached
=================  =======================  ================================  ===========================
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from operator import is_
from typing import Protocol

import torch
from torch import Tensor

from fusedopt import memory, planner, rescaling
from fusedopt.aliases import Group, ParamGroup, ParamGroups, ParamState, States, Stored
from fusedopt.context import Context, StepRequest
from fusedopt.interrupts import held_back
from fusedopt.options import AVERAGE, CAUTIOUS, EVERY, MASTER, NOISE, RESCALE, RESCALE_STEP, STATE_DTYPE, STEP
from fusedopt.scaling import Scaling
from fusedopt.state import NewState
from fusedopt.stepper import Stepper, Told

AFTER = "<after>"  # no group of an optimizer is called so
# Options of what the function is for that the second launch has.
NOT_BEFORE = {AVERAGE, MASTER, CAUTIOUS, RESCALE, EVERY, RESCALE_STEP}
NOT_AFTER = {NOISE, STATE_DTYPE, RESCALE, EVERY, RESCALE_STEP}
NEITHER = NOT_BEFORE & NOT_AFTER  # what comes after both
ONLY_AFTER = sorted(NOT_BEFORE - NEITHER)


class Between(Protocol):
    """A parameter that the function is for.

    Attributes:
        number: Which of the optimizer's it is.
        p: The parameter.
        update: What the function is of, then what it made; of the parameter's shape, and spread as it is.
        detached: The parameter without its gradient.
    """

    number: int
    p: Tensor
    update: Tensor
    detached: Tensor


class Function(Protocol):
    """What is done between the launches.

    Attributes:
        members: The parameters that it is for, in the optimizer's order.
    """

    @property
    def members(self) -> Sequence[Between]: ...

    def check(self) -> None:
        """Raise, before anything is written, for states with which it cannot go on."""
        ...

    def apply(self, skipped: Tensor | None) -> None:
        """Put what it makes of updates in their place.

        Args:
            skipped: 1 where a device has skipped the step, else 0; None if it has not.
        """
        ...


class NoFunction:
    """That of no parameters."""

    members: Sequence[Between] = ()

    def check(self) -> None:
        """There is nothing to go on with."""

    def apply(self, skipped: Tensor | None) -> None:
        """Do nothing."""


class Launches(Stepper):
    """Steps an optimizer by two launches. What it is as a stepper is the first.

    Subclasses say what comes between.

    Args:
        whole: The optimizer, brought up to date before every step.

    Attributes:
        of_function: The ``algorithm`` of groups whose parameters the function is for.
        kept: The states that the first launch has of them, besides their steps.
        made_of: Options of those groups that decide what the function is.
    """

    of_function: str
    kept: tuple[str, ...]
    made_of: tuple[str, ...]

    def __init__(self, whole: Context) -> None:
        super().__init__(replace(whole, param_groups=[], state={}, retained=[]))
        self._whole = whole
        self._after = Stepper(replace(whole, param_groups=[], state={}, retained=[], statuses={}))
        self._function: Function = NoFunction()
        self._others: list[Tensor] = []
        self._groups: list[_Said] = []
        self._params: list[Tensor] = []
        self._said: list[object] = []
        self._handed: list[object] = []  # states, and what is kept of them

    @abstractmethod
    def function(self, numbered: Sequence[tuple[int, Tensor, Group]]) -> Function:
        """What is done between.

        Args:
            numbered: The parameters that it is for, with their numbers and groups.

        Raises:
            ValueError: If it is not for one of them.
        """

    def step(self, request: StepRequest) -> Told:
        """Do a step.

        Raises:
            RuntimeError, TypeError, ValueError: For what cannot be stepped; everything is as it was.
        """
        whole = self._whole
        rescales = rescaling.is_asked(whole)
        new = self._without_average() if rescales else []
        try:
            self._bring_up_to_date()
            with held_back():
                told = super().step(request)
                if told.is_new:
                    self._keep_states()
                if told.skipped:
                    return told
                found = self._found(request)
                self._function.apply(found.found_inf)
                if self._function.members:
                    after = StepRequest(found, increments_versions=request.increments_versions)
                    if self._after.step(after).is_new:
                        self._keep_states()
                if rescales:
                    rescaling.after_step(whole, new)
            return told
        finally:
            for member in self._function.members:
                member.update.grad = None

    def step_again_and_free(self, increments_versions: bool) -> bool:
        """It takes more than one call."""
        return False

    def _without_average(self) -> NewState:
        """The parameters whose average is yet to be made."""
        everyone, state = enumerate(self._whole.everyone()), self._whole.state
        return [(i, p, ("ema",)) for i, (p, _) in everyone if "ema" not in state.get(p, {})]

    def _found(self, request: StepRequest) -> Scaling:
        """What tells the second launch whether the first was skipped; nobody waits to hear of it."""
        if not request.skip_nonfinite and request.scaling.found_inf is None:
            return Scaling()
        statuses = list(self._whole.statuses.values())
        return Scaling(found_inf=statuses[0].skipped.to(torch.float32)) if statuses else Scaling()

    # ------------------------------------------------------------------------------------------------ every step

    def _bring_up_to_date(self) -> None:
        """Hand groups, gradients and states over to both launches."""
        for context in (self.context, self._after.context):
            context.engine, context.process_group = self._whole.engine, self._whole.process_group
        params, said = self._looked_at()
        is_valid = said == self._said and len(params) == len(self._params) and all(map(is_, params, self._params))
        if not is_valid:
            self._said = []  # until all of it was seen to be right
            self._make(params)
        for group in self._groups:
            group.update(self._whole.param_groups)
        self._hand_over_states()
        for member in self._function.members:
            member.update.grad = g = member.p.grad
            member.detached.grad = None if g is None else member.update
        if not is_valid:
            for context in (self.context, self._after.context):
                planner.check(context)
            self._said = said
        self._function.check()

    def _looked_at(self) -> tuple[list[Tensor], list[object]]:
        """All that the function is made of: parameters; and where they are, and what is done to them."""
        params: list[Tensor] = []
        said: list[object] = []
        for group in self._whole.param_groups:
            params += group["params"]
            said += [group["algorithm"], len(group["params"])]
            if group["algorithm"] == self.of_function:
                said += [group.get(key) for key in (*self.made_of, *ONLY_AFTER, "differentiable")]
                for p in group["params"]:
                    said += [memory.local(p).data_ptr(), p.shape, p.dtype]
        return params, said

    def _hand_over_states(self) -> None:
        """Where the optimizer's states are others than those that were handed over, or kept, say which they are."""
        before, after, state = self.context.state, self._after.context.state, self._whole.state
        states = list(map(state.get, self._params))  # each lookup by a tensor takes a fifth of a microsecond
        found: list[object] = [*states, *(its.get(self.kept[0]) if its else None for its in states)]
        if len(found) == len(self._handed) and all(map(is_, found, self._handed)):
            return
        self._handed = found
        for p in self._others:
            if (its := state.get(p)) is not before.get(p):
                _put(before, p, its)
        for member in self._function.members:
            its = state.get(member.p)
            if its is not after.get(member.detached):
                _put(after, member.detached, its)
            if self._ids(its) != self._ids(before.get(member.update)):
                _put(before, member.update, self._before_it(its))

    def _keep_states(self) -> None:
        """Give the optimizer the states that a launch has made."""
        before, after, state = self.context.state, self._after.context.state, self._whole.state
        for p in self._others:
            if (its := before.get(p)) is not state.get(p):
                _put(state, p, its)
        for member in self._function.members:
            its = after.get(member.detached, {})
            its |= {name: t for name, t in before.get(member.update, {}).items() if name in self.kept}
            if its:
                state[member.p] = after[member.detached] = its

    # ---------------------------------------------------------------------------------------------------- making

    def _make(self, params: list[Tensor]) -> None:
        """Make the function, and what both launches step."""
        numbered = list(enumerate(self._whole.everyone()))
        is_between = [group["algorithm"] == self.of_function for _, (_, group) in numbered]
        between = [(number, p, group) for (number, (p, group)), own in zip(numbered, is_between, strict=True) if own]
        self._function = self.function(between)
        self._others = [p for (_, (p, _)), own in zip(numbered, is_between, strict=True) if not own]
        self._params, self._handed = params, []
        self._make_groups()

    def _make_groups(self) -> None:
        """What both launches have in the place of the optimizer's groups."""
        before, after, members = self.context, self._after.context, iter(self._function.members)
        for context in (before, after):
            context.param_groups, context.state = [], {}
        self._groups = []
        for g, group in enumerate(self._whole.param_groups):
            if group["algorithm"] != self.of_function:
                self._groups.append(_Said(g, before.param_groups, NEITHER, {}))
                continue
            its = [next(members) for _ in group["params"]]
            own = {"params": [member.update for member in its]}
            self._groups.append(_Said(g, before.param_groups, NOT_BEFORE, own))
            own = {"params": [member.detached for member in its], "algorithm": AFTER, "maximize": False}
            self._groups.append(_Said(g, after.param_groups, NOT_AFTER, own))
        after.numbers = [member.number for member in self._function.members]

    def _ids(self, state: Stored | None) -> list[int]:
        """What tells what is kept of a state from another."""
        return [id(state.get(name)) for name in self.kept] if state else [id(None)] * len(self.kept)

    def _before_it(self, state: Stored | None) -> ParamState | None:
        """The first launch's state: what is kept of the optimizer's, and a step of its own, which it counts itself."""
        own = {name: state[name] for name in self.kept if state and state.get(name) is not None}
        if own and state:
            own[STEP] = torch.as_tensor(state.get(STEP, 0.0)).detach().clone()
        return own or None


class _Said:
    """What one of the optimizer's groups says to a launch.

    Args:
        number: Which group.
        groups: The launch's, of which this becomes the last.
        without: Options that are not for it.
        own: What it has in the place of the group's.
    """

    def __init__(self, number: int, groups: ParamGroups, without: set[str], own: ParamGroup) -> None:
        self._number, self._without, self._own = number, without, own
        self._said: ParamGroup = {}
        groups.append(self._said)

    def update(self, groups: ParamGroups) -> None:
        """Say what it says now."""
        new = {key: value for key, value in groups[self._number].items() if key not in self._without} | self._own
        if new.keys() != self._said.keys():
            self._said.clear()
        self._said.update(new)


def _put(states: States, p: Tensor, state: ParamState | None) -> None:
    if state is None:
        states.pop(p, None)
    else:
        states[p] = state
