"""ASGD."""

from __future__ import annotations

from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import COUPLED, LR, Hyper, Hypers, Rule, Scalars, State, States, StepScale


class ASGDRule(Rule):
    """``d = lambd eta p + eta g``, ``ax <- ax + mu (p - d - ax)``, then eta and mu of the next step.

    ``eta <- lr / (1 + lambd lr t)^alpha``, ``mu <- 1 / max(1, t - t0)``: scalars, which start as lr and 1.
    """

    name = "asgd"
    hyper: Hypers = (LR, Hyper("lambd"), Hyper("alpha"), Hyper("t0"))
    states: States = (State("ax", exact=True),)
    scalars: Scalars = {"step": 0.0, "eta": "lr", "mu": 1.0}
    decay = COUPLED
    step_scale: StepScale = StepScale.ONE

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        c = Values(shrinkage=h.lambd * s.eta, eta=s.eta, mu=s.mu)
        s.eta = h.lr / (1 + h.lambd * h.lr * s.step) ** h.alpha
        s.mu = 1 / max(1.0, s.step - h.t0)
        return c

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        d = c.shrinkage * p + c.eta * g
        stepped = p - d
        return d, {"ax": stepped if c.mu == 1 else state["ax"] + c.mu * (stepped - state["ax"])}


class ASGD(FusedOptimizer):
    """Stochastic gradient descent that also averages the parameters, in the state ``ax``.

    ``p <- (1 - lambd eta) p - eta g``, ``ax <- ax + mu (p - ax)``, and then, for the next step,
    ``eta <- lr / (1 + lambd lr t)^alpha``, ``mu <- 1 / max(1, t - t0)``. The first step's eta is lr, and up to step
    ``t0 + 2`` the average is the parameter itself. It is never rounded to half precision, though parameters are.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor. As in torch, a change is felt one step later.
        lambd: How fast parameters shrink and eta falls; not negative.
        alpha: Power by which eta falls; not negative.
        t0: The step at which averaging starts.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.ASGD(model.parameters(), lr=1e-2, t0=1e4)

    Reference:
        Polyak and Juditsky, SIAM Journal on Control and Optimization 1992; the form of ``torch.optim.ASGD``.
    """

    rule: type[Rule] = ASGDRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lambd: float = 1e-4,
        alpha: float = 0.75,
        t0: float = 1e6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        *,
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
