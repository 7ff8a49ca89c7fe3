"""torch.optim: its loop over tensors, its ``foreach`` and fused steps, and its step compiled."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Groups, Make, Peer, from_module
from fusedopt.options import EMA

COMPILED_TENSORS = 400  # the compiler unrolls the loop over tensors; 1000 take minutes


def peers(case: Case, device: str) -> list[Peer]:
    """What torch has for an optimizer."""
    optimizer = getattr(torch.optim, case.optimizer, None)
    average = case.asked.get("average")
    if optimizer is None or case.algorithms or case.asked.keys() - {"average"} or not isinstance(average, EMA | None):
        return []
    make = from_module("torch.optim", case.optimizer)
    if average:
        make = partial(_averaging, make, average.decay)
    ways = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}}
    if "fused" in inspect.signature(optimizer).parameters:
        ways["fused"] = {"fused": True}
    found = [Peer(f"torch-{way}", "torch", make, case.own | options) for way, options in ways.items()]
    if average:
        return found
    make, options = partial(_compiled, make), case.own | {"foreach": True}
    found.append(Peer("torch-compile", "torch", make, options, compiles=True, most_tensors=COMPILED_TENSORS))
    return found


def _averaging(make: Make, decay: float, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    """An optimizer after whose steps an average is updated, as users do it."""
    optimizer = make(groups, **options)
    model = torch.nn.ParameterList(p for group in optimizer.param_groups for p in group["params"])
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    step, averages = optimizer.step, list[torch.Tensor]()

    def step_and_average() -> None:
        step()
        averaged.update_parameters(model)
        if not averages:  # so that they are counted as states; before the first step torch would not make its own
            averages.extend(averaged.module)
            for p, average in zip(model, averages, strict=True):
                optimizer.state[p]["ema"] = average

    optimizer.step = step_and_average
    return optimizer


def _compiled(make: Make, groups: Groups, **options: Any) -> torch.optim.Optimizer:
    optimizer = make(groups, **options)
    optimizer.step = torch.compile(optimizer.step)
    return optimizer
