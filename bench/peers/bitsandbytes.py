"""bitsandbytes: states of 32 or 8 bits, the latter on GPUs only."""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

HAVE = ("SGD", "Adagrad", "RMSprop", "Adam", "AdamW", "Lion")
DECAYS = {  # by optimizer and kind of device
    ("Adam", "cpu"): "its weight decay is decoupled",
    ("Adam", "cuda"): "its weight decay is decoupled, and applied after the update",
    ("AdamW", "cuda"): "its weight decay is applied after the update",
}
BLOCKWISE = "states are rounded to 8 bits"


def peers(case: Case, device: str) -> list[Peer]:
    """What bitsandbytes has for an optimizer."""
    if case.name not in HAVE:
        return []
    make, options = from_module("bitsandbytes.optim", case.optimizer), case.options
    differs = DECAYS.get((case.name, device))
    found = [Peer("bitsandbytes", "bitsandbytes", make, options | {"optim_bits": 32}, differs=differs)]
    if device != "cpu":
        options = options | {"optim_bits": 8}
        found.append(Peer("bitsandbytes-8bit", "bitsandbytes", make, options, storage="8bit", differs=BLOCKWISE))
    return found
