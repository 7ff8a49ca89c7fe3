"""Adadelta."""

from __future__ import annotations

from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import COUPLED, EPS, Hyper, Hypers, Rule, Scalars, State, States


class AdadeltaRule(Rule):
    """``v <- rho v + (1-rho) g^2``, ``d = sqrt(a + eps) / sqrt(v + eps) g``, then ``a <- rho a + (1-rho) d^2``."""

    name = "adadelta"
    hyper: Hypers = (Hyper("rho", high=1.0), EPS)
    states: States = (State("square_avg", signed=False), State("acc_delta", signed=False))
    scalars: Scalars = {"step": 0.0}
    decay = COUPLED

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(rho=h.rho, one_minus_rho=1 - h.rho, eps=h.eps)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        v, a = c.rho * state["square_avg"] + c.one_minus_rho * (g * g), state["acc_delta"]
        d = (a + c.eps).sqrt() / (v + c.eps).sqrt() * g
        return d, {"square_avg": v, "acc_delta": c.rho * a + c.one_minus_rho * (d * d)}


class Adadelta(FusedOptimizer):
    """Steps in the parameters' own units: gradients times the ratio of two running root mean squares.

    ``v <- rho v + (1-rho) g^2``, ``d = sqrt(a + eps) / sqrt(v + eps) g``, ``a <- rho a + (1-rho) d^2``,
    ``p <- p - lr d``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: What scales the steps; a float or a one-element tensor.
        rho: Decay rate of both mean squares, in [0, 1].
        eps: Added to them under the roots; what the first steps are made of.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.Adadelta(model.parameters(), lr=1.0)

    Reference:
        Zeiler 2012, arXiv 1212.5701; the form of ``torch.optim.Adadelta``.
    """

    rule: type[Rule] = AdadeltaRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
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
