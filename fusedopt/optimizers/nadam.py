"""NAdam."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.aliases import ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.adam import ratio
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, EPS, Hyper, Hypers, Rule, Scalars, State, States, bias_correction


class NAdamRule(Rule):
    """``d = [(1-mu_t) / (1-P_t) g + mu_{t+1} / (1 - P_t mu_{t+1}) m] / (sqrt(v / (1-b2^t)) + eps)``.

    ``mu_t = b1 (1 - 0.96^(t psi) / 2)``; ``P_t``, the product of all mu so far, is a state.
    """

    name = "nadam"
    hyper: Hypers = (*BETAS, EPS, Hyper("momentum_decay"))
    states: States = (State("exp_avg"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0, "mu_product": 1.0}

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        mu, mu_next = (h.beta1 * (1 - 0.5 * 0.96 ** (t * h.momentum_decay)) for t in (s.step, s.step + 1))
        s.mu_product *= mu
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=mu_next / (1 - s.mu_product * mu_next),
            g_scale=(1 - mu) / (1 - s.mu_product),
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        return ratio(p, g, state, c)


class NAdam(FusedOptimizer):
    """Adam with Nesterov momentum, in torch's form.

    ``p <- p - lr [(1-mu_t) / (1-P_t) g + mu_{t+1} / (1 - P_t mu_{t+1}) m] / (sqrt(v / (1-b2^t)) + eps)``
    with Adam's m and v, ``mu_t = b1 (1 - 0.96^(t momentum_decay) / 2)`` and ``P_t`` the product of the mu.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        momentum_decay: How fast ``mu_t`` approaches ``b1``; not negative.
        decoupled_weight_decay: Decay as AdamW does, ``p <- (1 - lr weight_decay) p``, instead.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.NAdam(model.parameters(), lr=2e-3)

    Reference:
        Dozat, ICLR 2016 workshop; the form of ``torch.optim.NAdam``.
    """

    rule: type[Rule] = NAdamRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
