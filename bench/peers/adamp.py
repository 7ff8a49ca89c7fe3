"""adamp, by AdamP's authors."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module


def peers(case: Case, device: str) -> list[Peer]:
    """AdamP and SGDP."""
    if case.name not in ("AdamP", "SGDP"):
        return []
    return [Peer("adamp", "adamp", from_module("adamp", case.name), case.options)]
