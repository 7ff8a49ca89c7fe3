"""RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.aliases import Group, ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import COUPLED, EPS, Hyper, Hypers, Rule, Scalars, State, States


class RMSpropRule(Rule):
    """``v <- a v + (1-a) g^2``, ``d = g / (sqrt(v) + eps)``, centered and with momentum as asked.

    The centered variance ``v - m^2`` can round below zero; it is clamped there, which changes nothing
    where ``torch.optim`` is finite.
    """

    name = "rmsprop"
    hyper: Hypers = (Hyper("alpha", high=1.0), EPS, Hyper("momentum"))
    states: States = (
        State("square_avg", signed=False),
        State("momentum_buffer", when="momentum"),
        State("grad_avg", when="centered"),
    )
    scalars: Scalars = {"step": 0.0}
    decay = COUPLED

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        if group.get("centered") and group.get("state_dtype"):
            return "centered=True takes the difference of two states, which state_dtype would round away"
        return None

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(alpha=h.alpha, one_minus_alpha=1 - h.alpha, eps=h.eps, momentum=h.momentum)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        v = c.alpha * state["square_avg"] + c.one_minus_alpha * (g * g)
        new = {"square_avg": v}
        if "grad_avg" in state:
            new["grad_avg"] = mean = torch.lerp(state["grad_avg"], g, c.one_minus_alpha)
            v = (v - mean * mean).clamp(min=0)
        d = g / (v.sqrt() + c.eps)
        if "momentum_buffer" in state:
            new["momentum_buffer"] = d = c.momentum * state["momentum_buffer"] + d
        return d, new


class RMSprop(FusedOptimizer):
    """Gradients divided by the root of their running mean square.

    ``v <- alpha v + (1-alpha) g^2``, ``u = g / (sqrt(v) + eps)``, ``p <- p - lr u``; centered:
    ``sqrt(v - m^2)`` with m the running mean gradient; momentum: ``b <- momentum b + u``, ``p <- p - lr b``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        alpha: Decay rate of the mean square, in [0, 1].
        eps: Added to the root.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        momentum: Momentum of the scaled gradient; 0 for none.
        centered: Divide by the root of the variance instead.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.RMSprop(model.parameters(), lr=1e-2, momentum=0.9)

    Reference:
        Tieleman and Hinton 2012, lecture 6.5; the form of ``torch.optim.RMSprop``.
    """

    rule: type[Rule] = RMSpropRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
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
