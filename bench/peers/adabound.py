"""adabound, by AdaBound's authors."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module


def peers(case: Case, device: str) -> list[Peer]:
    """AdaBound."""
    make = from_module("adabound", "AdaBound")
    return [Peer("adabound", "adabound", make, case.options)] if case.name == "AdaBound" else []
