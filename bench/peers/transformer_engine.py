"""NVIDIA TransformerEngine."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

HAVE = {
    "SGD": ("FusedSGD", {}),
    "Adam": ("FusedAdam", {"adam_w_mode": False}),
    "AdamW": ("FusedAdam", {"adam_w_mode": True}),
}


def peers(case: Case, device: str) -> list[Peer]:
    """What TransformerEngine has for an optimizer."""
    if device == "cpu" or case.name not in HAVE:
        return []
    name, more = HAVE[case.name]
    make = from_module("transformer_engine.pytorch.optimizers", name)
    return [Peer("transformer-engine", "transformer_engine", make, case.options | more)]
