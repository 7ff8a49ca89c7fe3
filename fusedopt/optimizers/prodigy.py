"""Prodigy: Adam whose learning rate is an estimate of how far the parameters still have to go."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt.aliases import Group, ParamGroup, ParamsT, ProcessGroup, Tensors, Values, is_group
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import (
    BETAS,
    LR,
    PARAM,
    RULE,
    WEIGHT_DECAY,
    Hyper,
    Hypers,
    Names,
    Rule,
    Scalars,
    Score,
    State,
    States,
    bias_correction,
)
from fusedopt.sums import ALL

ROUNDING = 1e-7  # what float32 makes of d0 is nearer to it than that
COMMON = ("beta3", "d0", "d_coef", "growth_rate")  # of all groups that share a d


def rate(c: Values, m: Values) -> float:
    """The learning rate of a tensor's group."""
    return c.lr


class ProdigyRule(Rule):
    """Adam of ``d g`` with the rate ``d lr``; d is the largest so far of ``d_coef r / |s|_1``, sums over the scope.

    ``s <- b3 s + d/d0 d lr g``, ``r <- b3 r + d/d0 d lr <g, p0 - p>``, p0 being the parameter before its first step.
    Of other rates than the largest, tensors are stepped as Prodigy steps ``p / (lr / largest)``.
    """

    name = "prodigy"
    hyper: Hypers = (
        LR,
        *BETAS,
        Hyper("beta3", high=1.0, high_open=True),
        Hyper("eps", low_open=True),
        WEIGHT_DECAY,
        Hyper("decouple", high=1.0),
        Hyper("use_bias_correction", high=1.0),
        Hyper("safeguard_warmup", high=1.0),
        Hyper("d0", low_open=True),
        Hyper("d_coef", low_open=True),
        Hyper("growth_rate", low=1.0, infinite=True),
    )
    states: States = (
        State("s", exact=True),
        State("p0", init=PARAM, exact=True),
        State("exp_avg"),
        State("exp_avg_sq", signed=False),
    )
    scalars: Scalars = {"step": 0.0, "d": "d0", "d_max": "d0", "d_numerator": 0.0, "k": 0.0}
    shared: Names = ("d", "d_max", "d_numerator", "k")
    scopes: Names = ("all", "group", "tensor")
    decay = RULE
    measures: Names = ("along", "length")
    score: Score | None = rate

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        corrected, weight, moves = 1.0, s.d / h.d0 * s.d, h.lr > 0
        if h.use_bias_correction:
            corrected = math.sqrt(bias_correction(h.beta2, s.k + 1)) / bias_correction(h.beta1, s.k + 1)
        return Values(
            lr=h.lr,
            keep=h.beta1 if moves else 1.0,
            take=s.d * (1 - h.beta1),
            keep_square=h.beta2 if moves else 1.0,
            take_square=s.d * s.d * (1 - h.beta2),
            keep_sum=h.beta3 if moves else 1.0,
            take_sum=weight * (1.0 if h.safeguard_warmup else h.lr * corrected),
            coupled=0.0 if h.decouple else h.weight_decay,
            decoupled=h.weight_decay if h.decouple else 0.0,
            corrected=corrected,
            weight=weight,
            beta3=h.beta3,
            d0=h.d0,
            d_coef=h.d_coef,
            growth_rate=h.growth_rate,
            scale=s.d * corrected if moves else 0.0,
            eps=h.eps,
        )

    @staticmethod
    def advance(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensor]:
        """The gradient with coupled decay, or 0 of what does not move, and the new sum of gradients."""
        g = g + c.coupled * p if c.lr > 0 else torch.zeros_like(g)
        return g, c.keep_sum * state["s"] + c.take_sum * g

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        g, s = ProdigyRule.advance(p, g, state, c)
        return c.corrected * g * (state["p0"] - p), s.abs() if c.lr > 0 else torch.zeros_like(s)

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        if m.whole.length == 0:  # nothing has moved anything yet
            c.scale = 0.0
            return
        largest = c.lr if m.largest == -math.inf else m.largest
        s.d_numerator = c.beta3 * s.d_numerator + c.weight * largest * m.whole.along
        estimate = c.d_coef * s.d_numerator / m.whole.length
        d = max(s.d, estimate) if s.d <= c.d0 * (1 + ROUNDING) else s.d
        s.d_max = max(s.d_max, estimate)
        s.d = min(s.d_max, d * c.growth_rate)
        s.k = s.k + 1
        c.eps = s.d * c.eps

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        g, s = ProdigyRule.advance(p, g, state, c)
        m = c.keep * state["exp_avg"] + c.take * g
        v = c.keep_square * state["exp_avg_sq"] + c.take_square * (g * g)
        d = c.scale * (m / (v.sqrt() + c.eps) + c.decoupled * p)
        return d, {**state, "s": s, "exp_avg": m, "exp_avg_sq": v}


