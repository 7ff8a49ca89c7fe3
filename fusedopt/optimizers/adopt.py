"""ADOPT."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.aliases import ParamGroup, ParamsT, ProcessGroup, Tensors, Values, is_group
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, EPS, RULE, WEIGHT_DECAY, Hyper, Hypers, Rule, Scalars, State, States


class AdoptRule(Rule):
    """``d = m + decay p``, ``m <- b1 m + (1 - b1) clamp(g / max(sqrt(v), eps))``; the first step only sets v."""

    name = "adopt"
    hyper: Hypers = (
        WEIGHT_DECAY,
        *BETAS,
        EPS,
        Hyper("clip_exp"),
        Hyper("clips"),
        Hyper("decoupled", "decoupled_weight_decay"),
    )
    states: States = (State("exp_avg"), State("exp_avg_sq", signed=False))
    scalars: Scalars = {"step": 0.0}
    decay = RULE

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        is_first = s.step == 1
        clip = (s.step - 1) ** h.clip_exp if h.clips else math.inf
        return Values(
            one_minus_beta1=1 - h.beta1,
            keep_sq=1.0 if is_first else h.beta2,
            take_sq=1.0 if is_first else 1 - h.beta2,
            eps=h.eps,
            clip=0.0 if is_first else clip,
            coupled=0.0 if h.decoupled else h.weight_decay,
            decay=h.weight_decay if h.decoupled and not is_first else 0.0,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        g = g + c.coupled * p
        n = torch.clamp(g / state["exp_avg_sq"].sqrt().clamp(min=c.eps), -c.clip, c.clip)
        m = torch.lerp(state["exp_avg"], n, c.one_minus_beta1)
        return m + c.decay * p, {"exp_avg": m, "exp_avg_sq": c.keep_sq * state["exp_avg_sq"] + c.take_sq * (g * g)}


class ADOPT(FusedOptimizer):
    """Adam whose second moment does not have the gradient that it divides, so that it converges with any ``betas[1]``.

    ``n = clamp(g / max(sqrt(v), eps), -c, c)`` with ``c = (t-1)^clip_exp``, ``m <- b1 m + (1-b1) n``,
    ``p <- p - lr m``, ``v <- b2 v + (1-b2) g^2``; the first step does nothing but ``v <- g^2``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: The least that is divided by.
        clip_exp: The exponent with which normalised gradients are clipped; None for no clipping. The authors' is 0.25.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        decoupled_weight_decay: Decay as AdamW does, from the second step on.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.ADOPT(model.parameters(), lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True)

    Reference:
        Taniguchi et al., NeurIPS 2024, arXiv 2411.02853.
    """

    rule: type[Rule] = AdoptRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        clip_exp: float | None = 0.25,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
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
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        taken = {**locals(), "clip_exp": clip_exp or 0.0}
        super().__init__(params, **arguments(taken, clips=clip_exp is not None))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; see ``fusedopt.FusedOptimizer.add_param_group``."""
        if is_group(param_group) and "clip_exp" in param_group:
            exponent = param_group["clip_exp"]
            param_group.update(clip_exp=0.0 if exponent is None else exponent, clips=exponent is not None)
        super().add_param_group(param_group)
