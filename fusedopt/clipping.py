"""Clipping in the step, and the norm that it measures: one tensor, which every step fills."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks


class Clips:
    """A part of FusedOptimizer."""

    param_groups: list[dict[str, Any]]
    max_grad_norm: float | None
    skip_nonfinite: bool
    status: Any
    _in_backward: Any
    _norm: Tensor | None = None  # where it is told, once somebody asked for it
    _has_norm: bool = False  # whether the last step measured it
    _next_max_norm: float | None = None  # of the next step alone

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradients' global L2 norm in the last step, before clipping and after unscaling."""
        if not (self._has_norm or self._measures()):
            return None
        if self._norm is None:
            self._norm = self._place_of_norm()
        return self._norm

    def clip_next_step(self, max_norm: float) -> Tensor:
        """Clip the gradients in the next step, and in no other; ``clip_grad_norm_`` of all parameters, but for free.

        Args:
            max_norm: Positive; infinity measures the norm only. Where ``max_grad_norm`` is less, that holds.

        Returns:
            ``grad_norm``, which the step is going to fill.

        Raises:
            ValueError: If it is not positive.
            TypeError: If it is no number.
            RuntimeError: If the optimizer steps in backward.
        """
        checks.max_norm(max_norm, "max_norm")
        if self._in_backward:
            raise RuntimeError("clipping needs all gradients at once, and this optimizer steps in backward")
        self._next_max_norm = float(max_norm)
        norm = self.grad_norm
        assert norm is not None
        return norm

    def _measures(self) -> bool:
        """Whether the next step measures gradients."""
        return self.max_grad_norm is not None or self._next_max_norm is not None or self.skip_nonfinite

    def _max_norm(self) -> float:
        """To what the next step clips."""
        limits = (self.max_grad_norm, self._next_max_norm)
        return min((float(limit) for limit in limits if limit is not None), default=math.inf)

    def _tell_norm(self, norm: float | Tensor | None) -> None:
        """A step is over, and had a norm if it measured one."""
        self._has_norm, self._next_max_norm = norm is not None, None
        if norm is None:
            return
        if self._norm is None:
            self._norm = self._place_of_norm()
        if not isinstance(norm, Tensor):
            self._norm.fill_(norm)
        elif norm is not self.status(self._device(), 0).norm:  # whose launch has written it
            self._norm.copy_(norm, non_blocking=True)

    def _check_place_of_norm(self) -> None:
        """Parameters may be on another device than they were, or of another precision."""
        if (last := self._norm) is not None:
            self._norm = self._place_of_norm()
            if self._norm is not last:
                self._norm.copy_(last, non_blocking=True)

    def _place_of_norm(self) -> Tensor:
        if (device := self._device()).type == "mps":  # which has no float64, and no engine that tells it anything
            return torch.zeros((), device=device) if self._norm is None else self._norm
        wide = any(p.dtype in checks.WIDE for group in self.param_groups for p in group["params"])
        status = self.status(device, 0)
        return status.norm if wide else status.narrow_norm

    def _device(self) -> torch.device:
        """The first parameter's, if that has memory."""
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        return torch.device("cpu") if device is None or device.type == "meta" else device
