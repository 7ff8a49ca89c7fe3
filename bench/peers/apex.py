"""NVIDIA apex, built with its CUDA extensions."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

HAVE = {
    "SGD": ("FusedSGD", {}),
    "Adagrad": ("FusedAdagrad", {}),
    "Adam": ("FusedAdam", {"adam_w_mode": False}),
    "AdamW": ("FusedAdam", {"adam_w_mode": True}),
}


def peers(case: Case, device: str) -> list[Peer]:
    """What apex has for an optimizer."""
    if device == "cpu" or case.name not in HAVE:
        return []
    name, more = HAVE[case.name]
    options = {key: value for key, value in case.options.items() if key != "lr_decay"} | more
    return [Peer("apex", "apex", from_module("apex.optimizers", name), options)]
