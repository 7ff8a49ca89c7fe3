"""The CPU engine's Python face: loads the build for this CPU, and hands it plans."""

from __future__ import annotations

import math
import os
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fusedopt import host, noise, options
from fusedopt.aliases import Group, ParamGroups, Stored
from fusedopt.context import Context, KernelInfo, Outcome, StepRequest
from fusedopt.engines.fitness import kernel_lacking, unsteppable
from fusedopt.host import GroupSpec
from fusedopt.passes import Pass
from fusedopt.ranks import Reduction
from fusedopt.rule import Rule
from fusedopt.state import New
from fusedopt.sums import CHANNEL, TENSOR, Sums

DEVICES: tuple[str, ...] = ("cpu",)
ASYNCHRONOUS: bool = False


@cache  # of success only: an exception is not remembered
def load() -> tuple[ModuleType, ModuleType, str]:
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
def kernels() -> dict[str, KernelInfo]:
    """What the build for this CPU has of each rule; its handles are capsules of kernels."""
    return kernels_of(load()[1])


def kernels_of(build: ModuleType) -> dict[str, KernelInfo]:
    """What a build has of each rule."""
    found: dict[str, KernelInfo] = {}
    variants: dict[str, dict[tuple[str, ...], object]] = {}
    for k in build.kernels():
        rule, names = k["rule"], (tuple(k[what]) for what in ("hyper", "scalars", "measures", "epilogue"))
        variants.setdefault(rule, {})[tuple(k["states"])] = k["kernel"]
        found[rule] = KernelInfo(rule, variants[rule], *names)
    return found


def available() -> str | None:
    """Why the engine cannot run here; None if it can."""
    try:
        load()
    except Exception as error:
        return str(error)
    return None


def accepts(p: Tensor, group: Group, rule: type[Rule], state: Stored) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    if p.device.type not in DEVICES:
        return f"it is on {p.device}"
    return kernel_lacking(rule, group, kernels(), "C++") or unsteppable(p, group, rule, state)


def home() -> torch.device:
    """The device that the engine is for."""
    return torch.device("cpu")


class CpuPlan:
    """The parameters of an optimizer that this engine steps; an ``IndivisiblePlan`` of fusedopt/context.py."""

    name = "cpu"
    asynchronous = ASYNCHRONOUS
    device = None

    def __init__(self, context: Context, members: list[int], new: New, nth: int) -> None:
        extension, engine, _ = load()
        rule = context.rule
        host.know_dtensors(extension)
        specs = [_group_spec(rule, group, context.param_groups) for group in context.param_groups]
        self.members = members
        self._context = context
        self._groups, self._state = context.param_groups, context.state
        self.passes: Pass = Pass.of(rule, context.scope)
        self._with_norm = self.passes | Pass.NORM
        self.sums: Sums = Sums(rule, context.scope, self._groups, home())
        self.reduction: Reduction = Reduction()
        in_channels = context.scope == CHANNEL
        self._job = extension.CpuJob(self._groups, specs, self._state, members, *new, in_channels)
        for i, (p, group) in zip(members, context.members(members), strict=True):
            if options.draws(group):
                self._job.draw(i, *noise.place(context, i, p))
        if rule.has_sums():
            places, addresses = self.sums.places, [t.data_ptr() for t in self.sums.tensors()]
            shared = [list(rule.scalars).index(name) for name in rule.shared]
            self._job.keep_sums(context.scope != TENSOR, places.first, places.scopes, addresses, shared)
        self._engine = engine.run

    def rebind(self, groups: ParamGroups) -> None:
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

    def step(self, request: StepRequest) -> Outcome | None:
        """Scan, and do all passes, in one; None as False of ``scan``."""
        passes = self._with_norm if request.measures else self.passes
        if host.CHECKED:
            return self.run(passes, request, None) if self.scan() else None
        if self._is_replaced():
            return None
        inverse = request.scaling.inverse
        outcome = self._job.step(
            self._engine, torch.get_num_threads(), passes, inverse, request.max_norm, request.skip_nonfinite
        )
        return outcome and Outcome(outcome[0], math.sqrt(outcome[0]) * inverse, outcome[1])

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

    def run(self, passes: Pass, request: StepRequest, squared: float | Tensor | None) -> Outcome:
        """Do some passes, see fusedopt/passes.py."""
        inverse, decided = request.scaling.inverse, (request.max_norm, request.skip_nonfinite)
        total, skipped = self._job.run(
            self._engine, torch.get_num_threads(), passes, inverse, *decided, float(squared or 0.0)
        )
        return Outcome(total, math.sqrt(total) * inverse, skipped)

    def _is_replaced(self) -> bool:
        """Whether the optimizer has other containers now."""
        return self._context.param_groups is not self._groups or self._context.state is not self._state

    def finish(self) -> None:
        """The step is over: let go of the gradients."""
        self._job.release()


plan = CpuPlan


def _group_spec(rule: type[Rule], group: Group, groups: ParamGroups) -> GroupSpec:
    info = kernels()[rule.name]
    kernel = info.variants[tuple(s.name for s in rule.active_states(group))]
    return host.group_spec(rule, group, kernel, info.hyper, options.numbers(groups, group))
