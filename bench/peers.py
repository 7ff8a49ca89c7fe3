"""The optimizers that are measured, and others' implementations that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fusedopt
from fusedopt.verification import oracles

FUSED = 1.0  # times torch's fused step, which is at the memory limit too
UNFUSED = 5.0  # times the fastest step that passes over memory once per operation


@dataclass(frozen=True)
class Peer:
    """Somebody else's implementation.

    Attributes:
        label: How reports call it.
        oracle: ``package:Class``.
        options: Constructor arguments besides the case's.
    """

    label: str
    oracle: str
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, parameters: list[Tensor], options: dict[str, Any]) -> torch.optim.Optimizer | None:
        """The optimizer; None when its package is not installed."""
        cls = oracles.find(self.oracle)
        return cls(parameters, **options, **self.options) if cls else None


@dataclass(frozen=True)
class Case:
    """One optimizer of fusedopt.

    Attributes:
        name: How reports call it.
        optimizer: The class's name.
        peers: Who it is compared with; the fastest one counts.
        target: How many times as long as ours the fastest peer is to take.
        options: Constructor arguments, ours and the peers'.
        warmup: Steps before the timed ones.
    """

    name: str
    optimizer: str
    peers: tuple[Peer, ...]
    target: float
    options: dict[str, Any] = field(default_factory=dict)
    warmup: int = 2

    def build(self, parameters: list[Tensor], **more: Any) -> fusedopt.FusedOptimizer:
        """Ours."""
        return getattr(fusedopt, self.optimizer)(parameters, **self.options, **more)

    @property
    def states(self) -> int:
        """Float32 numbers that it keeps per element."""
        optimizer = self.build([torch.nn.Parameter(torch.empty(0))])
        return len(optimizer.rule.active_states(optimizer.param_groups[0]))


def fused(name: str) -> tuple[Peer, ...]:
    """The fused step of torch."""
    return (Peer("torch fused", f"torch:{name}", {"fused": True}),)


def unfused(package: str, name: str) -> tuple[Peer, ...]:
    """An implementation that has a loop over tensors and a ``foreach`` one."""
    return (
        Peer(f"{package} for-loop", f"{package}:{name}", {"foreach": False}),
        Peer(f"{package} foreach", f"{package}:{name}", {"foreach": True}),
    )


CASES = (
    Case("SGD momentum", "SGD", fused("SGD"), FUSED, {"momentum": 0.9}),
    Case("Adagrad", "Adagrad", fused("Adagrad"), FUSED),
    Case("RMSprop", "RMSprop", unfused("torch", "RMSprop"), UNFUSED),
    Case("Adam", "Adam", fused("Adam"), FUSED),
    Case("AdamW", "AdamW", fused("AdamW"), FUSED),
    Case("AdamW amsgrad", "AdamW", fused("AdamW"), FUSED, {"amsgrad": True}),
    Case("NAdam", "NAdam", unfused("torch", "NAdam"), UNFUSED),
    Case("NAdamW", "NAdamW", unfused("timm", "NAdamW"), UNFUSED),
    # RAdam takes plain momentum steps until the sixth.
    Case("RAdam", "RAdam", unfused("torch", "RAdam"), UNFUSED, warmup=6),
    Case("AdaBound", "AdaBound", (Peer("adabound", "adabound:AdaBound"),), UNFUSED),
    Case("Lion", "Lion", (Peer("lion-pytorch", "lion-pytorch:Lion"), *unfused("timm", "Lion")), UNFUSED),
)
BY_NAME = {case.name: case for case in CASES}
