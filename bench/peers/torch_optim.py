"""torch.optim: its loop over tensors, its ``foreach`` and fused steps, and its step compiled."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Groups, Make, Peer, from_module

COMPILED_TENSORS = 400  # the compiler unrolls the loop over tensors; 1000 take minutes


def peers(case: Case, device: str) -> list[Peer]:
    """What torch has for an optimizer."""
    optimizer = getattr(torch.optim, case.optimizer, None)
    if optimizer is None:
        return []
    make = from_module("torch.optim", case.optimizer)
    ways = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
    if "fused" in inspect.signature(optimizer).parameters:
        ways["fused"] = {"fused": True}
    found = [Peer(f"torch-{way}", "torch", make, case.options | options) for way, options in ways.items()]
    make, options = partial(_compiled, make), case.options | {"foreach": True}
    found.append(Peer("torch-compile", "torch", make, options, compiles=True, most_tensors=COMPILED_TENSORS))
    return found


def _compiled(make: Make, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    optimizer = make(groups, **options)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer
