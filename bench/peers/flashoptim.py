"""flashoptim: a fused Triton kernel per tensor on GPUs; states in full or in 8 bits."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module


def peers(case: Case, device: str) -> list[Peer]:
    """What flashoptim has for an optimizer."""
    if case.name not in ("SGD", "Adam", "AdamW", "Lion"):
        return []
    make = from_module("flashoptim", f"Flash{case.optimizer}")
    full = case.options | {"quantize": False, "master_weight_bits": None, "fused": device != "cpu"}
    found = [Peer("flashoptim", "flashoptim", make, full)]
    if device != "cpu":
        options = case.options | {"quantize": True, "master_weight_bits": None, "fused": True}
        differs = "states are rounded to 8 bits"
        found.append(Peer("flashoptim-8bit", "flashoptim", make, options, storage="8bit", differs=differs))
    return found
