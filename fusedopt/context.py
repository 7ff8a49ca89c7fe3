"""What plans and their engines see of an optimizer, and of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from fusedopt.aliases import Group, Member, ParamGroups, ProcessGroup, States, Stored
from fusedopt.passes import Pass
from fusedopt.ranks import Reduction
from fusedopt.rule import Rule
from fusedopt.scaling import Scaling
from fusedopt.state import New
from fusedopt.status import StepStatus
from fusedopt.sums import Sums

Place = tuple[torch.device, int]  # a device, and the number of a plan there
Choose = Callable[[str, Tensor, Group, type[Rule], Stored, object], str]


@dataclass(eq=False)
class Context:
    """The optimizer, as plans know it. What it has is brought up to date before every step.

    Attributes:
        optimizer: What messages call it.
        rule: By which it steps.
        scope: Over what the rule's sums are taken.
        engine: That was asked for, or "auto".
        param_groups: Its groups; lists of its own are told apart by their identity, as states are.
        state: Its states.
        process_group: Of ranks with other parameters; None if there are none.
        choose: Finds the engine of a parameter, see ``fusedopt.engines.choose``.
        numbers: Of the parameters in another optimizer that this is a part of.
        statuses: What launches have told, by the device and the number of the plan there.
        retained: Plans that must live as long as the optimizer.
    """

    optimizer: str
    rule: type[Rule]
    scope: str
    engine: str
    param_groups: ParamGroups
    state: States
    process_group: ProcessGroup | None
    choose: Choose
    numbers: Sequence[int] | None = None
    statuses: dict[Place, StepStatus] = field(default_factory=dict[Place, StepStatus])
    retained: list[Plan] = field(default_factory=lambda: [])

    def everyone(self) -> list[Member]:
        """All parameters, with their groups."""
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def members(self, which: Sequence[int]) -> list[Member]:
        """Parameters, counted through all groups, with their groups."""
        everyone = self.everyone()
        return [everyone[i] for i in which]

    def number_of(self, i: int) -> int:
        """Which of the optimizer's parameters one is, for what is drawn at random; given its number here."""
        return i if self.numbers is None else self.numbers[i]

    def engine_of(self, p: Tensor, group: Group, label: object) -> str:
        """The name of the engine that steps a parameter as it is now; raises if none can."""
        return self.choose(self.engine, p, group, self.rule, self.state.get(p, {}), label)

    def status(self, device: torch.device, nth: int) -> StepStatus:
        """Where the nth plan on a device tells whether its steps were skipped, and the norm."""
        if (device, nth) not in self.statuses:
            self.statuses[device, nth] = StepStatus(device)
        return self.statuses[device, nth]

    def retain(self, plan: Plan) -> None:
        """Hold a plan for as long as the optimizer lives: a graph may launch on its tables."""
        if not any(plan is kept for kept in self.retained):
            self.retained.append(plan)


class StepRequest(NamedTuple):
    """What a step is asked to do.

    Attributes:
        scaling: What a GradScaler has handed over.
        max_norm: To what gradients are clipped; infinity for not at all.
        measures: Whether their norm is measured.
        skip_nonfinite: Whether nothing is to happen where the norm is not finite.
        increments_versions: Whether autograd is told of what is written.
    """

    scaling: Scaling
    max_norm: float = math.inf
    measures: bool = False
    skip_nonfinite: bool = False
    increments_versions: bool = True

    def to_measure(self) -> StepRequest:
        """The same, of a pass that decides nothing."""
        return self._replace(max_norm=math.inf, skip_nonfinite=False)


class Outcome(NamedTuple):
    """What came of passes over tensors: of a plan that is asynchronous as 0-dim tensors, for which nobody has waited.

    Attributes:
        squared_norm: The sum of the squares of the gradients as they are.
        norm: Its root, unscaled.
        skipped: Whether the step is skipped.
    """

    squared_norm: float | Tensor
    norm: float | Tensor
    skipped: bool | Tensor


