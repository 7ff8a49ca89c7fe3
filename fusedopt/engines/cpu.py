"""The CPU engine's Python face: loads the build for this CPU, and hands it plans."""

from __future__ import annotations

import math
import os
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks, host
from fusedopt.rule import Rule


@cache
def load() -> tuple[Any, Any, str]:
    """The host extension, the engine build for this CPU, and its ISA level.

    Raises:
        ImportError: With the real reason.
    """
    extension = host.load()
    level = _isa_level(extension.isa_level())
    try:
        return extension, import_module(f"fusedopt._cpu_{level}"), level
    except ImportError as error:
        raise ImportError(host.build_failure("cpu") or str(error)) from error


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


@cache
def available() -> str | None:
    """Why the engine cannot run here; None if it can."""
    try:
        load()
    except Exception as error:
        return str(error)
    return None


def accepts(p: Tensor, group: Any, rule: type[Rule]) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    if p.device.type != "cpu":
        return f"it is on {p.device}"
    if (rule.name, tuple(s.name for s in rule.active_states(group))) not in _kernels():
        return f"rule {rule.name!r} has no C++ kernel"
    return checks.unsteppable(p, group)


def home() -> torch.device:
    """The device that the engine is for."""
    return torch.device("cpu")


def counters(p: Tensor) -> torch.device:
    """Where the engine keeps a parameter's step."""
    return torch.device("cpu")


class Plan:
    """The parameters of an optimizer that this engine steps."""

    asynchronous = False
    device = None

    def __init__(self, optimizer: Any, members: list[Tensor], fresh: list[Tensor]) -> None:
        extension, engine, _ = load()
        rule = optimizer.rule
        specs = [_group_spec(rule, group) for group in optimizer.param_groups]
        mine, new = {id(p) for p in members}, {id(p) for p in fresh}
        self._optimizer = optimizer
        self._groups, self._state = optimizer.param_groups, optimizer.state
        self._tables = extension.Plan(self._groups, specs, self._state, mine, new)
        self._engine = engine.run

    def scan(self) -> bool:
        """Read gradients and hyperparameters; False when the plan no longer fits and must be built anew."""
        replaced = self._optimizer.param_groups is not self._groups or self._optimizer.state is not self._state
        return not replaced and self._tables.scan()

    def run(
        self, scaling: Any, max_norm: float, measure: bool, update: bool, skip_nonfinite: bool, squared: float | None
    ) -> tuple[float, float, bool]:
        """Measure the gradients, update the parameters, or both. Returns squared norm, norm and whether it skipped."""
        inverse = scaling.inverse
        total, skipped = self._tables.run(
            self._engine, torch.get_num_threads(), inverse, max_norm, measure, update, skip_nonfinite, squared or 0.0
        )
        return total, math.sqrt(total) * inverse, skipped

    def finish(self, *, stepped: bool) -> None:
        """The step is over: advance the counters if it happened, and let go of the gradients."""
        if stepped:
            self._tables.commit()
        self._tables.release_gradients()


def _group_spec(rule: type[Rule], group: Any) -> tuple[Any, ...]:
    entry = kernel(rule, group)
    return host.group_spec(rule, group, entry["kernel"], entry["hyper"])
