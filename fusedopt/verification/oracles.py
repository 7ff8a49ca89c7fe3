"""Other packages' optimizers, found when installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from fusedopt.aliases import Arguments, ParamGroups, ParamState, StateDict
from fusedopt.optimizer import FusedOptimizer


@cache
def find(name: str) -> type[torch.optim.Optimizer] | None:
    """An oracle's class; None when its package is not installed.

    Args:
        name: ``package:Class``, such as ``torch:AdamW``, ``lion-pytorch:Lion``, ``timm:NAdamW``.
    """
    package, _, cls = name.partition(":")
    if package == "torch":
        return getattr(torch.optim, cls)
    try:
        if package == "timm":
            return getattr(_timm_module(cls.lower()), cls)
        return getattr(import_module(package.replace("-", "_")), cls)
    except ImportError:
        return None


def _timm_module(name: str) -> ModuleType:
    """A module of timm.optim without timm's own imports, which want torchvision."""
    spec = importlib.util.find_spec("timm")
    if spec is None or spec.origin is None:
        raise ImportError("timm")
    for package, folder in (("timm", Path(spec.origin).parent), ("timm.optim", Path(spec.origin).parent / "optim")):
        if package not in sys.modules:
            stub = ModuleType(package)
            stub.__path__ = [str(folder)]
            sys.modules[package] = stub
    try:
        return import_module(f"timm.optim.{name}")
    finally:
        for package in ("timm.optim", "timm"):
            if not hasattr(sys.modules.get(package), "__file__"):
                sys.modules.pop(package, None)


class Alone:
    """An oracle for each parameter: one that counts steps of all parameters together is right for those alone.

    Args:
        make: Makes an oracle of parameters.
        params: The parameters.
    """

    def __init__(self, make: Callable[[list[Tensor]], torch.optim.Optimizer], params: Iterable[Tensor]) -> None:
        self._params = list(params)
        self._each = [make([p]) for p in self._params]
        self._known = set(self._each[0].param_groups[0]) - {"params"}
        self.param_groups: ParamGroups = [dict(self._each[0].param_groups[0])]  # the options of all

    def step(self) -> None:
        """Step the parameters that have a gradient."""
        for p, optimizer in zip(self._params, self._each, strict=True):
            if p.grad is not None:
                options = {k: v for k, v in self.param_groups[0].items() if k in self._known and k != "step"}
                optimizer.param_groups[0].update(options)
                optimizer.step()

    def load_state_dict(self, state: StateDict) -> None:
        """Load one of ours, which counts for each parameter."""
        self.param_groups[0].update(state["param_groups"][0])
        for i, (p, optimizer) in enumerate(zip(self._params, self._each, strict=True)):
            own = dict(state["state"].get(i, {}))
            optimizer.param_groups[0]["step"] = own.pop("step", torch.zeros(())).clone()
            optimizer.state[p].update({k: v.to(p.dtype, copy=True) for k, v in own.items()})


def complete(state: StateDict, optimizer: torch.optim.Optimizer, flat: Iterable[str] = ()) -> StateDict:
    """A state dict of ours as an oracle's, whose groups have options that are not ours, and may have our scalars.

    Args:
        state: Ours.
        optimizer: The oracle, or one of ours.
        flat: States that it keeps as vectors.
    """
    if isinstance(optimizer, FusedOptimizer):
        return state
    own = {i: {k: v.flatten() if k in flat else v for k, v in each.items()} for i, each in state["state"].items()}
    groups: ParamGroups = []
    for theirs, ours in zip(optimizer.param_groups, state["param_groups"], strict=True):
        first = next((own[i] for i in ours["params"] if i in own), ParamState())
        counted = {key: float(first[key]) for key in (theirs.keys() - ours.keys()) & first.keys()}
        groups.append({**theirs, **counted, **ours})
    return {**state, "state": own, "param_groups": groups}


def step(optimizer: torch.optim.Optimizer, **told: object) -> None:
    """Step an optimizer or oracle; some are older than torch's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cast("Callable[..., object]", optimizer.step)(**told)


def version(name: str) -> str:
    """An oracle as reports name it: package and version."""
    package = name.partition(":")[0]
    return f"{package} {importlib.metadata.version(package)}"


def options(oracle: type[object], wanted: Arguments) -> Arguments:
    """Those of our options that the oracle's constructor knows."""
    known = inspect.signature(oracle.__init__).parameters
    return {k: v for k, v in wanted.items() if k in known}
