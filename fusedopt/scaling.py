"""What a GradScaler hands to a step: what unscales gradients, and whether it found any that are not finite."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt.ranks import Ranks


@dataclass(slots=True)
class Scaling:
    """One-element tensors of a GradScaler's on its device, or None.

    Attributes:
        grad_scale: The loss was multiplied by it.
        found_inf: Not 0 if a gradient is not finite.
        found_by_device: What the scaler has of that for itself, by which it scales back.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    found_by_device: dict[torch.device, Tensor] | None = None

    _inverse: float | None = None

    @property
    def inverse(self) -> float:
        """What unscales gradients. Waits for the device, once."""
        if self._inverse is None:
            self._inverse = 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)
        return self._inverse

    def read(self) -> None:
        """Ask now for what unscales; whether it refuses was asked."""
        self.found_inf = None
        _ = self.inverse

    @property
    def refuses(self) -> bool:
        """Whether gradients were found that are not finite. Waits for the device."""
        return self.found_inf is not None and float(self.found_inf) != 0

    def agree(self, ranks: Ranks) -> None:
        """What was found on one rank, was found on all; in place, so that all of them scale back."""
        if self.found_inf is None or not ranks.are_many:
            return
        found_inf = ranks.maximum(self.found_inf)
        self.found_inf.copy_(found_inf)
        own = self.found_by_device
        if own is not None:
            if not own:
                own[found_inf.device] = torch.zeros_like(found_inf)
            for found in own.values():
                found.copy_(found_inf.expand_as(found))
