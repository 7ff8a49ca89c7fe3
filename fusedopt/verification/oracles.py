"""Other packages' optimizers, found when installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


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


def step(optimizer: torch.optim.Optimizer) -> None:
    """Step an oracle; some are older than torch's deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.step()


def version(name: str) -> str:
    """An oracle as reports name it: package and version."""
    package = name.partition(":")[0]
    return f"{package} {importlib.metadata.version(package)}"


def options(oracle: type[Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of our options that the oracle's constructor knows."""
    known = inspect.signature(oracle.__init__).parameters
    return {k: v for k, v in wanted.items() if k in known}
