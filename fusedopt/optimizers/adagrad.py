"""Adagrad."""

from __future__ import annotations

from torch import Tensor

from fusedopt.aliases import Group, ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import COUPLED, EPS, Hyper, Hypers, Rule, Scalars, State, States
from fusedopt.state import initial_state


class AdagradRule(Rule):
    """``S <- S + g^2``, ``d = g / (sqrt(S) + eps) / (1 + (t-1) lr_decay)``."""

    name = "adagrad"
    hyper: Hypers = (Hyper("lr_decay"), EPS)
    settings: Hypers = (Hyper("initial_accumulator_value"),)
    states: States = (State("sum", init="initial_accumulator_value", signed=False),)
    scalars: Scalars = {"step": 0.0}
    decay = COUPLED
    sparse = True

    @classmethod
    def rests(cls, group: Group) -> bool:
        return True

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(scale=1 / (1 + (s.step - 1) * h.lr_decay), eps=h.eps)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        total = state["sum"] + g * g
        return c.scale * g / (total.sqrt() + c.eps), {"sum": total}


class Adagrad(FusedOptimizer):
    """Adaptive rates from the sum of squared gradients.

    ``S <- S + g^2``, ``p <- p - lr / (1 + (t-1) lr_decay) g / (sqrt(S) + eps)``. As in torch, the state
    exists from construction.

    Gradients may be sparse (COO), without weight decay, on engine eager: a step reads and writes the slices that they
    have; with an average, noise or what is rounded at random, all of the parameter, as that of the same dense gradient
    does. Complex numbers count as pairs, sparse or not; torch squares them as they are where they are sparse.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        lr_decay: Decay of the rate with the step count; not negative.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        initial_accumulator_value: What S starts from; not negative.
        eps: Added to the root of S.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.Adagrad(model.parameters(), lr=1e-2)

    Reference:
        Duchi et al., JMLR 2011.
    """

    rule: type[Rule] = AdagradRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
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
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = initial_state(self.rule, p, group)

    def share_memory(self) -> None:
        """Move the state to shared memory, for processes that train one model together."""
        for state in self.state.values():
            for value in state.values():
                value.share_memory_()
