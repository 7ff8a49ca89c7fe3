"""What a step of Muon runs on: two launches, and a function of stacks of matrices between them.

The first launch is a step of the gradients: it unscales, clips and adds noise, steps what AdamW has, and writes what
the matrix function is of, momentum or Nesterov's, into one stack for each shape. The second is a step of the matrices,
whose gradient is what the function made: decay, average, masters. The rule's parts are told apart by ``algorithm``:

=============  =========================  ==================================  ===========================
``algorithm``  parameter                  gradient                            state
=============  =========================  ==================================  ===========================
``"adamw"``    the optimizer's            its own                             the optimizer's
``"muon"``     its place in a stack       the optimizer's parameter's         momentum; a step of its own
``"after"``    the optimizer's, detached  its place in a stack                the optimizer's
=============  =========================  ==================================  ===========================
"""

from __future__ import annotations

from dataclasses import replace
from operator import is_

import torch
from torch import Tensor

from fusedopt import checks, memory, planner, rescaling, storage
from fusedopt.aliases import ParamGroup, ParamGroups, ParamState, States, Stored
from fusedopt.context import Context, StepRequest
from fusedopt.interrupts import held_back
from fusedopt.newton_schulz import Workspace
from fusedopt.optimizers.muon_stacks import Stacks, is_matrix, matrix_of
from fusedopt.options import AVERAGE, CAUTIOUS, EVERY, MASTER, NOISE, RESCALE, RESCALE_STEP, STATE_DTYPE, STEP
from fusedopt.scaling import Scaling
from fusedopt.state import NewState
from fusedopt.stepper import Stepper, Told

ADAMW, MUON, AFTER = "adamw", "muon", "after"
MOMENTUM = ("momentum_buffer", storage.scale_of("momentum_buffer"))
NOT_BEFORE = {AVERAGE, MASTER, CAUTIOUS, RESCALE, EVERY, RESCALE_STEP}  # options of matrices that the second launch has
NOT_AFTER = {NOISE, STATE_DTYPE, RESCALE, EVERY, RESCALE_STEP}
NEITHER = NOT_BEFORE & NOT_AFTER  # what comes after both


