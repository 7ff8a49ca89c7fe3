"""What an optimizer does with a GradScaler."""

# A GradScaler tells nothing of what it knows in public.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor

from fusedopt.scaling import Scaling


class TakesScaling(torch.optim.Optimizer):
    """A part of FusedOptimizer."""

    handles_amp: bool
    _in_backward: object
    _scaler: weakref.ref[torch.amp.GradScaler] | None

    def _scaling(self) -> Scaling:
        """What a GradScaler has handed over."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | float | None = getattr(self, "found_inf", None)
        if found_inf is None:
            return Scaling(grad_scale)
        if not isinstance(found_inf, Tensor):  # it had no gradient to look at
            device = "cpu" if grad_scale is None else grad_scale.device
            found_inf = torch.zeros((), dtype=torch.float32, device=device)
        scaler = self._scaler and self._scaler()
        states = scaler._per_optimizer_states if scaler else {}
        return Scaling(grad_scale, found_inf, states[id(self)]["found_inf_per_device"] if id(self) in states else None)

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
