"""Lion."""

from __future__ import annotations

from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, DECOUPLED, Hypers, Rule, State, States


class LionRule(Rule):
    """``d = sign(b1 m + (1-b1) g)``, then ``m <- b2 m + (1-b2) g``."""

    name = "lion"
    hyper: Hypers = BETAS
    states: States = (State("exp_avg"),)
    decay = DECOUPLED

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(beta1=h.beta1, one_minus_beta1=1 - h.beta1, beta2=h.beta2, one_minus_beta2=1 - h.beta2)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        m = state["exp_avg"]
        update = c.beta1 * m + c.one_minus_beta1 * g
        sign = update.sign().where(~update.isnan(), update)  # sign(NaN) is 0 in torch
        return sign, {"exp_avg": c.beta2 * m + c.one_minus_beta2 * g}


class Lion(FusedOptimizer):
    """Sign of an interpolated momentum, with decoupled weight decay.

    ``p <- (1 - lr weight_decay) p - lr sign(b1 m + (1-b1) g)``, then ``m <- b2 m + (1-b2) g``; ``sign(0) = 0``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Interpolation for the sign, and decay rate of the momentum, each in [0, 1).
        weight_decay: Decay coefficient, multiplied by ``lr``.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.Lion(model.parameters(), lr=1e-4, weight_decay=0.1)

    Reference:
        Chen et al. 2023, arXiv 2302.06675.
    """

    rule: type[Rule] = LionRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
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
