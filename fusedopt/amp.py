"""What an optimizer does with a GradScaler: takes its findings over, on all ranks alike."""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedopt.launch import Scaling
from fusedopt.ranks import Ranks
from fusedopt.sums import Joint


class TakesScaling:
    """A part of FusedOptimizer."""

    _scaler: weakref.ref[Any] | None
    handles_amp: bool
    _in_backward: Any
    _skipped: int
    _tell_norm: Callable[[float | Tensor | None], None]
    _joint: Callable[[list[Any], Ranks], tuple[Ranks | None, Joint | None]]

    def _scaling(self) -> Scaling:
        """What a GradScaler has handed over."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if found_inf is not None and not isinstance(found_inf, Tensor):  # it had no gradient to look at
            device = grad_scale.device if isinstance(grad_scale, Tensor) else "cpu"
            found_inf = torch.zeros((), dtype=torch.float32, device=device)
        return Scaling(grad_scale, found_inf)

    def _agree(self, scaling: Scaling, ranks: Ranks) -> None:
        """What a GradScaler found on one rank, it found on all; in place, so that all of them scale back."""
        if scaling.found_inf is None or not ranks.are_many:
            return
        found_inf = ranks.maximum(scaling.found_inf)
        scaling.found_inf.copy_(found_inf)
        scaler = self._scaler and self._scaler()
        if scaler and id(self) in scaler._per_optimizer_states:
            own = scaler._per_optimizer_states[id(self)]["found_inf_per_device"]
            if not own:
                own[found_inf.device] = torch.zeros_like(found_inf)
            for found in own.values():
                found.copy_(found_inf.expand_as(found))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler hands ``grad_scale`` and ``found_inf`` to step(), and does not unscale by itself.

        Of what it found it hands on a sum, and has its own for itself, by which it scales back. Ranks that agree on the
        one must agree on the other, so it is remembered who asks.
        """
        if self._in_backward:
            raise RuntimeError("a GradScaler needs all gradients at once, and this optimizer steps in backward")
        asking = sys._getframe(1).f_locals.get("self")
        self._scaler = weakref.ref(asking) if isinstance(asking, torch.amp.GradScaler) else None
        return self.handles_amp

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, yes: bool) -> None:
        self.handles_amp = yes

    def _refuses(self, scaling: Scaling, ranks: Ranks, measures: bool) -> bool:
        """Whether a GradScaler found gradients that are not finite; devices whose plans stand look at it themselves."""
        if scaling.refuses:
            self._skipped += 1
            self._tell_norm(math.inf if measures else None)
            if measures and ranks.are_many:
                ranks.sum([])  # others may measure, to see on their devices that they do not step
            if joint := self._joint([], ranks)[1]:
                joint.skipped()
            return True
        scaling.read()
        return False
