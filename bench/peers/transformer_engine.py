"""NVIDIA TransformerEngine, whose optimizers descend from apex's."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers import apex
from fusedopt.bench.peers.peer import Peer


def peers(case: Case, device: str) -> list[Peer]:
    """What TransformerEngine has for an optimizer."""
    if case.name == "Adagrad":
        return []
    return apex.multi_tensor(
        "transformer-engine", "transformer_engine", "transformer_engine.pytorch.optimizers", case, device
    )
