"""AMSGD and AMAdamW: momentum whose memory is chosen anew in every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import (
    COUPLED,
    DECOUPLED,
    EPS,
    LR,
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

BETA2 = Hyper("beta2", high=1.0, high_open=True)
LAM = Hyper("lam")
BETA_MAX = Hyper("beta_max", high=1.0, high_open=True)


def chosen(a: float, b: float, high: float) -> float:
    """``a / b`` between 0 and ``high``; 0 where it is no number, or b is 0."""
    ratio = a / b if b > 0 else 0.0
    return min(ratio, high) if ratio > 0 else 0.0


class AMSGDRule(Rule):
    """``d <- ((b + lam) d + (1 - b) g) / (1 + lam)``; before a tensor's first step, d is its gradient.

    ``b = clip(sum(g^2 + lam d (2 g - d)) / sum((d - g)^2), 0, b_max)``, 0 where the second sum is; over the scope.
    """

    name = "amsgd"
    hyper: Hypers = (LAM, BETA_MAX)
    states: States = (State("momentum_buffer"),)
    scalars: Scalars = {"step": 0.0, "beta": 0.0}
    shared: Names = ("beta",)
    decay = COUPLED
    scopes: Names = ("group", "tensor", "all")
    measures: Names = ("gain", "difference")

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(lam=h.lam, beta_max=h.beta_max, is_new=float(new_state), kept=0.0, taken=0.0)

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        d = g if c.is_new else state["momentum_buffer"]
        return g * g + c.lam * d * (2 * g - d), (d - g) ** 2

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        s.beta = chosen(m.whole.gain, m.whole.difference, c.beta_max)
        c.kept = (s.beta + c.lam) / (1 + c.lam)
        c.taken = (1 - s.beta) / (1 + c.lam)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        d = g if c.is_new else c.kept * state["momentum_buffer"] + c.taken * g
        return d, {"momentum_buffer": d}


class AMAdamWRule(Rule):
    """``d <- ((1 - b) g + (lam P + b) d) / (1 + lam P)``, and the step is along ``d / P``.

    ``v <- b2 v + (1-b2) g^2``, ``P = (1 - b_max prod b) (sqrt(v / (1-b2^t)) + eps)``, ``M = 1 / (P (1 + lam P))``,
    ``b = clip(((1 + lr wd) gap - sum((d-g) (g + lam P d) M + wd p (d-g))) / sum((d-g)^2 M), 0, b_max)`` with
    ``gap = (lr of the step before) / lr sum(g (d / P + wd p))``, and ``b_max`` in the first step.
    """

    name = "amadamw"
    hyper: Hypers = (LR, WEIGHT_DECAY, BETA2, EPS, LAM, BETA_MAX)
    states: States = (State("direction"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0, "beta": 0.0, "beta_product": 1.0, "last_lr": 0.0}
    shared: Names = ("beta", "beta_product", "last_lr")
    decay = DECOUPLED
    scopes: Names = ("tensor", "group", "all")
    measures: Names = ("gain", "difference")

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            scale=1 - h.beta_max * s.beta_product,
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
            lam=h.lam,
            weight_decay=h.weight_decay,
            lr=h.lr,
            gap_scale=(1 + h.weight_decay * h.lr) * s.last_lr / h.lr if h.lr else 0.0,
            beta_max=h.beta_max,
            beta=0.0,
        )

    @staticmethod
    def metric(g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensor]:
        """``P``, and the new second moment."""
        v = c.beta2 * state["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
        return c.scale * (c.root_scale * v.sqrt() + c.eps), v

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        metric, _ = AMAdamWRule.metric(g, state, c)
        d = state["direction"]
        weight, change = 1 / (metric * (1 + c.lam * metric)), d - g
        gap = g * (d / metric + c.weight_decay * p)
        rest = change * (g + c.lam * metric * d) * weight + c.weight_decay * p * change
        return c.gap_scale * gap - rest, change * change * weight

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        is_first = s.beta_product == 1
        s.beta = c.beta_max if is_first else chosen(m.whole.gain, m.whole.difference, c.beta_max)
        s.beta_product = s.beta_product * s.beta
        s.last_lr = c.lr
        c.beta = s.beta

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        metric, v = AMAdamWRule.metric(g, state, c)
        regularised = c.lam * metric
        d = torch.addcmul((1 - c.beta) * g, regularised + c.beta, state["direction"]) / (1 + regularised)
        return d / metric, {"direction": d, "exp_avg_sq": v}


class ChosenMemory(torch.optim.Optimizer):
    """What both have: the memory that the last step chose."""

    def memory_of(self, p: Tensor) -> Tensor:
        """The momentum factor that a parameter's last step used, between 0 and ``beta_max``.

        Returns:
            A one-element tensor on the parameter's device; reading its value waits for the device.

        Raises:
            KeyError: If the parameter has not been stepped.
        """
        state = self.state.get(p)
        if not state:
            raise KeyError(f"a parameter of shape {tuple(p.shape)} has not been stepped by this optimizer")
        return state["beta"].detach().clone()


class AMSGD(ChosenMemory, FusedOptimizer):
    """SGD whose momentum is, in every step, that of the best model of two planes: of the gradient and of the memory.

    ``b = clip(sum(g^2 + lam d (2 g - d)) / sum((d - g)^2), 0, beta_max)``, 0 where the second sum is;
    ``d <- ((b + lam) d + (1 - b) g) / (1 + lam)`` (first step: ``d <- g``), ``p <- p - lr d``.
    This is reconstructed from the model and from public descriptions of it; the paper's body was not consulted.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        lam: How much the step is to be like the one before, at least 0.
        beta_max: The largest memory, in [0, 1).
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        scope: What shares a memory: "group", "tensor", or "all" parameters.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.AMSGD(model.parameters(), lr=0.1)
        >>> optimizer.memory_of(model.weight)  # after a step

    Reference:
        Topollai and Choromanska, arXiv 2510.04988.
    """

    rule: type[Rule] = AMSGDRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.1,
        lam: float = 0.1,
        beta_max: float = 0.9,
        weight_decay: float = 0.0,
        *,
        scope: str = "group",
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


class AMAdamW(ChosenMemory, FusedOptimizer):
    """AdamW whose first moment is, in every step, that of the best model of two planes, in the metric of the second.

    ``v <- beta2 v + (1-beta2) g^2``, ``P = (1 - beta_max prod(b)) (sqrt(v / (1-beta2^t)) + eps)`` with the memories of
    the steps before, ``d <- ((1 - b) g + (lam P + b) d) / (1 + lam P)``, ``p <- (1 - lr weight_decay) p - lr d / P``.
    The memory b is ``beta_max`` in the first step; then ``AMAdamWRule`` has its equation. With ``lam`` = 0 and a
    memory that stays at ``beta_max`` it is AdamW. This is reconstructed from the model and from public descriptions of
    it; the paper's body was not consulted.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        beta2: Decay rate of the second moment, in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay coefficient, ``p <- (1 - lr weight_decay) p``.
        lam: How much the step is to be like the one before, at least 0.
        beta_max: The largest memory, in [0, 1).
        scope: What shares a memory: "tensor", "group", or "all" parameters.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.AMAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

    Reference:
        Topollai and Choromanska, arXiv 2510.04988; Loshchilov and Hutter, ICLR 2019.
    """

    rule: type[Rule] = AMAdamWRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        lam: float = 0.1,
        beta_max: float = 0.89,
        *,
        scope: str = "tensor",
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
