"""torch-optimi: ``foreach`` and, on GPUs, Triton kernels."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

DIFFERS = {"RAdam": "eps is added to the debiased second moment"}


def peers(case: Case, device: str) -> list[Peer]:
    """What optimi has for an optimizer."""
    if case.name not in ("SGD", "Adam", "AdamW", "RAdam", "Lion"):
        return []
    options = case.options | {"kahan_sum": False}
    make = from_module("optimi", case.optimizer)
    ways = {"foreach": {"foreach": True, "triton": False}}
    if device != "cpu":
        ways["triton"] = {"foreach": False, "triton": True}
    return [
        Peer(f"optimi-{way}", "torch-optimi", make, options | more, differs=DIFFERS.get(case.name))
        for way, more in ways.items()
    ]