class Plan(Protocol):
    """What one step of an engine runs on: parameters of an optimizer, counted through all groups.

    Attributes:
        name: The engine's.
        members: The parameters.
        stepped_members: Those that were updated since the last scan.
        device: On which all of them are; None if that does not matter to the engine.
        passes: That a step does, without the norm's.
        reduction: The ranks among which they are cut; the planner's.
        sums: What the rule has added up; None if it adds nothing up and the plan keeps no tensors for it.
        asynchronous: Whether steps are skipped on the device, and the host does not wait to hear of it.
    """

    name: str
    members: list[int]
    passes: Pass
    reduction: Reduction
    asynchronous: bool

    @property
    def stepped_members(self) -> list[int]:
        """See above."""
        ...

    @property
    def device(self) -> torch.device | None:
        """See above."""
        ...

    @property
    def sums(self) -> Sums | None:
        """See above."""
        ...

    def rebind(self, groups: ParamGroups) -> None:
        """The same groups stand in another list now."""
        ...

    def scan(self) -> bool:
        """Read gradients and hyperparameters, and hold them; False when the plan must be made anew."""
        ...

    def check(self) -> None:
        """Raise if a tensor is not what it was in the scan."""
        ...

    def run(self, passes: Pass, request: StepRequest, squared: float | Tensor | None) -> Outcome:
        """Do some passes, see fusedopt/passes.py.

        Args:
            passes: Which; none are an answer, too.
            request: Of the step.
            squared: The squared norm, where other plans or ranks have found a part of it.
        """
        ...

    def increment_versions(self) -> None:
        """Tell autograd what was written, if the step was not skipped."""
        ...

    def finish(self) -> None:
        """The step is over: let go of the gradients."""
        ...


class IndivisiblePlan(Plan, Protocol):
    """A plan that does a whole step in one call, in which no Python runs after the scan."""

    def step(self, request: StepRequest) -> Outcome | None:
        """Scan, and do all passes; None as False of ``scan``."""
        ...

    def step_and_free(self, increments_versions: bool) -> bool:
        """Scan, update, and take the gradients from their parameters; False as of ``scan``, and nothing is done."""
        ...


def is_indivisible(plan: Plan) -> TypeGuard[IndivisiblePlan]:
    """Whether a plan does a whole step in one call."""
    return hasattr(plan, "step_and_free")


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """What an engine has of a rule.

    Attributes:
        rule: The rule's name.
        variants: What steps parameters with just these states: a handle of the engine's, by their names.
        hyper, scalars, measures, epilogue: Names, in the kernel's order.
    """

    rule: str
    variants: Mapping[tuple[str, ...], object]
    hyper: tuple[str, ...]
    scalars: tuple[str, ...]
    measures: tuple[str, ...] = ()
    epilogue: tuple[str, ...] = ()


class Engine(Protocol):
    """What applies rules to many tensors: a module of fusedopt.engines.

    Attributes:
        DEVICES: The kinds of devices that it is for; empty if it is for all.
        ASYNCHRONOUS: Whether its plans belong to one device, on which steps are counted and skipped; else one plan
            serves all, and steps are counted on the CPU.
    """

    DEVICES: tuple[str, ...]
    ASYNCHRONOUS: bool

    def available(self) -> str | None:
        """Why it cannot run here; None if it can."""
        ...

    def home(self) -> torch.device:
        """The device that it is for here."""
        ...

    def kernels(self) -> dict[str, KernelInfo]:
        """What it has of each rule; of one that steps by the rule itself, nothing."""
        ...

    def accepts(self, p: Tensor, group: Group, rule: type[Rule], state: Stored) -> str | None:
        """Why it cannot step a parameter by a rule; None if it can."""
        ...

    def plan(self, context: Context, members: list[int], new: New, nth: int) -> Plan:
        """What a step of some parameters runs on.

        Args:
            context: Of their optimizer.
            members: Which, counted through all groups.
            new: Those whose states or averages were made for the coming step.
            nth: How many plans on the same device come before it.
        """
        ...
