"""AdamP and SGDP: the part of a step that only lengthens scale-invariant weights is taken out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.adam import ratio
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
    Score,
    State,
    States,
    bias_correction,
)

MOMENTUM = (
    Hyper("momentum", high=1.0, high_open=True),
    Hyper("dampening", low=-math.inf),
    Hyper("nesterov", high=1.0),
)
PROJECTION = (Hyper("delta"), Hyper("wd_ratio"))
SUMS = ("grad", "param", "grad_param", "step_param", "count")


def dimensions(p: Tensor) -> float:
    """How many a parameter has."""
    return float(p.dim())


def cosine(c: Values, m: Values) -> float:
    """Of gradient and parameter, times the root of how many elements they have."""
    lengths = max(m.grad**0.5, c.eps) * max(m.param**0.5, c.eps)
    return abs(m.grad_param) / lengths * m.count**0.5 if lengths > 0 else 0.0


class Projecting(Rule):
    """What both are: ``d <- d - p <d, p> / (|p| + eps)^2`` where the gradient is nearly orthogonal to the parameter.

    That is so where ``|<g, p>| / (max(|g|, eps) max(|p|, eps)) < delta / sqrt(n)`` in each channel of n elements, and
    it is projected in each; else where that holds of the whole tensor. Decay is then ``wd_ratio`` of what it was.
    Tensors of fewer than two dimensions are not projected.
    """

    decay = RULE
    scopes: Names = ("channel",)
    measures: Names = SUMS
    score: Score | None = cosine

    @staticmethod
    def sums(p: Tensor, g: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        """Of a step along d."""
        return g * g, p * p, g * p, d * p, torch.ones_like(p)

    @staticmethod
    def project(c: Values, s: Values, m: Values) -> float:
        """How much of the parameter is taken out of the step; it and the decay are what the step adds of it."""
        if s.n_dims < 2:
            return 0.0
        if m.largest < c.delta:
            of = m
        elif cosine(c, m.whole) < c.delta:
            of = m.whole
        else:
            return 0.0
        length = of.param**0.5 + c.eps
        along = of.step_param / length**2 if length > 0 else 0.0
        c.pull = c.pull * c.wd_ratio - along
        return along

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        Projecting.project(c, s, m)


class AdamPRule(Projecting):
    """Adam's ratio, projected as ``Projecting`` says; with Nesterov of ``b1 m + (1 - b1) g``."""

    name = "adamp"
    hyper: Hypers = (*BETAS, EPS, WEIGHT_DECAY, *PROJECTION, Hyper("nesterov", high=1.0))
    states: States = (State("exp_avg"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0, "n_dims": dimensions}

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        scale = 1 / bias_correction(h.beta1, s.step)
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=scale * (h.beta1 if h.nesterov else 1),
            g_scale=scale * (1 - h.beta1) if h.nesterov else 0.0,
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
            delta=h.delta,
            wd_ratio=h.wd_ratio,
            pull=h.weight_decay,
        )

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        return Projecting.sums(p, g, ratio(p, g, state, c)[0])

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        d, new = ratio(p, g, state, c)
        return d + c.pull * p, new


class SGDPRule(Projecting):
    """``b <- mu b + (1-tau) g``, ``d = g + mu b`` with Nesterov, else b, projected as ``Projecting`` says.

    Without Nesterov what is projected is the buffer itself.
    """

    name = "sgdp"
    hyper: Hypers = (*MOMENTUM, EPS, WEIGHT_DECAY, *PROJECTION)
    states: States = (State("momentum"),)
    scalars: Scalars = {"step": 0.0, "n_dims": dimensions}

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            momentum=h.momentum,
            gain=1 - h.dampening,
            ahead=h.momentum if h.nesterov else 1.0,
            g_scale=1.0 if h.nesterov else 0.0,
            eps=h.eps,
            delta=h.delta,
            wd_ratio=h.wd_ratio,
            along_buffer=0.0,
            pull=h.weight_decay / (1 - h.momentum),
        )

    @staticmethod
    def step(g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensor]:
        """The step before it is projected, and the buffer."""
        buffer = c.momentum * state["momentum"] + c.gain * g
        return c.g_scale * g + c.ahead * buffer, buffer

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        return Projecting.sums(p, g, SGDPRule.step(g, state, c)[0])

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        c.along_buffer = Projecting.project(c, s, m) * (1 - c.g_scale)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        d, buffer = SGDPRule.step(g, state, c)
        return d + c.pull * p, {"momentum": buffer - c.along_buffer * p}


class AdamP(FusedOptimizer):
    """AdamW that leaves out of a step what only lengthens weights whose length does not matter.

    Adam's step d is projected, ``d <- d - p <d, p> / (|p| + eps)^2``, where the gradient is nearly orthogonal to the
    parameter, as it is in front of a normalisation: where the cosine of both is below ``delta / sqrt(n)`` in all
    channels (of dimension 0, of n elements), in each of them; else where it is in the whole tensor, there. Then
    ``p <- (1 - lr weight_decay r) p - lr d``, with r = ``wd_ratio`` where it was projected, else 1. Tensors of fewer
    than two dimensions are stepped as by AdamW.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the root of the bias-corrected second moment, and to lengths.
        weight_decay: Decay coefficient.
        delta: How near to orthogonal the gradient has to be.
        wd_ratio: Of the decay of what is projected.
        nesterov: Take ``b1 m + (1 - b1) g`` for the first moment.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)

    Reference:
        Heo et al., ICLR 2021; the form is that of the package ``adamp``.
    """

    rule: type[Rule] = AdamPRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
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


class SGDP(FusedOptimizer):
    """SGD with momentum that leaves out of a step what only lengthens weights whose length does not matter.

    ``b <- momentum b + (1 - dampening) g``, and the step d is b, with ``nesterov`` ``g + momentum b``. It is projected
    as ``AdamP`` does, without ``nesterov`` in the buffer, too, as the authors' package does; then
    ``p <- (1 - lr weight_decay r / (1 - momentum)) p - lr d``, with r = ``wd_ratio`` where it was projected, else 1.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        momentum: Momentum factor, in [0, 1).
        dampening: Of the gradient's part in the momentum.
        weight_decay: Decay coefficient.
        nesterov: Nesterov momentum.
        eps: Added to lengths.
        delta: How near to orthogonal the gradient has to be.
        wd_ratio: Of the decay of what is projected.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.SGDP(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    Reference:
        Heo et al., ICLR 2021; the form is that of the package ``adamp``.
    """

    rule: type[Rule] = SGDPRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
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
