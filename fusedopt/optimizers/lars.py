"""LARS."""

from __future__ import annotations

from torch import Tensor

from fusedopt.aliases import Group, ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.lamb import ALWAYS_ADAPT
from fusedopt.optimizers.sgd import MOMENTUM, SGDRule
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import EPS, RULE, WEIGHT_DECAY, Hyper, Hypers, Names, Rule, States


class LARSRule(Rule):
    """SGD on ``trust (g + wd p)``, with ``trust = eta |p| / (|g| + wd |p| + eps)``, norms over the tensor.

    It is 1 where either norm is 0, and where nothing decays unless ``always_adapt``.
    """

    name = "lars"
    hyper: Hypers = (*MOMENTUM, WEIGHT_DECAY, Hyper("trust_coefficient"), EPS, ALWAYS_ADAPT)
    states: States = SGDRule.states
    decay = RULE
    measures: Names = ("param", "grad")

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        return SGDRule.conflict(group)

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            **vars(SGDRule.prepare(h, s, new_state)),
            weight_decay=h.weight_decay,
            trust_coefficient=h.trust_coefficient,
            eps=h.eps,
            adapts=float(h.weight_decay != 0 or h.always_adapt != 0),
            trust=1.0,
        )

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        return p * p, g * g

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        p, g = m.param**0.5, m.grad**0.5
        if c.adapts and p > 0 and g > 0:
            c.trust = c.trust_coefficient * p / (g + c.weight_decay * p + c.eps)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        return SGDRule.direction(p, c.trust * (g + c.weight_decay * p), state, c)


class LARS(FusedOptimizer):
    """SGD whose gradient is scaled, for each tensor, to a part of the tensor's own length.

    ``trust = trust_coefficient |p| / (|g| + weight_decay |p| + eps)``, ``g <- trust (g + weight_decay p)``,
    ``b <- momentum b + (1-dampening) g`` (first step: ``b <- g``), ``p <- p - lr b``; with ``nesterov``
    ``p <- p - lr (g + momentum b)``; without momentum ``p <- p - lr g``. The ratio is 1 where either norm is 0, and in
    groups without decay unless ``always_adapt``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        momentum: Momentum factor; 0 for none.
        dampening: Of the gradient's part in the momentum, from the second step on.
        nesterov: Nesterov momentum; needs momentum, and no dampening.
        weight_decay: Decay coefficient; the decay is part of the gradient that is scaled.
        trust_coefficient: The length of a scaled gradient beside the tensor's.
        eps: Added to the length that the gradient is divided by.
        always_adapt: Scale the gradients of groups without decay, too.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.LARS(model.parameters(), lr=1.0, weight_decay=1e-4)

    Reference:
        You, Gitman and Ginsburg, arXiv 1708.03888; the form is that of timm's Lars.
    """

    rule: type[Rule] = LARSRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        dampening: float = 0,
        nesterov: bool = False,
        weight_decay: float = 0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
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
