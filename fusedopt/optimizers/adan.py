"""Adan."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import (
    EPS,
    LR,
    RULE,
    THREE_BETAS,
    WEIGHT_DECAY,
    Hyper,
    Hypers,
    Rule,
    Scalars,
    State,
    States,
    bias_correction,
)


class AdanRule(Rule):
    """``d = (m / (1 - b1^t) + b2 y / (1 - b2^t)) / (sqrt(v) / sqrt(1 - b3^t) + eps)``, and decay."""

    name = "adan"
    hyper: Hypers = (LR, WEIGHT_DECAY, *THREE_BETAS, EPS, Hyper("no_prox"))
    states: States = (
        State("exp_avg"),
        State("exp_avg_diff"),
        State("exp_avg_sq", signed=False),
        State("neg_pre_grad", exact=True),  # the difference of two gradients is less than either
    )
    scalars: Scalars = {"step": 0.0}
    decay = RULE

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            beta3=h.beta3,
            one_minus_beta3=1 - h.beta3,
            before=0.0 if new_state else 1.0,
            m_scale=1 / bias_correction(h.beta1, s.step),
            diff_scale=h.beta2 / bias_correction(h.beta2, s.step),
            root_scale=1 / math.sqrt(bias_correction(h.beta3, s.step)),
            eps=h.eps,
            decay=h.weight_decay,
            shrink=1.0 if h.no_prox else 1 / (1 + h.lr * h.weight_decay),
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        change = g + state["neg_pre_grad"] if c.before else torch.zeros_like(g)
        ahead = g + c.beta2 * change
        m = torch.lerp(state["exp_avg"], g, c.one_minus_beta1)
        y = c.beta2 * state["exp_avg_diff"] + c.one_minus_beta2 * change
        v = c.beta3 * state["exp_avg_sq"] + c.one_minus_beta3 * (ahead * ahead)
        d = (c.m_scale * m + c.diff_scale * y) / (c.root_scale * v.sqrt() + c.eps)
        return (d + c.decay * p) * c.shrink, {"exp_avg": m, "exp_avg_diff": y, "exp_avg_sq": v, "neg_pre_grad": -g}


class Adan(FusedOptimizer):
    """Adaptive Nesterov momentum: moments of the gradient, of its change, and of both together.

    With ``e = g - (the gradient before)``, 0 in the first step: ``m <- b1 m + (1-b1) g``, ``y <- b2 y + (1-b2) e``,
    ``v <- b3 v + (1-b3) (g + b2 e)^2``, ``d = (m / (1-b1^t) + b2 y / (1-b2^t)) / (sqrt(v / (1-b3^t)) + eps)``, and
    ``p <- (p - lr d) / (1 + lr weight_decay)``; with ``no_prox`` ``p <- (1 - lr weight_decay) p - lr d``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the three moments, each in [0, 1): one minus those of the paper, as in the authors' code.
        eps: Added to the root of the bias-corrected third moment.
        weight_decay: Decay coefficient, multiplied by ``lr``.
        no_prox: Decay as AdamW does.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.Adan(model.parameters(), lr=1e-3, weight_decay=0.02)

    Reference:
        Xie et al., IEEE TPAMI 2024, arXiv 2208.06677.
    """

    rule: type[Rule] = AdanRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        average: Average | None = None,
        gradient_noise: GradientNoise | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(locals()))
