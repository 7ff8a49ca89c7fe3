"""Clipping in the step, and the norm that it measures: one tensor, which every step fills."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.context import Context


@dataclass(slots=True)
class Measured:
    """What an optimizer knows of its gradients' norm. One for all wrappers, which have attributes of their own."""

    norm: Tensor | None = None  # where it is told, once somebody asked for it
    is_told: bool = False  # whether the last step measured it
    next_limit: float | None = None  # to which the next step alone clips


class Clips(torch.optim.Optimizer):
    """A part of FusedOptimizer."""

    max_grad_norm: float | None
    skip_nonfinite: bool
    _context: Context
    _in_backward: object
    _measured: Measured

    @property
    def grad_norm(self) -> Tensor | None:
        """The gradients' global L2 norm in the last step, before clipping and after unscaling."""
        if not (self._measured.is_told or self._measures()):
            return None
        if self._measured.norm is None:
            self._measured.norm = self._place_of_norm()
        return self._measured.norm

    def clip_next_step(self, max_norm: float) -> Tensor:
        """Clip the gradients in the next step, and in no other: ``clip_grad_norm_`` of all parameters, without a pass.

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
        self._measured.next_limit = float(max_norm)
        norm = self.grad_norm
        assert norm is not None
        return norm

    def _measures(self) -> bool:
        """Whether the next step measures gradients."""
        return self.max_grad_norm is not None or self._measured.next_limit is not None or self.skip_nonfinite

    def _max_norm(self) -> float:
        """To what the next step clips."""
        limit = math.inf if self.max_grad_norm is None else float(self.max_grad_norm)
        other = self._measured.next_limit
        return limit if other is None else min(limit, other)

    def _tell_norm(self, norm: float | Tensor | None, *, may_move: bool = False) -> None:
        """A step is over.

        Args:
            norm: What it measured; None if it did not.
            may_move: Whether parameters may be on another device than they were, or of another precision.
        """
        measured, last = self._measured, self._measured.norm
        measured.is_told, measured.next_limit = norm is not None, None
        if (last is None and norm is not None) or (last is not None and may_move):
            measured.norm = self._place_of_norm()
        if norm is None:
            if measured.norm is not None and last is not None and measured.norm is not last:
                measured.norm.copy_(last, non_blocking=True)
            return
        assert measured.norm is not None
        if not isinstance(norm, Tensor):
            measured.norm.fill_(norm)
        elif norm is not self._context.status(self._device(), 0).norm:  # whose launch has written it
            measured.norm.copy_(norm, non_blocking=True)

    def _place_of_norm(self) -> Tensor:
        if (device := self._device()).type == "mps":  # which has no float64, and no engine that tells it anything
            last = self._measured.norm
            return torch.zeros((), device=device) if last is None or last.device.type != "mps" else last
        wide = any(p.dtype in checks.WIDE for group in self.param_groups for p in group["params"])
        status = self._context.status(device, 0)
        return status.norm if wide else status.narrow_norm

    def _device(self) -> torch.device:
        """The first parameter's, if that has memory."""
        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        return torch.device("cpu") if device is None or device.type == "meta" else device
