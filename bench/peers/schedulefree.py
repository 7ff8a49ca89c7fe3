"""schedulefree, by the authors of schedule-free learning."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Groups, Peer, from_module

HAVE = {"ScheduleFreeAdamW": "AdamWScheduleFree", "ScheduleFreeSGD": "SGDScheduleFree"}


def _training(name: str, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    optimizer: Any = from_module("schedulefree", name)(groups, **options)
    optimizer.train()
    return optimizer


def peers(case: Case, device: str) -> list[Peer]:
    """Both."""
    if case.name not in HAVE:
        return []
    make = partial(_training, HAVE[case.name])
    # It normalises and decays gradients in place: those that are kept shrink from step to step, here for all alike.
    return [
        Peer(f"schedulefree-{way}", "schedulefree", make, case.options | {"foreach": way == "foreach"})
        for way in ("for-loop", "foreach")
    ]
