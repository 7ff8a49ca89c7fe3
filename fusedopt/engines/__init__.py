"""The engines, each a module; see ``Engine`` of fusedopt/context.py."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt.aliases import Group, Stored
from fusedopt.callers import stack_level
from fusedopt.context import Context, Engine, Plan
from fusedopt.engines import cpu, cuda, eager, tables, triton
from fusedopt.engines.fitness import unsteppable
from fusedopt.rule import Rule
from fusedopt.state import New
from fusedopt.sums import TENSOR

# In the order in which "auto" prefers them.
ENGINES: dict[str, Engine] = {"cpu": cpu, "cuda": cuda, "triton": triton, "eager": eager}

_warned = False  # that engines are missing, once in a process


class Stepping(NamedTuple):
    """An engine that steps parameters of an optimizer on a device."""

    name: str
    device: torch.device
    parameters: int
    """How many."""


def require(name: str) -> None:
    """The engine exists and runs here.

    Raises:
        ValueError: If there is no engine of that name.
        RuntimeError: If it cannot run here; says why.
    """
    if name == "auto":
        return
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; there are {', '.join(('auto', *ENGINES))}")
    if reason := ENGINES[name].available():
        raise RuntimeError(f"engine {name!r} is not available: {reason}")


def check_group(name: str, group: Group, rule: type[Rule], scope: str) -> None:
    """A group's options can be honoured by the engine that was asked for."""
    if group["differentiable"] and name not in ("auto", "eager"):
        raise ValueError(f"differentiable=True runs on engine 'eager', not {name!r}")
    if group["differentiable"] and rule.has_sums() and scope != TENSOR:
        raise ValueError(f"differentiable=True does not go through sums over {scope!r}; it does over 'tensor'")


def choose(name: str, p: Tensor, group: Group, rule: type[Rule], state: Stored, label: object) -> str:
    """The engine that steps a parameter.

    Args:
        name: The engine asked for, or "auto".
        p: The parameter.
        group: Its param group.
        rule: The optimizer's.
        state: The parameter's.
        label: What messages call it.

    Raises:
        RuntimeError: If the engine asked for cannot step it.
    """
    reason = None
    for candidate, engine in ENGINES.items():
        if name not in ("auto", candidate):
            continue
        reason = engine.available() or engine.accepts(p, group, rule, state)
        if reason is None:
            if candidate == "eager" and name == "auto" and p.grad is not None and not _warned:
                missing = _missing(p.device)
                if missing and not unsteppable(p, group, rule, state):
                    _tell(p.device, missing)
            return candidate
    raise RuntimeError(f"{label}: engine {name!r} cannot step it: {reason}")


def _missing(device: torch.device) -> list[str]:
    """The engines for a kind of device that cannot run here, and why."""
    kinds = {name: engine.DEVICES for name, engine in ENGINES.items()}
    reasons = {name: ENGINES[name].available() for name, own in kinds.items() if device.type in own}
    return [f"engine {name!r} is not available: {reason}" for name, reason in reasons.items() if reason]


def _tell(device: torch.device, missing: list[str]) -> None:
    """Warns, once in a process, of parameters that plain torch steps although there are engines for their device."""
    global _warned
    _warned = True
    warnings.warn(
        f"fusedopt steps parameters on {device.type!r} in plain torch, which is slower: {'; '.join(missing)}. "
        "`fusedopt info` says more. This is said once; pass engine='eager' if plain torch is wanted.",
        RuntimeWarning,
        stacklevel=stack_level(),
    )


def step_device(name: str, p: Tensor) -> torch.device:
    """Where an engine keeps a parameter's step."""
    return p.device if ENGINES[name].ASYNCHRONOUS else torch.device("cpu")


def plan_device(name: str, p: Tensor) -> torch.device | None:
    """The device that a plan of the engine with this parameter belongs to; None if one plan serves all."""
    return p.device if ENGINES[name].ASYNCHRONOUS else None


def refuse_capture(device: torch.device) -> None:
    """Raises while a graph is captured on a device: what was not planned before cannot be in it."""
    tables.refuse_capture(device, "a step needed new states, or found other tensors than the one before,")


def plan(name: str, context: Context, members: list[int], new: New, nth: int) -> Plan:
    """What an engine needs to step its parameters, of any groups of the optimizer."""
    return ENGINES[name].plan(context, members, new, nth)
