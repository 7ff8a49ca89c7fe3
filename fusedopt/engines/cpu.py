"""The CPU engine's Python face: loads the build for this CPU, and hands it plans."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.rule import LR, WEIGHT_DECAY, Rule

_NO_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)
REPORT = Path(__file__).parent.parent / "_build_report.json"


@cache
def load() -> tuple[Any, Any, str]:
    """The host extension, the engine build for this CPU, and its ISA level.

    Raises:
        ImportError: With the real reason.
    """
    try:
        host = import_module("fusedopt._host")
        level = _isa_level(host.isa_level())
        engine = import_module(f"fusedopt._cpu_{level}")
    except ImportError as error:
        raise ImportError(_build_failure() or str(error)) from error
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(f"torch {torch.__version__} has no DLPack C exchange API; 2.10 or newer has")
    host.bind_torch(torch.Tensor, torch.nn.Parameter, capsule, torch._C.TensorBase.grad)
    host.learn_anatomy(_specimens())
    return host, engine, level


def _isa_level(highest: str) -> str:
    """The level to run: this CPU's, or a lower one that the environment asks for."""
    levels = ("base", "v2", "v3", "v4")
    wanted = os.environ.get("FUSEDOPT_ISA", highest)
    if wanted not in levels[: levels.index(highest) + 1]:
        raise ImportError(
            f"FUSEDOPT_ISA is {wanted!r}; this CPU runs {', '.join(levels[1 : levels.index(highest) + 1])}"
        )
    return wanted


def _build_failure() -> str | None:
    if not REPORT.exists():
        return "the extension was not built"
    reason = json.loads(REPORT.read_text()).get("cpu")
    return f"it was not built: {reason}" if reason else None


def _specimens() -> list[tuple[Any, ...]]:
    """Tensors of distinctive geometry and every dtype, and what torch says of them; see csrc/host/anatomy.h."""
    tensors: list[Tensor] = [torch.frombuffer(bytearray(40_000), dtype=t) for t in checks.FLOATING]
    tensors = [t.as_strided((2, 3, 5), (307, 67, 11), 37 + i) for i, t in enumerate(tensors)]
    tensors += [
        torch.nn.Parameter(torch.empty(9_000, dtype=t).as_strided((7, 2), (131, 17), 53)) for t in checks.FLOATING
    ]
    tensors += [torch.empty(9_000).as_strided((3, 2, 2, 5), (211, 101, 29, 3), 71).requires_grad_()]
    facts = []
    for t in tensors:
        storage = t.untyped_storage()
        handles = (t._cdata, storage._cdata, storage.data_ptr())
        keys = torch._C._dispatch_keys(t).raw_repr()
        tag = checks.FLOATING.index(t.dtype)
        facts.append((t, *handles, t.storage_offset(), keys, tag, list(t.shape), list(t.stride())))
    return facts


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


def accepts(p: Tensor, group: Any) -> str | None:
    """Why the engine cannot step a parameter; None if it can."""
    if group["differentiable"]:
        return "differentiable=True runs on engine 'eager'"
    if p.device.type != "cpu":
        return f"it is on {p.device}"
    if p.layout != torch.strided:
        return f"its layout is {p.layout}"
    if p.dtype not in checks.FLOATING + checks.COMPLEX:
        return f"its dtype is {p.dtype}"
    if getattr(type(p), "__torch_dispatch__", None) is not _NO_DISPATCH:
        return f"{type(p).__name__} is a tensor subclass with operations of its own"
    if checks.overlaps(p):
        return f"its elements may overlap in memory (strides {p.stride()})"
    return None


class Plan:
    """The parameters of an optimizer that this engine steps."""

    def __init__(self, optimizer: Any, members: list[Tensor], fresh: list[Tensor]) -> None:
        host, engine, _ = load()
        rule = optimizer.rule
        specs = [_group_spec(rule, group) for group in optimizer.param_groups]
        mine, new = {id(p) for p in members}, {id(p) for p in fresh}
        self._optimizer = optimizer
        self._groups, self._state = optimizer.param_groups, optimizer.state
        self._tables = host.Plan(self._groups, specs, self._state, mine, new)
        self._engine = engine.run

    def scan(self) -> bool:
        """Read gradients and hyperparameters; False when the plan no longer fits and must be built anew."""
        replaced = self._optimizer.param_groups is not self._groups or self._optimizer.state is not self._state
        return not replaced and self._tables.scan()

    def run(self, *arguments: Any) -> tuple[float, bool]:
        """Measure the gradients, update the parameters, or both; see ``Plan::run``."""
        return self._tables.run(self._engine, torch.get_num_threads(), *arguments)

    def finish(self, *, stepped: bool) -> None:
        """The step is over: advance the counters if it happened, and let go of the gradients."""
        if stepped:
            self._tables.commit()
        self._tables.release_gradients()


def _group_spec(rule: type[Rule], group: Any) -> tuple[Any, ...]:
    by_name = {h.name: h for h in rule.hyper}
    entry = kernel(rule, group)
    hypers = (LR, WEIGHT_DECAY, *(by_name[name] for name in entry["hyper"]))
    keys = [(h.key, h.index, *checks.step_domain(h)) for h in hypers]
    switches = [(key, bool(group[key])) for key in rule.switches()]
    return entry["kernel"], keys, switches, rule.decoupled
