"""lion-pytorch, by Lion's reimplementers: a loop over tensors, or a Triton kernel for each."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module


def peers(case: Case, device: str) -> list[Peer]:
    """Lion."""
    if case.name != "Lion":
        return []
    make = from_module("lion_pytorch", "Lion")
    found = [Peer("lion-pytorch", "lion-pytorch", make, case.options)]
    if device != "cpu":
        found.append(Peer("lion-pytorch-triton", "lion-pytorch", make, case.options | {"use_triton": True}))
    return found
