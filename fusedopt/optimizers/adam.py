"""Adam, AdamW and AMSGrad."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.aliases import Arguments, ParamsT, ProcessGroup, StateDict, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, EPS, Hypers, Rule, Scalars, State, States, bias_correction


def update_moments(g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
    """The Adam family's moments; returns the second moment that divides the step, and the new state."""
    m = torch.lerp(state["exp_avg"], g, c.one_minus_beta1)
    v = c.beta2 * state["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in state:
        new["max_exp_avg_sq"] = v = torch.maximum(state["max_exp_avg_sq"], v)
    return v, new


def ratio(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
    """The Adam family's direction, ``(m_scale m + g_scale g) / (root_scale sqrt(w) + eps)``, and the new state."""
    w, new = update_moments(g, state, c)
    return (c.m_scale * new["exp_avg"] + c.g_scale * g) / (c.root_scale * w.sqrt() + c.eps), new


class AdamRule(Rule):
    """``d = m / (1 - b1^t) / (sqrt(w) / sqrt(1 - b2^t) + eps)``, w the second moment or its running maximum."""

    name = "adam"
    hyper: Hypers = (*BETAS, EPS)
    states: States = (
        State("exp_avg"),
        State("exp_avg_sq", signed=False),
        State("max_exp_avg_sq", when="amsgrad", signed=False),
    )
    scalars: Scalars = {"step": 0.0}

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=1 / bias_correction(h.beta1, s.step),
            g_scale=0.0,
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        return ratio(p, g, state, c)


class AdamProductRule(AdamRule):
    """``d = m / (1 - prod b1) / (sqrt(w) / sqrt(1 - prod b2) + eps)``, over the betas of all steps.

    One minus a product is what is kept, ``c <- b c + (1 - b)``; what was not kept before was Adam's.
    """

    name = "adamproduct"
    scalars: Scalars = {"step": 0.0, "correction1": 0.0, "correction2": 0.0}

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        def advanced(correction: float, beta: float) -> float:
            before = bias_correction(beta, s.step - 1) if correction == 0 and s.step > 1 else correction
            return beta * before + (1 - beta)

        s.correction1, s.correction2 = advanced(s.correction1, h.beta1), advanced(s.correction2, h.beta2)
        return Values(
            one_minus_beta1=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            m_scale=1 / s.correction1,
            g_scale=0.0,
            root_scale=1 / math.sqrt(s.correction2),
            eps=h.eps,
        )


RULES: dict[str, type[Rule]] = {"power": AdamRule, "product": AdamProductRule}


def by_correction(taken: Arguments) -> Arguments:
    """The ``locals()`` of a class's ``__init__``, its ``bias_correction`` turned into the rule that has it."""
    form = taken.pop("bias_correction")
    if form not in RULES:
        raise ValueError(f"bias_correction is {form!r}; it must be 'power' or 'product'")
    return {**taken, "rule": RULES[form]}


class Adam(FusedOptimizer):
    """Adam, with L2 regularisation or decoupled weight decay, and AMSGrad.

    ``m <- b1 m + (1-b1) g``, ``v <- b2 v + (1-b2) g^2``,
    ``p <- p - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``;
    with ``amsgrad`` the running maximum of v (not bias-corrected, as in torch) takes v's place.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        amsgrad: Divide by the running maximum of the second moment.
        decoupled_weight_decay: Decay as AdamW does.
        bias_correction: "power" divides by ``1 - beta**t``, as torch does; "product" by one minus the product of the
            betas of all steps, which is right where they change.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.Adam(model.parameters(), lr=3e-4)

    Reference:
        Kingma and Ba, ICLR 2015; Reddi et al., ICLR 2018; betas of each step's own: Zou et al., CVPR 2019.
    """

    rule: type[Rule] = AdamRule
    rules: tuple[type[Rule], ...] = (AdamProductRule,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        average: Average | None = None,
        gradient_noise: GradientNoise | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        cautious_weight_decay: bool = False,
        bias_correction: str = "power",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(by_correction(locals())))


class AdamW(FusedOptimizer):
    """Adam with decoupled weight decay, and AMSGrad.

    ``p <- (1 - lr weight_decay) p``, ``m <- b1 m + (1-b1) g``, ``v <- b2 v + (1-b2) g^2``,
    ``p <- p - lr (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)``;
    with ``amsgrad`` the running maximum of v (not bias-corrected, as in torch) takes v's place.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay coefficient, multiplied by ``lr``.
        amsgrad: Divide by the running maximum of the second moment.
        bias_correction: "power" divides by ``1 - beta**t``, as torch does; "product" by one minus the product of the
            betas of all steps, which is right where they change.
        foreach, maximize, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            cautious_weight_decay, max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See
            ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.AdamW(model.parameters(), lr=3e-4, max_grad_norm=1.0)

    Reference:
        Loshchilov and Hutter, ICLR 2019.
    """

    rule: type[Rule] = AdamRule
    rules: tuple[type[Rule], ...] = (AdamProductRule,)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
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
        bias_correction: str = "power",
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(by_correction(locals()), decoupled_weight_decay=True))

    def __setstate__(self, state: StateDict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # whatever was loaded: Adam's groups say otherwise
            group["decoupled_weight_decay"] = True
