"""Adamax."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, COUPLED, EPS, Hypers, Rule, Scalars, State, States, bias_correction


class AdamaxRule(Rule):
    """``m <- b1 m + (1-b1) g``, ``u <- max(b2 u, |g| + eps)``, ``d = m / (1-b1^t) / u``."""

    name = "adamax"
    hyper: Hypers = (*BETAS, EPS)
    states: States = (State("exp_avg"), State("exp_inf", signed=False))
    scalars: Scalars = {"step": 0.0}
    decay = COUPLED

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(one_minus_beta1=1 - h.beta1, beta2=h.beta2, eps=h.eps, scale=1 / bias_correction(h.beta1, s.step))

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        m = torch.lerp(state["exp_avg"], g, c.one_minus_beta1)
        u = torch.maximum(c.beta2 * state["exp_inf"], g.abs() + c.eps)
        return c.scale * m / u, {"exp_avg": m, "exp_inf": u}


class Adamax(FusedOptimizer):
    """Adam with the gradients' largest magnitude, which decays, in place of their mean square.

    ``m <- b1 m + (1-b1) g``, ``u <- max(b2 u, |g| + eps)``, ``p <- p - lr m / (1-b1^t) / u``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first moment and of the largest magnitude, each in [0, 1).
        eps: Added to the gradient's magnitude.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.Adamax(model.parameters(), lr=2e-3)

    Reference:
        Kingma and Ba, ICLR 2015, section 7.1; the form of ``torch.optim.Adamax``.
    """

    rule: type[Rule] = AdamaxRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
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
