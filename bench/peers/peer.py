"""What an adapter tells of one implementation."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Groups = list[dict[str, Any]]
Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation of an optimizer.

    Attributes:
        name: What ``--peer`` and reports call it.
        package: Its distribution, as pip calls it.
        make: Builds it from param groups that carry ``lr`` and ``weight_decay``, and keyword arguments.
        options: Those keyword arguments.
        storage: How it keeps its states: ``full``, or ``8bit`` and the like.
        differs: Why its update is another one than fusedopt's; None if it has to be the same.
        compiles: Whether its ``step`` goes through ``torch.compile``.
        calls: Kernels outside torch's operators that a step on a CPU calls for each tensor.
        most_tensors: How many it can step in reasonable time; None if any number.
        most_dims: Of how many dimensions its tensors can be; None if of any.
    """

    name: str
    package: str
    make: Make
    options: dict[str, Any]
    storage: str = "full"
    differs: str | None = None
    compiles: bool = False
    calls: int = 0
    most_tensors: int | None = None
    most_dims: int | None = None

    def version(self) -> str | None:
        """The installed version; None if there is none."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def build(self, groups: Groups) -> torch.optim.Optimizer:
        """The optimizer; whatever its package raises when it cannot run here."""
        return self.make(groups, lr=groups[0]["lr"], **self.options)  # some want lr even if all groups have it


def from_module(module: str, name: str) -> Make:
    """A constructor that imports its module when it is called.

    Args:
        module: Such as ``torch.optim``.
        name: Of the class.
    """
    return partial(_construct, module, name)


def _construct(module: str, name: str, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    return getattr(importlib.import_module(module), name)(groups, **options)
