"""torchao: Adam with states of 8 or 4 bits, a compiled step for every tensor."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

TENSORS = 1000  # one compiled call for each, and counters that are tensors


def peers(case: Case, device: str) -> list[Peer]:
    """What torchao has for an optimizer."""
    if case.name not in ("Adam", "AdamW"):
        return []
    return [
        Peer(
            f"torchao-{bits}bit",
            "torchao",
            from_module("torchao.optim", f"{case.optimizer}{bits}bit"),
            case.options,
            storage=f"{bits}bit",
            differs=f"states are rounded to {bits} bits",
            compiles=True,
            most_tensors=TENSORS,
        )
        for bits in (8, 4)
    ]
