"""LAMB."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.adam import update_moments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import (
    BETAS,
    EPS,
    RULE,
    WEIGHT_DECAY,
    Hyper,
    Hypers,
    Names,
    Rule,
    Scalars,
    State,
    States,
    bias_correction,
)

ALWAYS_ADAPT = Hyper("always_adapt", high=1.0)


class LAMBRule(Rule):
    """``u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + wd p``; ``d = |p| / |u| u``, norms over the tensor.

    The trust ratio is 1 where either norm is 0, and where nothing decays unless ``always_adapt``.
    """

    name = "lamb"
    hyper: Hypers = (*BETAS, EPS, WEIGHT_DECAY, ALWAYS_ADAPT)
    states: States = (State("exp_avg"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0}
    decay = RULE
    measures: Names = ("param", "update")

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=1 / bias_correction(h.beta1, s.step),
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
            weight_decay=h.weight_decay,
            adapts=float(h.weight_decay != 0 or h.always_adapt != 0),
            trust=1.0,
        )

    @staticmethod
    def update(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        """``u``, and the new state."""
        v, new = update_moments(g, state, c)
        return c.m_scale * new["exp_avg"] / (c.root_scale * v.sqrt() + c.eps) + c.weight_decay * p, new

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        u, _ = LAMBRule.update(p, g, state, c)
        return p * p, u * u

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        if c.adapts and m.param > 0 and m.update > 0:
            c.trust = m.param**0.5 / m.update**0.5

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        u, new = LAMBRule.update(p, g, state, c)
        return c.trust * u, new


class LAMB(FusedOptimizer):
    """Adam whose step is as long, for each tensor, as the tensor itself is times ``lr``.

    ``m <- b1 m + (1-b1) g``, ``v <- b2 v + (1-b2) g^2``,
    ``u = m / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps) + weight_decay p``, ``p <- p - lr |p| / |u| u``;
    the ratio of norms is 1 where either is 0, and in groups without decay unless ``always_adapt``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay coefficient; the decay is part of the step whose length is adapted.
        always_adapt: Adapt the step's length in groups without decay, too.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.LAMB(model.parameters(), lr=2e-3, max_grad_norm=1.0)

    Reference:
        You et al., ICLR 2020; the form is that of timm's Lamb and apex's FusedLAMB.
    """

    rule: type[Rule] = LAMBRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        always_adapt: bool = False,
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
        cautious_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(locals()))