class Launches(Stepper):
    """Steps a Muon. What it is as a stepper is the first launch.

    Args:
        whole: The optimizer, brought up to date before every step.
        workspace: Of the matrix function; others may share it that do not step at the same time.
    """

    def __init__(self, whole: Context, workspace: Workspace) -> None:
        super().__init__(replace(whole, param_groups=[], state={}, retained=[]))
        self._whole = whole
        self._after = Stepper(replace(whole, param_groups=[], state={}, retained=[], statuses={}))
        self._workspace = workspace
        self._stacks = Stacks([], workspace)
        self._others: list[Tensor] = []
        self._groups: list[_Said] = []
        self._params: list[Tensor] = []
        self._said: list[object] = []
        self._handed: list[object] = []  # states, and their momenta

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
                self._stacks.apply()
                if self._stacks.matrices:
                    after = StepRequest(self._found(request), increments_versions=request.increments_versions)
                    if self._after.step(after).is_new:
                        self._keep_states()
                if rescales:
                    rescaling.after_step(whole, new)
            return told
        finally:
            for matrix in self._stacks.matrices:
                matrix.update.grad = None

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
        for matrix in self._stacks.matrices:
            matrix.update.grad = g = matrix.p.grad
            matrix.detached.grad = None if g is None else matrix.update
        if not is_valid:
            planner.check(self._after.context)
            self._said = said

    def _looked_at(self) -> tuple[list[Tensor], list[object]]:
        """All that stacks are made of: parameters; and where they are, and what is done to them."""
        params: list[Tensor] = []
        said: list[object] = []
        for group in self._whole.param_groups:
            params += group["params"]
            said += [group["algorithm"], len(group["params"])]
            if group["algorithm"] == MUON:
                said += [group[key] for key in ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn", "ns_dtype")]
                for p in group["params"]:
                    said += [memory.local(p).data_ptr(), p.shape, p.dtype]
        return params, said

    def _hand_over_states(self) -> None:
        """Where the optimizer's states are others than those that were handed over, or kept, say which they are."""
        before, after, state = self.context.state, self._after.context.state, self._whole.state
        states = list(map(state.get, self._params))  # each lookup by a tensor takes a fifth of a microsecond
        found: list[object] = [*states, *(its.get(MOMENTUM[0]) if its else None for its in states)]
        if len(found) == len(self._handed) and all(map(is_, found, self._handed)):
            return
        self._handed = found
        for p in self._others:
            if (its := state.get(p)) is not before.get(p):
                _put(before, p, its)
        for matrix in self._stacks.matrices:
            its = state.get(matrix.p)
            if its is not after.get(matrix.detached):
                _put(after, matrix.detached, its)
            if _momentum(its) != _momentum(before.get(matrix.update)):
                _put(before, matrix.update, _before_it(its))

    def _keep_states(self) -> None:
        """Give the optimizer the states that a launch has made."""
        before, after, state = self.context.state, self._after.context.state, self._whole.state
        for p in self._others:
            if (its := before.get(p)) is not state.get(p):
                _put(state, p, its)
        for matrix in self._stacks.matrices:
            its = after.get(matrix.detached, {})
            its |= {name: t for name, t in before.get(matrix.update, {}).items() if name in MOMENTUM}
            if its:
                state[matrix.p] = after[matrix.detached] = its

    # ---------------------------------------------------------------------------------------------------- making

    def _make(self, params: list[Tensor]) -> None:
        """Make stacks, and what both launches step."""
        numbered = list(enumerate(self._whole.everyone()))
        labels = checks.labels(self._whole.param_groups)
        for number, (p, group) in numbered:
            if group["algorithm"] == MUON and not is_matrix(p):
                raise ValueError(
                    f"{labels[number]} is no real matrix, and its group says algorithm='muon'; what flattens or swaps "
                    "parameters, as ZeRO does, is not for Muon: shard with fully_shard"
                )
        matrices = [matrix_of(number, p, group) for number, (p, group) in numbered if group["algorithm"] == MUON]
        self._stacks = Stacks(matrices, self._workspace)
        self._others = [p for _, (p, group) in numbered if group["algorithm"] != MUON]
        self._params, self._handed = params, []
        self._make_groups()

    def _make_groups(self) -> None:
        """What both launches have in the place of the optimizer's groups."""
        before, after, matrices = self.context, self._after.context, iter(self._stacks.matrices)
        for context in (before, after):
            context.param_groups, context.state = [], {}
        self._groups = []
        for g, group in enumerate(self._whole.param_groups):
            if group["algorithm"] != MUON:
                self._groups.append(_Said(g, before.param_groups, NEITHER, {}))
                continue
            its = [next(matrices) for _ in group["params"]]
            own = {"params": [matrix.update for matrix in its]}
            self._groups.append(_Said(g, before.param_groups, NOT_BEFORE, own))
            own = {"params": [matrix.detached for matrix in its], "algorithm": AFTER, "maximize": False}
            self._groups.append(_Said(g, after.param_groups, NOT_AFTER, own))
        after.numbers = [matrix.number for matrix in self._stacks.matrices]


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


def _momentum(state: Stored | None) -> list[int]:
    """What tells a state's momentum from another."""
    return [id(state.get(name)) for name in MOMENTUM] if state else [id(None)] * len(MOMENTUM)


def _before_it(state: Stored | None) -> ParamState | None:
    """The first launch's state of a matrix: the optimizer's momentum, and a step of its own, which it counts itself."""
    own = {name: state[name] for name in MOMENTUM if state and state.get(name) is not None}
    if own and state:
        own[STEP] = torch.as_tensor(state.get(STEP, 0.0)).detach().clone()
    return own or None
