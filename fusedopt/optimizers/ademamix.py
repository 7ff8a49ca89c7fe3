"""AdEMAMix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.aliases import ParamGroup, ParamsT, ProcessGroup, Tensors, Values, is_group
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import DECOUPLED, EPS, THREE_BETAS, Hyper, Hypers, Rule, Scalars, State, States, bias_correction

WARMUPS = ("alpha_warmup", "beta3_warmup")


def inverse_log(beta: float) -> float:
    """To which half-lives are in proportion; 0 of a beta of 0."""
    return 1 / math.log(beta) if beta > 0 else 0.0


def warm_beta(start: float, end: float, share: float) -> float:
    """A beta on the way between two, whose half-life has gone a share of the way between theirs."""
    inverse = (1 - share) * inverse_log(start) + share * inverse_log(end)
    return math.exp(1 / inverse) if inverse else 0.0


class AdEMAMixRule(Rule):
    """``d = (m / (1 - b1^t) + a n) / (sqrt(v) / sqrt(1 - b2^t) + eps)``, with a slow average n of gradients."""

    name = "ademamix"
    hyper: Hypers = (*THREE_BETAS, EPS, Hyper("alpha"), *(Hyper(name) for name in WARMUPS))
    states: States = (State("exp_avg"), State("exp_avg_slow"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0}
    decay = DECOUPLED

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        is_warm = s.step >= h.beta3_warmup
        beta3 = h.beta3 if is_warm else warm_beta(h.beta1, h.beta3, s.step / h.beta3_warmup)
        return Values(
            one_minus_beta1=1 - h.beta1,
            one_minus_beta3=1 - beta3,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=1 / bias_correction(h.beta1, s.step),
            alpha=h.alpha if s.step >= h.alpha_warmup else h.alpha * (s.step / h.alpha_warmup),
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        m = torch.lerp(state["exp_avg"], g, c.one_minus_beta1)
        n = torch.lerp(state["exp_avg_slow"], g, c.one_minus_beta3)
        v = c.beta2 * state["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
        d = (c.m_scale * m + c.alpha * n) / (c.root_scale * v.sqrt() + c.eps)
        return d, {"exp_avg": m, "exp_avg_slow": n, "exp_avg_sq": v}


class AdEMAMix(FusedOptimizer):
    """AdamW with a second, slow average of the gradients.

    ``m <- b1 m + (1-b1) g``, ``n <- b3 n + (1-b3) g``, ``v <- b2 v + (1-b2) g^2``,
    ``p <- (1 - lr weight_decay) p - lr (m / (1-b1^t) + alpha n) / (sqrt(v / (1-b2^t)) + eps)``.
    In the first ``alpha_warmup`` steps alpha grows linearly from 0, in the first ``beta3_warmup`` the half-life of n
    from that of m.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first moment, the second, and the slow average, each in [0, 1).
        alpha: The weight of the slow average.
        beta3_warmup, alpha_warmup: Steps; None or 0 for none. The authors take the length of the training.
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay coefficient, multiplied by ``lr``.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.AdEMAMix(model.parameters(), alpha=5.0, beta3_warmup=steps, alpha_warmup=steps)

    Reference:
        Pagliardini, Ablin and Grangier, ICLR 2025, arXiv 2409.03137.
    """

    rule: type[Rule] = AdEMAMixRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 2.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
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
        taken = {**locals(), "beta3_warmup": beta3_warmup or 0.0, "alpha_warmup": alpha_warmup or 0.0}
        super().__init__(params, **arguments(taken))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; see ``fusedopt.FusedOptimizer.add_param_group``."""
        if is_group(param_group):
            param_group.update({name: 0.0 for name in WARMUPS if param_group.get(name, 0.0) is None})
        super().add_param_group(param_group)
