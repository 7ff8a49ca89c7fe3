"""NAdamW."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.adam import ratio
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, DECOUPLED, EPS, Hypers, Rule, Scalars, State, States, bias_correction


class NAdamWRule(Rule):
    """``d = n / (1 - b1^t) / (sqrt(v / (1-b2^t)) + eps)`` with ``n = b1 m + (1-b1) g``."""

    name = "nadamw"
    hyper: Hypers = (*BETAS, EPS)
    states: States = (State("exp_avg"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0}
    decay = DECOUPLED

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        scale = 1 / bias_correction(h.beta1, s.step)
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=h.beta1 * scale,
            g_scale=(1 - h.beta1) * scale,
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        return ratio(p, g, state, c)


class NAdamW(FusedOptimizer):
    """AdamW with Nesterov momentum, in the form of MLCommons and timm.

    ``p <- (1 - lr weight_decay) p - lr n / (1-b1^t) / (sqrt(v / (1-b2^t)) + eps)``
    with Adam's m and v, and ``n = b1 m + (1-b1) g``. For torch's NAdam with decoupled decay see
    ``NAdam(decoupled_weight_decay=True)``, which is another rule.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay coefficient, multiplied by ``lr``.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.NAdamW(model.parameters(), lr=1e-3)

    Reference:
        Choi et al. 2019, arXiv 1910.05446, table 1.
    """

    rule: type[Rule] = NAdamWRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
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