class Prodigy(FusedOptimizer):
    """Adam that finds its learning rate: leave ``lr`` at 1, and let schedulers scale it.

    d is an estimate, from below, of how far the parameters p0 before their first step are from a minimum.
    ``s <- b3 s + d/d0 d lr g`` and ``r <- b3 r + d/d0 d lr <g, p0 - p>``; then ``m <- b1 m + d (1-b1) g``,
    ``v <- b2 v + d^2 (1-b2) g^2``, and with ``D = max(d, d_coef r / |s|_1)``, sums over all parameters,
    ``p <- (1 - d lr weight_decay) p - d lr m / (sqrt(v) + D eps)``; then d is D, but for ``growth_rate``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: What d is multiplied by; a float or a one-element tensor. Groups where it is 0 neither move nor count. Where
            it differs otherwise, which the authors' package refuses, parameters are stepped as if they were divided
            by what their rate is of the largest, so that d is an estimate of what is to go in those units.
        betas: Decay rates of the first and second moment, each in [0, 1).
        beta3: Decay rate of s and r, in [0, 1); None for the root of ``betas[1]``.
        eps: Added to the root of the second moment, times d; above 0.
        weight_decay: Decay coefficient.
        decouple: Whether decay is multiplied by ``d lr``, and not added to the gradient as ``weight_decay * p``.
        use_bias_correction: Multiply lr by ``sqrt(1-b2^t) / (1-b1^t)`` in step t of the optimizer.
        safeguard_warmup: Leave lr out of s, so that d does not grow too far while it is warmed up.
        d0: What d is before the first step, above 0.
        d_coef: What estimates are multiplied by; the authors tune by it.
        growth_rate: By how much d may grow in a step, once it has left d0: from 1 to infinity, which is no limit.
        scope: What shares a d: "all" parameters, as the authors have it, or those of a "group", or a "tensor" alone.
            beta3, d0, d_coef and growth_rate must be the same wherever d is.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    ``optimizer.d`` is the estimate. The package's ``slice_p``, which looks at every n-th element only, is not here.
    With ``betas[0] = 0`` steps have the d of before, as in the paper; the package's have the new one.

    Raises:
        ValueError: If a hyperparameter is outside its domain, or groups that share a d differ in one that is d's.

    Example:
        >>> optimizer = fusedopt.Prodigy(model.parameters(), weight_decay=0.01)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        >>> float(optimizer.d)  # after some steps

    Reference:
        Mishchenko and Defazio, ICML 2024, arXiv 2306.06101; the form is that of their package prodigyopt.
    """

    rule: type[Rule] = ProdigyRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        *,
        scope: str = "all",
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
        super().__init__(params, **arguments(locals()))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; see ``fusedopt.FusedOptimizer.add_param_group``."""
        if is_group(param_group):
            if self.scope == ALL and self.param_groups:
                first = self.param_groups[0]
                if param_group.get("beta3", first["beta3"]) is None:
                    param_group["beta3"] = first["beta3"]
                for key in COMMON:
                    param_group.setdefault(key, first[key])
                _require_common([first, param_group])
            elif param_group.get("beta3", self.defaults["beta3"]) is None:
                param_group["beta3"] = _root(param_group.get("betas", self.defaults["betas"]))
        super().add_param_group(param_group)

    def _before_step(self) -> None:
        if self.scope == ALL:
            _require_common(self.param_groups)

    @property
    def d(self) -> Tensor:
        """The estimate that the next step multiplies by.

        Returns:
            A new one-element tensor on the parameters' device; reading its value waits for the device. In other scopes
            than "all" it is that of the first parameter that was stepped; ``optimizer.state[p]["d"]`` has each one's.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if "d" in self.state.get(p, {}):
                    return self.state[p]["d"].detach().clone()
        first = self.param_groups[0]
        return torch.tensor(float(first["d0"]), device=next((p.device for p in first["params"]), None))


def _root(betas: object) -> float:
    """Of the second; of what is no pair of betas anything, for a check is to say so."""
    try:
        return math.sqrt(float(betas[1]))  # pyright: ignore[reportIndexIssue, reportUnknownArgumentType]
    except (TypeError, ValueError, IndexError):
        return 0.0


def _require_common(groups: Sequence[Group]) -> None:
    """What is d's is the same in groups that share one; tensors are not looked at."""
    for key in COMMON:
        value = groups[0][key] if groups else None
        for group in groups[1:]:
            other = group[key]
            if other is not value and not isinstance(other, Tensor) and not isinstance(value, Tensor):
                if other != value:
                    raise ValueError(f"{key} is {value!r} in one group and {other!r} in another, which share a d")
