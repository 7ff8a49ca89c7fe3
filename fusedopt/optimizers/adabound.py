"""AdaBound and AMSBound."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt import checks
from fusedopt.aliases import ParamGroup, ParamsT, ProcessGroup, Tensors, Values, is_group
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.adam import update_moments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, EPS, Hyper, Hypers, Rule, Scalars, State, States, bias_correction


class AdaBoundRule(Rule):
    """``d = clamp(sqrt(1-b2^t) / (1-b1^t) / (sqrt(w) + eps), lo, hi) m``.

    ``lo = f (1 - 1 / (gamma t + 1))``, ``hi = f (1 + 1 / (gamma t))``, ``f = final_lr / base_lr``: the
    published bounds divided by lr, which leaves lr to the engine.
    """

    name = "adabound"
    hyper: Hypers = (
        *BETAS,
        EPS,
        Hyper("final_lr"),
        Hyper("gamma", high=1.0, low_open=True, high_open=True),
        Hyper("base_lr", low_open=True),
    )
    states: States = (
        State("exp_avg"),
        State("exp_avg_sq", signed=False),
        State("max_exp_avg_sq", when="amsbound", signed=False),
    )
    scalars: Scalars = {"step": 0.0}

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        final, growth = h.final_lr / h.base_lr, h.gamma * s.step
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            scale=math.sqrt(bias_correction(h.beta2, s.step)) / bias_correction(h.beta1, s.step),
            low=final * (1 - 1 / (growth + 1)),
            high=final * (1 + 1 / growth),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        w, new = update_moments(g, state, c)
        return (c.scale / (w.sqrt() + c.eps)).clamp(c.low, c.high) * new["exp_avg"], new


class AdaBound(FusedOptimizer):
    """Adam whose elementwise rate is clamped to bounds that close in on SGD's.

    ``eta = clamp(lr sqrt(1-b2^t) / (1-b1^t) / (sqrt(v) + eps), lo, hi)``, ``p <- p - eta m`` with
    ``lo = f (1 - 1 / (gamma t + 1))``, ``hi = f (1 + 1 / (gamma t))``, ``f = final_lr lr / base_lr``.
    ``base_lr``, each group's lr at construction, is kept in the group, so that schedulers move the bounds
    and groups that are added later work.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        final_lr: The rate that the bounds approach, before scheduling.
        gamma: How fast they do, in (0, 1).
        eps: Added to the root of the second moment before bias correction.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        amsbound: Divide by the running maximum of the second moment.
        decoupled_weight_decay: Decay as AdamW does, ``p <- (1 - lr weight_decay) p``, instead.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.AdaBound(model.parameters(), lr=1e-3, final_lr=0.1)

    Reference:
        Luo et al., ICLR 2019, in the form of the authors' code (no ``1/sqrt(t)``).
    """

    rule: type[Rule] = AdaBoundRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        final_lr: float = 0.1,
        gamma: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsbound: bool = False,
        *,
        decoupled_weight_decay: bool = False,
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

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group; its ``base_lr`` is its lr, unless it says otherwise.

        Args:
            param_group: As in ``torch.optim``.

        Raises:
            ValueError: As at construction; also if lr is 0, which leaves no base to scale the bounds by.
        """
        if is_group(param_group):
            lr = checks.number(param_group.get("lr", self.defaults["lr"]), "lr", f" (group {len(self.param_groups)})")
            param_group.setdefault("base_lr", lr)
        super().add_param_group(param_group)
