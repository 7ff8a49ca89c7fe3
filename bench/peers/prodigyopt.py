"""prodigyopt, by Prodigy's authors."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module


def peers(case: Case, device: str) -> list[Peer]:
    """Prodigy."""
    if case.name != "Prodigy":
        return []
    return [Peer("prodigyopt", "prodigyopt", from_module("prodigyopt", "Prodigy"), case.options)]
