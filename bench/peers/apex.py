"""NVIDIA apex, built with its CUDA extensions."""

from __future__ import annotations

import math

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

HAVE = {
    "SGD": ("FusedSGD", {}),
    "Adagrad": ("FusedAdagrad", {}),
    "Adam": ("FusedAdam", {"adam_w_mode": False}),
    "AdamW": ("FusedAdam", {"adam_w_mode": True}),
    "LAMB": ("FusedLAMB", {"max_grad_norm": math.inf}),
}


def peers(case: Case, device: str) -> list[Peer]:
    """What apex has for an optimizer."""
    return multi_tensor("apex", "apex", "apex.optimizers", case, device)


def multi_tensor(name: str, package: str, module: str, case: Case, device: str) -> list[Peer]:
    """The fused optimizer of apex, or of a package that took it over.

    Args:
        name: Of the peer.
        package: Its distribution.
        module: Where the classes are.
        case: The optimizer.
        device: Its kind; there are none for CPUs.
    """
    if device == "cpu" or case.name not in HAVE:
        return []
    cls, more = HAVE[case.name]
    options = {key: value for key, value in case.options.items() if key != "lr_decay"} | more
    return [Peer(name, package, from_module(module, cls), options)]
