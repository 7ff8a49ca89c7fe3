"""What an optimizer does when it is told to step."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar, overload

import torch

from fusedopt import checks, engines
from fusedopt.aliases import ProcessGroup
from fusedopt.amp import TakesScaling
from fusedopt.averages import KeepsAverages
from fusedopt.clipping import Clips
from fusedopt.compiling import leave_alone
from fusedopt.context import Context, Plan, StepRequest
from fusedopt.engines import Stepping
from fusedopt.forking import forks, threads_that_exist
from fusedopt.rule import Rule
from fusedopt.stepper import Stepper

T = TypeVar("T")


class Steps(TakesScaling, Clips, KeepsAverages):
    """A part of FusedOptimizer."""

    rule: type[Rule]
    scope: str
    engine: str
    process_group: ProcessGroup | None
    increments_versions: bool

    def _get_ready(self) -> None:
        """The groups are there, and nothing was stepped yet."""
        self._lock, self._forks = threading.RLock(), forks()
        own = self.rule, self.scope, self.engine, self.param_groups, self.state, self.process_group
        self._context = Context(type(self).__name__, *own, engines.choose)
        self._stepper = self._stepper_of(self._context)
        leave_alone(Steps, "_step_with")

    def _stepper_of(self, context: Context) -> Stepper:
        """What steps this optimizer, or a part of it."""
        return Stepper(context)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T]) -> T: ...
    def step(self, closure: Callable[[], T] | None = None) -> T | None:
        """Do one step.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: If a gradient is sparse (SGD and Adagrad take such), or of another device, dtype or shape
                than its parameter. Nothing has changed then.
        """
        return self._step_with(closure)

    def _step_with(self, closure: Callable[[], T] | None) -> T | None:
        loss = None
        if closure is not None:
            self._refuse_averaged()
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        checks.options(self.max_grad_norm, self.skip_nonfinite, self.process_group, self.handles_amp)
        if self._forks != forks():  # the thread that had the lock may not be here
            self._lock, self._forks = threading.RLock(), forks()
        if self._lock._is_owned():  # pyright: ignore[reportAttributeAccessIssue]
            raise RuntimeError("step() was called inside of the same optimizer's step()")
        with self._lock, threads_that_exist():
            self._refuse_averaged()
            self._step()
        return loss

    def _before_step(self) -> None:
        """What a subclass does once a closure has made the gradients."""

    def _step(self) -> None:
        request = StepRequest(
            self._scaling(), self._max_norm(), self._measures(), self.skip_nonfinite, self.increments_versions
        )
        self._bring_up_to_date()
        told = self._stepper.step(request)
        self._tell_norm(told.norm, may_move=told.is_new)

    def _bring_up_to_date(self) -> Context:
        """What plans see of the optimizer, whose attributes may have been set."""
        context = self._context
        context.rule, context.scope, context.engine = self.rule, self.scope, self.engine
        context.param_groups, context.state, context.process_group = self.param_groups, self.state, self.process_group
        return context

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped. Waits for the device."""
        return self._stepper.skipped_steps

    @property
    def engines(self) -> tuple[Stepping, ...]:
        """What stepped in the last step, as (name, device, parameters), the last a number; empty before the first."""
        places = [(plan.name, p.device) for plan in self._plans or () for p, _ in self._context.members(plan.members)]
        return tuple(Stepping(*place, n) for place, n in Counter(places).items())

    @property
    def _plans(self) -> list[Plan] | None:
        """Those of the last step; None if it left none."""
        last = self._stepper.plans.last
        return last and last.plans
