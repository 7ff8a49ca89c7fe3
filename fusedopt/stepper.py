"""A step: what was planned is launched again if it is still valid, and else planned anew.

In this order: find what the groups were last stepped with; take over what other ranks' GradScalers found; bring
gradients to where their parameters are; refuse, where a GradScaler found one that is not finite; scan and launch; or
plan, scan and launch. Then count what was skipped, tell autograd, and rescale.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from fusedopt import checks, engines, planner, rescaling
from fusedopt.context import Context, Outcome, Plan, StepRequest, is_indivisible
from fusedopt.interrupts import held_back
from fusedopt.launch import launch
from fusedopt.plans import Planned, Plans
from fusedopt.ranks import Ranks, are_there, settle_gradients
from fusedopt.state import NewState
from fusedopt.sums import Joint


class Told(NamedTuple):
    """What a step tells its optimizer.

    Attributes:
        norm: Of the gradients; None if the step did not measure it.
        is_new: Whether it was planned anew.
        skipped: Whether it is known to have been skipped; not, where a device skips by itself.
    """

    norm: float | Tensor | None
    is_new: bool
    skipped: bool = False


class Finished:
    """A context, after which plans let go of what they scanned in it, however it ends."""

    __slots__ = ("_plans",)

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._plans = plans

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for plan in self._plans:
            plan.finish()


class Stepper:
    """Steps an optimizer, whose plans it keeps.

    Args:
        context: The optimizer, brought up to date before every step.

    Attributes:
        plans: All that it keeps.
        skipped: How many steps were skipped by what the host decides.
    """

    context: Context
    plans: Plans
    skipped: int

    def __init__(self, context: Context) -> None:
        self.context, self.plans, self.skipped = context, Plans(), 0
        self._settings: list[object] = []  # which were seen to be right

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped. Waits for devices."""
        return self.skipped + max((int(s.skipped_steps) for s in self.context.statuses.values()), default=0)

    def step(self, request: StepRequest) -> Told:
        """Do a step.

        Raises:
            RuntimeError, TypeError, ValueError: For what cannot be stepped; everything is as it was.
        """
        self.check_settings()
        # What may run Python of the user's own comes before the scan, whose addresses are good until something does.
        rescales, ranks = rescaling.is_asked(self.context), None
        adds_up = request.measures or self.context.rule.has_sums()
        planned = self.plans.find(self.context.param_groups)
        if planned and planned.is_for(adds_up, self.context.process_group):
            with Finished(planned.plans):
                outcome, ranks = self._again(planned, request, adds_up)
                if outcome:
                    return self._conclude(outcome, planned.plans, request, [], rescales)
        self._refuse_capture()
        self.plans.drop()
        if ranks is None:
            ranks = self._ranks()
            request.scaling.agree(ranks)
            self._settle(ranks)
        return self._refused(request, ranks) or self._anew(request, ranks, adds_up, rescales)

    def check_settings(self) -> None:
        """Raise for what only the optimizer reads of groups, where it is another than it was; engines look at the rest.

        Steppers that read it themselves call it first.
        """
        rule, groups = self.context.rule, self.context.param_groups
        if not rule.settings:
            return
        settings: list[object] = [group.get(hyper.key) for group in groups for hyper in rule.settings]
        if settings != self._settings:
            for g, group in enumerate(groups):
                checks.group(rule, group, g, stepping=True)
            self._settings = settings

    def step_again_and_free(self, increments_versions: bool) -> bool:
        """Do what the last step did, and take the gradients from their parameters; False if nothing is done.

        Nothing is, unless one call of one plan does it.
        """
        planned = self.plans.last
        if planned is None or len(planned.plans) != 1:
            return False
        (plan,) = planned.plans
        return is_indivisible(plan) and plan.step_and_free(increments_versions)

    def _again(
        self, planned: Planned, request: StepRequest, adds_up: bool
    ) -> tuple[Told | Outcome | None, Ranks | None]:
        """Launch what was planned.

        Returns:
            What came of it, None if it is no longer valid; and the ranks, where they have agreed on anything.
        """
        plans, scaling = planned.plans, request.scaling
        # Sums come in the same order on all ranks, whatever each has planned; who they are must be known first.
        is_scaled = scaling.found_inf is not None and are_there()
        looks = is_scaled or (adds_up and planned.ranks.matter)
        is_valid = not looks or all(plan.scan() for plan in plans)
        ranks = planned.ranks if is_valid else self._ranks()
        scaling.agree(ranks)
        if not is_valid:
            self._settle(ranks)
        if not planned.is_asynchronous and (refused := self._refused(request, ranks)):
            return refused, ranks
        outcome = launch(plans, request, *self._joint(plans, ranks), wait=False)
        if outcome is None and not looks and ranks.have_dtensors:
            self._settle(ranks)
            outcome = launch(plans, request, *self._joint(plans, ranks), wait=False)
        return outcome, ranks if looks else None

    def _anew(self, request: StepRequest, ranks: Ranks, adds_up: bool, rescales: bool) -> Told:
        """Plan, and launch that."""
        new_state: NewState = []
        plans: list[Plan] = []
        with Finished(plans), self._taken_back(new_state, plans):
            plans += planner.plan(self.context, new_state, request.measures, ranks)
            outcome = launch(plans, request, *self._joint(plans, ranks), wait=bool(new_state))
            if outcome is None:
                raise RuntimeError("a gradient, parameter or state changed while the step was being planned")
            if plans:
                self.plans.keep(Planned(self.context.param_groups, plans, ranks, adds_up))
            return self._conclude(outcome, plans, request, new_state, rescales)._replace(is_new=True)

    def _conclude(
        self, outcome: Told | Outcome, plans: Sequence[Plan], request: StepRequest, new_state: NewState, rescales: bool
    ) -> Told:
        """What comes after the launch."""
        if isinstance(outcome, Told):
            return outcome
        if outcome.skipped:
            self.skipped += not any(plan.asynchronous for plan in plans)
            self._forget(new_state)
        else:
            if request.increments_versions:
                for plan in plans:
                    plan.increment_versions()
            if rescales:
                rescaling.after_step(self.context, new_state)
        return Told(outcome.norm if request.measures else None, is_new=False, skipped=bool(outcome.skipped))

    def _refused(self, request: StepRequest, ranks: Ranks) -> Told | None:
        """What is told where a GradScaler found gradients that are not finite; devices whose plans stand look at it."""
        if not request.scaling.refuses:
            request.scaling.read()
            return None
        self.skipped += 1
        if request.measures and ranks.are_many:
            ranks.sum([])  # others may measure, to see on their devices that they do not step
        if joint := self._joint([], ranks)[1]:
            joint.skipped()
        return Told(math.inf if request.measures else None, is_new=False, skipped=True)

    def _ranks(self) -> Ranks:
        return Ranks((p for p, _ in self.context.everyone()), self.context.process_group)

    def _joint(self, plans: Sequence[Plan], ranks: Ranks) -> tuple[Ranks | None, Joint | None]:
        """With whom a step on plans is done together, and what they join."""
        many, context = ranks if ranks.are_many else None, self.context
        if not context.rule.has_sums():
            return many, None
        return many, Joint.of(context.rule, context.scope, context.param_groups, many, plans)

    def _settle(self, ranks: Ranks) -> None:
        if ranks.have_dtensors:
            settle_gradients(p for p, group in self.context.everyone() if not group["differentiable"])

    def _refuse_capture(self) -> None:
        """A step that must plan cannot be captured: it makes states and tables, and waits for devices."""
        for device in {p.device for p, _ in self.context.everyone()}:
            engines.refuse_capture(device)

    @contextmanager
    def _taken_back(self, new_state: NewState, plans: Sequence[Plan]) -> Generator[None, None, None]:
        """Where the block fails, states that were made for the step are forgotten, unless they were stepped."""
        try:
            yield
        except BaseException:
            if new_state:
                with held_back():
                    stepped = {id(p) for plan in plans for p, _ in self.context.members(plan.stepped_members)}
                    self._forget([made for made in new_state if id(made[1]) not in stepped])
            raise

    def _forget(self, new_state: NewState) -> None:
        """Take back states that were made for a step that did not happen."""
        if new_state:
            self.plans.drop()
        for _, p, names in new_state:
            state = self.context.state.get(p, {})
            for name in names:
                state.pop(name, None)
            if not state:
                self.context.state.pop(p, None)
