"""SGD."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.aliases import Group, ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import Hyper, Hypers, Rule, State, States

MOMENTUM = (Hyper("momentum"), Hyper("dampening", low=-math.inf), Hyper("nesterov", high=1.0))


class SGDRule(Rule):
    """``b <- mu b + (1-tau) g`` (first step ``b <- g``); ``d = g + mu b`` with Nesterov, else b; g without momentum."""

    name = "sgd"
    hyper: Hypers = MOMENTUM
    states: States = (State("momentum_buffer", when="momentum"),)
    sparse = True

    @classmethod
    def rests(cls, group: Group) -> bool:
        return not group["momentum"]

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            return "nesterov=True needs momentum > 0 and dampening = 0"
        return None

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        kept, gain = (0.0, 1.0) if new_state else (h.momentum, 1 - h.dampening)
        return Values(momentum=h.momentum, kept=kept, gain=gain, nesterov=h.nesterov)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        if not state:
            return g, {}
        buffer = c.kept * state["momentum_buffer"] + c.gain * g
        return (g + c.momentum * buffer if c.nesterov else buffer), {"momentum_buffer": buffer}


class SGD(FusedOptimizer):
    """Stochastic gradient descent, with momentum, Nesterov momentum, and either kind of weight decay.

    ``b <- momentum b + (1-dampening) g`` (first step: ``b <- g``), ``p <- p - lr b``; with ``nesterov``
    ``p <- p - lr (g + momentum b)``; without momentum ``p <- p - lr g``.

    Gradients may be sparse (COO), without weight decay, on engine eager: a step reads and writes the slices that they
    have; with momentum, an average, noise or what is rounded at random, all of the parameter, as that of the same dense
    gradient does.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        momentum: Momentum factor; 0 for none.
        dampening: Of the gradient's part in the momentum, from the second step on.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        nesterov: Nesterov momentum; needs momentum, and no dampening.
        decoupled_weight_decay: Decay as AdamW does, ``p <- (1 - lr weight_decay) p``, instead.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)

    Reference:
        Polyak 1964; Sutskever et al., ICML 2013; Loshchilov and Hutter, ICLR 2019 (SGDW).
    """

    rule: type[Rule] = SGDRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
        decoupled_weight_decay: bool = False,
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
