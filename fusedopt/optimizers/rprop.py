"""Rprop."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import RULE, Hyper, Hypers, Rule, Scalars, State, States, StepScale


class RpropRule(Rule):
    """``e <- clamp(e eta, min, max)``, ``d = e sign(g)``.

    Where ``g prev > 0`` eta is etaplus; where it is negative, etaminus, and g becomes 0; elsewhere it is 1. As in
    torch, an element whose gradient is NaN stays where it is.
    """

    name = "rprop"
    hyper: Hypers = (
        Hyper("etaminus", "etas", 0, high=1.0, low_open=True, high_open=True),
        Hyper("etaplus", "etas", 1, low=1.0, low_open=True),
        Hyper("step_size_min", "step_sizes", 0),
        Hyper("step_size_max", "step_sizes", 1),
    )
    states: States = (State("prev"), State("step_size", init="lr", signed=False, exact=True))
    scalars: Scalars = {"step": 0.0}
    decay = RULE
    step_scale: StepScale = StepScale.ONE

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(**vars(h))

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        change = g * state["prev"]
        eta = torch.ones_like(g).masked_fill(change > 0, c.etaplus).masked_fill(change < 0, c.etaminus)
        size = (state["step_size"] * eta).clamp(c.step_size_min, c.step_size_max)
        g = torch.where(change < 0, 0.0, g)
        return size * g.sign(), {"prev": g, "step_size": size}


class Rprop(FusedOptimizer):
    """Resilient backpropagation: steps of a size that each element has for itself, by the gradient's sign alone.

    Where ``g prev > 0``: ``e <- min(etaplus e, largest)``. Where ``g prev < 0``: ``e <- max(etaminus e, smallest)``
    and ``g <- 0``. Then ``p <- p - e sign(g)``, ``prev <- g``. For gradients of whole batches.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: What step sizes start from, and nothing afterwards; a float or a one-element tensor.
        etas: By what step sizes shrink, in (0, 1), and grow, more than 1.
        step_sizes: The smallest and the largest step size.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.Rprop(model.parameters(), lr=1e-2)

    Reference:
        Riedmiller and Braun, ICNN 1993, without backtracking; the form of ``torch.optim.Rprop``.
    """

    rule: type[Rule] = RpropRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        etas: tuple[float, float] = (0.5, 1.2),
        step_sizes: tuple[float, float] = (1e-6, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        average: Average | None = None,
        gradient_noise: GradientNoise | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        cautious_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(locals()))
