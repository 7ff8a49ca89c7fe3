"""RAdam."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.adam import update_moments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, EPS, Hypers, Rule, Scalars, State, States, bias_correction


class RAdamRule(Rule):
    """``d = rect m / (1-b1^t) sqrt(1-b2^t) / (sqrt(v) + eps)`` once ``rho_t > 5``, before that ``m / (1-b1^t)``."""

    name = "radam"
    hyper: Hypers = (*BETAS, EPS)
    states: States = (State("exp_avg"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0}

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        correction2 = bias_correction(h.beta2, s.step)
        limit = 2 / (1 - h.beta2) - 1
        rho = limit - 2 * s.step * (1 - correction2) / correction2
        m_scale = 1 / bias_correction(h.beta1, s.step)
        if rectified := rho > 5:
            variance = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
            m_scale *= math.sqrt(variance * correction2)
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=m_scale,
            rectified=float(rectified),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        v, new = update_moments(g, state, c)
        d = c.m_scale * new["exp_avg"]
        return (d / (v.sqrt() + c.eps) if c.rectified else d), new


class RAdam(FusedOptimizer):
    """Adam whose step is rectified by the variance of its own scaling, in torch's form.

    ``rho_inf = 2 / (1-b2) - 1``, ``rho_t = rho_inf - 2 t b2^t / (1-b2^t)``. While ``rho_t <= 5``:
    ``p <- p - lr m / (1-b1^t)``; after that ``p <- p - lr rect m / (1-b1^t) sqrt(1-b2^t) / (sqrt(v) + eps)`` with
    ``rect^2 = (rho_t-4)(rho_t-2) rho_inf / ((rho_inf-4)(rho_inf-2) rho_t)``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the root of the second moment before bias correction.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        decoupled_weight_decay: Decay as AdamW does, ``p <- (1 - lr weight_decay) p``, instead.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.RAdam(model.parameters(), lr=1e-3)

    Reference:
        Liu et al., ICLR 2020; threshold and fallback of ``torch.optim.RAdam``.
    """

    rule: type[Rule] = RAdamRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
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
