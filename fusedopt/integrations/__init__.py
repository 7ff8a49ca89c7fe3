"""What training frameworks need to clip in the step, and to find the optimizers by name. None is imported here."""

from __future__ import annotations

from typing import Any

from fusedopt.optimizer import FusedOptimizer


def unwrapped(optimizer: Any) -> FusedOptimizer | None:
    """The optimizer in a framework's wrappers; None if it is no fused one."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, FusedOptimizer) else None
