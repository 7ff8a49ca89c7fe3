"""What launches tell of steps, in the memory of a device."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.layout import StatusCount, StatusNumber


class StepStatus:
    """What launches tell of steps: on the device, so that nobody waits for it. It belongs to an optimizer, not a plan.

    Attributes:
        numbers: float64, by StatusNumber.
        counts: int32, by StatusCount.
        squared_norm, norm, skipped_steps, skipped: Elements of them.
        narrow_norm: The norm as a float32.
        one, zero: float32, of launches without a GradScaler.
    """

    numbers: Tensor
    counts: Tensor
    squared_norm: Tensor
    norm: Tensor
    narrow_norm: Tensor
    skipped_steps: Tensor
    skipped: Tensor
    one: Tensor
    zero: Tensor

    @torch.inference_mode(False)
    def __init__(self, device: torch.device) -> None:
        self.numbers = torch.zeros(len(StatusNumber), dtype=torch.float64, device=device)
        self.counts = torch.zeros(len(StatusCount), dtype=torch.int32, device=device)
        self.squared_norm, self.norm = self.numbers[StatusNumber.SQUARED_NORM], self.numbers[StatusNumber.NORM]
        self.narrow_norm = self.numbers.view(torch.float32)[2 * StatusNumber.NARROW_NORM]
        self.skipped_steps, self.skipped = self.counts[StatusCount.SKIPPED_STEPS], self.counts[StatusCount.SKIPPED]
        self.one = torch.ones((), dtype=torch.float32, device=device)
        self.zero = torch.zeros_like(self.one)
