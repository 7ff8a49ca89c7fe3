"""pytorch-optimizer: a collection in plain torch."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

MORE = {
    "AdEMAMix": {"weight_decouple": True},
    "AdaBound": {"weight_decouple": False},
    "Lion": {"weight_decouple": True},
    "Prodigy": {"weight_decouple": True},
    "RAdam": {"weight_decouple": False},
    "SWATS": {"weight_decouple": False},
}
OURS = ("tol",)  # theirs is fixed
DIFFERS = {"RAdam": "it takes no step at all until the rectification is defined"}


def peers(case: Case, device: str) -> list[Peer]:
    """What pytorch-optimizer has that torch has not, and RAdam."""
    if case.name not in MORE:
        return []
    make = from_module("pytorch_optimizer", case.optimizer)
    options = {k: v for k, v in case.options.items() if k not in OURS} | MORE[case.name]
    return [Peer("pytorch-optimizer", "pytorch_optimizer", make, options, differs=DIFFERS.get(case.name))]
