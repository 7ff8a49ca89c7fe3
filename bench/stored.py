"""Ours in other ways: parameters and states as users of large models store them, and what telling autograd costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Stored:
    """A storage of our optimizers.

    Attributes:
        name: What ``--stored`` and reports call it.
        about: For reports.
        dtype: Of parameters and gradients, a key of ``workload.DTYPES``.
        options: Constructor arguments.
        attributes: What is set besides.
    """

    name: str
    about: str
    dtype: str
    options: dict[str, Any] = field(hash=False)
    attributes: dict[str, Any] = field(hash=False, default_factory=dict)

    @property
    def is_same_update(self) -> bool:
        """Whether it computes what ours in full does, of numbers of as many bits."""
        return bool(self.attributes)


STORED = {
    stored.name: stored
    for stored in (
        Stored("silent", "autograd not told of steps", "fp32", {}, {"increments_versions": False}),
        Stored("8bit", "states of 8 bits", "fp32", {"state_dtype": "8bit"}),
        Stored("bf16", "bf16 parameters, no masters", "bf16", {}),
        Stored("bf16-masters", "bf16 parameters, fp32 masters", "bf16", {"master": "fp32"}),
        Stored("split", "bf16 parameters, split", "bf16", {"master": "split"}),
        Stored(
            "split-bf16",
            "bf16 parameters, split, bf16 states",
            "bf16",
            {"master": "split", "state_dtype": BF16},
        ),
        Stored(
            "split-8bit",
            "bf16 parameters, split, states of 8 bits",
            "bf16",
            {"master": "split", "state_dtype": "8bit"},
        ),
        Stored(
            "stochastic-bf16",
            "bf16 parameters, rounded stochastically, bf16 states",
            "bf16",
            {"master": "stochastic", "state_dtype": BF16},
        ),
    )
}
