"""Other packages' optimizers, each behind one small adapter.

An adapter module has ``peers(case, device)``: what its package offers for an optimizer on a kind of device. It says so
without importing the package, which happens only when a peer is built.
"""

from __future__ import annotations

from fusedopt.bench.optimizers import CASES, Case
from fusedopt.bench.peers import (
    adabound,
    adamp,
    apex,
    bitsandbytes,
    deepspeed,
    flashoptim,
    lion_pytorch,
    optimi,
    prodigyopt,
    pytorch_optimizer,
    timm,
    torch_optim,
    torchao,
    transformer_engine,
)
from fusedopt.bench.peers.peer import Groups, Peer

ADAPTERS = (
    torch_optim,
    apex,
    transformer_engine,
    deepspeed,
    bitsandbytes,
    torchao,
    optimi,
    flashoptim,
    pytorch_optimizer,
    lion_pytorch,
    adabound,
    adamp,
    prodigyopt,
    timm,
)

__all__ = ["ADAPTERS", "Groups", "Peer", "known", "offered"]


def offered(case: Case, device: str) -> list[Peer]:
    """All peers of an optimizer, installed or not. Beside what engines do besides a rule, torch has averages alone.

    Args:
        case: The optimizer.
        device: Its kind, such as ``cpu``.
    """
    adapters = (torch_optim,) if case.asked else ADAPTERS
    return [peer for adapter in adapters for peer in adapter.peers(case, device)]


def known(*devices: str) -> dict[str, str]:
    """The names of all peers, and their packages.

    Args:
        devices: The kinds that they are for; any if none is given.
    """
    kinds = devices or ("cpu", "cuda")
    every = (peer for device in kinds for case in CASES.values() for peer in offered(case, device))
    return {peer.name: peer.package for peer in every}
