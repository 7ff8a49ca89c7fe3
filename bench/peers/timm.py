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


# Its classes, what options of ours are called there, and more of its own.
HAVE: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "NAdamW": ("NAdamW", {}, {}),
    "Lion": ("Lion", {}, {}),
    "LAMB": ("Lamb", {}, {"max_grad_norm": None}),
    "LARS": ("Lars", {"trust_coefficient": "trust_coeff"}, {}),
    "ADOPT": ("Adopt", {}, {}),
    "Adan": ("Adan", {}, {}),
}


def peers(case: Case, device: str) -> list[Peer]:
    """What timm has for an optimizer."""
    if case.name not in HAVE:
        return []
    name, called, more = HAVE[case.name]
    options = {called.get(key, key): value for key, value in case.options.items()} | more
    return [
        Peer(f"timm-{way}", "timm", partial(_make, name), options | {"foreach": way == "foreach"})
        for way in ("for-loop", "foreach")
    ]
