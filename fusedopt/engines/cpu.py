"""The CPU engine's Python face: loads the build for this CPU, and hands it plans."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks, host, noise, options
from fusedopt.passes import Pass
from fusedopt.rule import Rule
from fusedopt.state import New
from fusedopt.sums import CHANNEL, TENSOR, Sums

DEVICES = ("cpu",)


@cache  # of success only: an exception is not remembered
def load() -> tuple[Any, Any, str]:
    """The host extension, the engine build for this CPU, and its ISA level.

    Raises:
        ImportError: With the real reason.
    """
    extension = host.load()
    level = _isa_level(extension.isa_level())
    return extension, host.extension(f"_cpu_{level}", "cpu"), level


def _isa_level(highest: str) -> str:
    """The level to run: this CPU's, or a lower one that the environment asks for."""
    levels = ("base", "v2", "v3", "v4")
    wanted = os.environ.get("FUSEDOPT_ISA", highest)
    if wanted not in levels[: levels.index(highest) + 1]:
        raise ImportError(
            f"FUSEDOPT_ISA is {wanted!r}; this CPU runs {', '.join(levels[1 : levels.index(highest) + 1])}"
        )
    return wanted


@cache
def _kernels() -> dict[tuple[str, tuple[str, ...]], dict[str, Any]]:
    return {(k["rule"], tuple(k["states"])): k for k in load()[1].kernels()}


def kernel(rule: type[Rule], group: Any) -> dict[str, Any]:
    """The kernel of a rule with the states that a group's flags ask for."""
    return _kernels()[rule.name, tuple(s.name for s in rule.active_states(group))]


def available() -> str | None:
    """Why the engine cannot run here; None if it can."""
    try:
        load()
    except Exception as error:
        return str(error)
    return None


def accepts(p: Tensor, group: Any, rule: type[Rule], state: Mapping[str, Any]) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    if p.device.type not in DEVICES:
        return f"it is on {p.device}"
    if (rule.name, tuple(s.name for s in rule.active_states(group))) not in _kernels():
        return f"rule {rule.name!r} has no C++ kernel"
    if reason := checks.named_otherwise(rule, kernel(rule, group)):
        return reason
    return checks.unsteppable(p, group, rule, state)


def home() -> torch.device:
    """The device that the engine is for."""
    return torch.device("cpu")


def step_device(p: Tensor) -> torch.device:
    """Where the engine keeps a parameter's step."""
    return torch.device("cpu")


class Plan:
    """The parameters of an optimizer that this engine steps."""

    name = "cpu"
    asynchronous = False
    indivisible = True
    device = None

    def __init__(self, optimizer: Any, members: list[int], new: New, nth: int) -> None:
        extension, engine, _ = load()
        rule = optimizer.rule
        host.know_dtensors(extension)
        specs = [_group_spec(rule, group, optimizer.param_groups) for group in optimizer.param_groups]
        self.members = members
        self._optimizer = optimizer
        self._groups, self._state = optimizer.param_groups, optimizer.state
        self.passes = Pass.of(rule, optimizer.scope)
        self.sums = Sums(rule, optimizer.scope, self._groups, "cpu")
        in_channels = optimizer.scope == CHANNEL
        self._job = extension.CpuJob(self._groups, specs, self._state, members, *new, in_channels)
        for i, (p, group) in zip(members, optimizer.members(members), strict=True):
            if options.draws(group):
                self._job.draw(i, *noise.place(optimizer, i, p))
        if rule.has_sums():
            places, addresses = self.sums.places, [t.data_ptr() for t in self.sums.tensors()]
            shared = [list(rule.scalars).index(name) for name in rule.shared]
            self._job.keep_sums(optimizer.scope != TENSOR, places.first, places.scopes, addresses, shared)
        self._engine = engine.run

        self.reduction: Any = None

    def rebind(self, groups: list[dict[str, Any]]) -> None:
        """The same groups stand in another list now."""
        self._groups = groups
        self._job.rebind(groups)

    @property
    def stepped_members(self) -> list[int]:
        """Those that were updated since the last scan: all or none."""
        return self.members if self._job.stepped else []

    @property
    def cohorts(self) -> int:
        """How many different coefficients the last step prepared."""
        return self._job.cohorts

    def scan(self) -> bool:
        """Read gradients and hyperparameters; False when the plan no longer fits and must be made anew."""
        if self._is_replaced() or not self._job.scan(torch.get_num_threads()):
            return False
        if host.CHECKED:
            host.check_scan(self._job)
        return True

    def step(
        self, scaling: Any, max_norm: float, measure: bool, skip_nonfinite: bool
    ) -> tuple[float, float, bool] | None:
        """Scan, and do all passes, in one. Returns squared norm, norm and whether it skipped; None as False of scan."""
        passes = self.passes | Pass.NORM if measure else self.passes
        if host.CHECKED:
            return self.run(passes, scaling, max_norm, skip_nonfinite, None) if self.scan() else None
        if self._is_replaced():
            return None
        inverse = scaling.inverse
        outcome = self._job.step(self._engine, torch.get_num_threads(), passes, inverse, max_norm, skip_nonfinite)
        return outcome and (outcome[0], math.sqrt(outcome[0]) * inverse, outcome[1])

    def step_and_free(self, increments_versions: bool) -> bool:
        """Scan, update, and take the gradients from their parameters, in one; False as of scan, and nothing is done."""
        if self._is_replaced() or (host.CHECKED and not self.scan()):
            return False
        try:
            done = self._job.step(self._engine, torch.get_num_threads(), self.passes, 1.0, math.inf, False, True)
            if done and increments_versions:
                self._job.increment_versions()
            return done is not None
        finally:
            self._job.release()

    def increment_versions(self) -> None:
        """Tell autograd what was written."""
        self._job.increment_versions()

    def check(self) -> None:
        """Raise if a tensor is not what it was in the scan."""
        self._job.check(torch.get_num_threads())

    def run(
        self, passes: Pass, scaling: Any, max_norm: float, skip_nonfinite: bool, squared: float | None
    ) -> tuple[float, float, bool]:
        """Do some passes, see fusedopt/passes.py. Returns squared norm, norm and whether the step is skipped."""
        inverse = scaling.inverse
        total, skipped = self._job.run(
            self._engine, torch.get_num_threads(), passes, inverse, max_norm, skip_nonfinite, squared or 0.0
        )
        return total, math.sqrt(total) * inverse, skipped

    def _is_replaced(self) -> bool:
        """Whether the optimizer has other containers now."""
        return self._optimizer.param_groups is not self._groups or self._optimizer.state is not self._state

    def finish(self) -> None:
        """The step is over: let go of the gradients."""
        self._job.release()


def _group_spec(rule: type[Rule], group: Any, groups: list[dict[str, Any]]) -> tuple[Any, ...]:
    entry = kernel(rule, group)
    return host.group_spec(rule, group, entry["kernel"], entry["hyper"], options.numbers(groups, group))
