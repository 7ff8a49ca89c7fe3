"""timm's optimizers, whose modules import without torchvision."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Groups, Peer
from fusedopt.verification import oracles


def _make(name: str, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    optimizer = oracles.find(f"timm:{name}")
    if optimizer is None:
        raise ImportError(f"timm has no {name} here")
    return optimizer(groups, **options)


def peers(case: Case, device: str) -> list[Peer]:
    """NAdamW and Lion."""
    if case.name not in ("NAdamW", "Lion"):
        return []
    make = partial(_make, case.name)
    return [
        Peer(f"timm-{way}", "timm", make, case.options | {"foreach": way == "foreach"})
        for way in ("for-loop", "foreach")
    ]
