"""Prodigy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.aliases import Group, ParamGroup, ParamsT, ProcessGroup, Tensors, Values, is_group
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import (
    BETAS,
    EPS,
    LR,
    RULE,
    WEIGHT_DECAY,
    Hyper,
    Hypers,
    Names,
    Rule,
    Scalars,
    State,
    States,
    StepScale,
    bias_correction,
)

SINGLE = 1 + 1e-6  # a number and itself in float32 are nearer to each other than by this factor
COMMON = ("betas", "beta3", "d0", "d_coef", "growth_rate", "use_bias_correction")  # what one estimate is made with


class ProdigyRule(Rule):
    """``p <- p - d lr (m / (sqrt(v) + d eps) + wd p)``, where d estimates how far the solution is.

    ``m <- b1 m + (1-b1) d g``, ``v <- b2 v + (1-b2) d^2 g^2``, ``s <- b3 s + lr d^2 / d0 g``; over all parameters
    ``r <- b3 r + lr d^2 / d0 sum g (p0 - p)``, ``d <- max(d, coef r / sum |s|)``; the denominator has the new d.
    """

    name = "prodigy"
    hyper: Hypers = (
        LR,
        WEIGHT_DECAY,
        *BETAS,
        Hyper("beta3", high=1.0, high_open=True),
        EPS,
        Hyper("d0", low_open=True),
        Hyper("d_coef"),
        Hyper("growth_rate", low=1.0, unbounded=True),
        Hyper("decouple"),
        Hyper("use_bias_correction"),
        Hyper("safeguard_warmup"),
    )
    states: States = (
        State("s", exact=True),
        State("p0", exact=True),
        State("exp_avg"),
        State("exp_avg_sq", signed=False),
    )
    scalars: Scalars = {"step": 0.0, "d": "d0", "d_max": "d0", "d_numerator": 0.0}
    shared: Names = ("d", "d_max", "d_numerator")
    decay = RULE
    step_scale: StepScale = StepScale.ONE
    scopes: Names = ("all",)
    measures: Names = ("slope", "size")

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        scale = math.sqrt(bias_correction(h.beta2, s.step)) / bias_correction(h.beta1, s.step)
        d_lr = s.d * h.lr * (scale if h.use_bias_correction else 1.0)
        moves, beta3 = h.lr > 0, h.beta3 if h.beta3 > 0 else math.sqrt(h.beta2)
        return Values(
            is_new=1.0 if new_state else 0.0,
            moves=1.0 if moves else 0.0,
            coupled=0.0 if h.decouple else h.weight_decay,
            decay=h.weight_decay if h.decouple else 0.0,
            keep_m=h.beta1 if moves else 1.0,
            take_m=s.d * (1 - h.beta1) if moves else 0.0,
            keep_v=h.beta2 if moves else 1.0,
            take_v=s.d * s.d * (1 - h.beta2) if moves else 0.0,
            keep_s=beta3 if moves else 1.0,
            take_s=s.d / h.d0 * (s.d if h.safeguard_warmup else d_lr) if moves else 0.0,
            slope_scale=s.d / h.d0 * d_lr,
            beta3=beta3,
            d0=h.d0,
            d_coef=h.d_coef,
            growth_rate=h.growth_rate,
            eps=h.eps,
            d_lr=d_lr,
        )

    @staticmethod
    def measure(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        g = g + c.coupled * p
        start = p if c.is_new else state["p0"]
        return c.slope_scale * (g * (start - p)), c.moves * (c.keep_s * state["s"] + c.take_s * g).abs()

    @staticmethod
    def finish(c: Values, s: Values, m: Values) -> None:
        if m.whole.size > 0:
            s.d_numerator = c.beta3 * s.d_numerator + m.whole.slope
            estimate = c.d_coef * s.d_numerator / m.whole.size
            d = max(s.d, estimate) if s.d <= c.d0 * SINGLE else s.d
            s.d_max = max(s.d_max, estimate)
            s.d = min(s.d_max, d * c.growth_rate)
        else:  # nothing is known yet, and nothing moves
            c.d_lr = 0.0
        c.eps = s.d * c.eps

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        g = g + c.coupled * p
        m = c.keep_m * state["exp_avg"] + c.take_m * g
        v = c.keep_v * state["exp_avg_sq"] + c.take_v * (g * g)
        s = c.keep_s * state["s"] + c.take_s * g
        d = c.d_lr * (m / (v.sqrt() + c.eps) + c.decay * p)
        return d, {"s": s, "p0": p.clone() if c.is_new else state["p0"], "exp_avg": m, "exp_avg_sq": v}


class Prodigy(FusedOptimizer):
    """Adam that finds its learning rate: it estimates the distance d from where training began to a solution.

    With g the gradient, p0 the parameter before its first step, and sums over all parameters:
    ``m <- b1 m + (1-b1) d g``, ``v <- b2 v + (1-b2) d^2 g^2``, ``s <- b3 s + lr d^2 / d0 g``,
    ``r <- b3 r + lr d^2 / d0 sum g (p0 - p)``, ``d' = d_coef r / sum |s|``; d becomes the largest d' so far, in every
    step at most ``growth_rate`` times what it was, but when it leaves ``d0``; and
    ``p <- p - d lr (m / (sqrt(v) + d eps) + weight_decay p)``, in which eps alone is multiplied by the new d.

    The estimate is one for all groups: ``lr`` of a group is the same everywhere or 0, with which a group is not stepped
    and counts for nothing. It is read as ``optimizer.d``. ``slice_p`` of the authors' package, which keeps p0 and s of
    some elements only, is not there.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: What d is multiplied by, 1 unless for a schedule; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1).
        beta3: Decay rate of the estimate; None or 0 for the root of ``betas[1]``.
        eps: Added to the root of the second moment, times d.
        weight_decay: Decay coefficient.
        decouple: Decay as AdamW does; else ``weight_decay * p`` is added to the gradient.
        use_bias_correction: Multiply lr by Adam's ``sqrt(1-b2^t) / (1-b1^t)``.
        safeguard_warmup: Leave lr out of s, so that a warm-up does not make the estimate too large.
        d0: The first estimate.
        d_coef: What later ones are multiplied by; 0.5 or 2 instead of a smaller or larger learning rate.
        growth_rate: How much d may grow in a step.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain, or groups differ in what one estimate is made with.

    Example:
        >>> optimizer = fusedopt.Prodigy(model.parameters(), weight_decay=0.01)
        >>> float(optimizer.d)  # after a step

    Reference:
        Mishchenko and Defazio, "Prodigy: An expeditiously adaptive parameter-free learner", ICML 2024, arXiv
        2306.06101.
    """

    rule: type[Rule] = ProdigyRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
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
        taken = {**locals(), "beta3": beta3 or 0.0}
        super().__init__(params, **arguments(taken))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; see ``fusedopt.FusedOptimizer.add_param_group``."""
        if is_group(param_group) and param_group.get("beta3", 0.0) is None:
            param_group["beta3"] = 0.0
        super().add_param_group(param_group)
        try:
            self._check_common()
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def d(self) -> Tensor:
        """The estimate, a 0-dim tensor: ``d0`` before the first step. Reading its value waits for the device."""
        for group in self.param_groups:
            for p in group["params"]:
                if state := self.state.get(p):
                    return state["d"].detach().clone()
        return torch.tensor(float(self.param_groups[0]["d0"]))

    def _before_step(self) -> None:
        super()._before_step()
        self._check_common()

    def _check_common(self) -> None:
        """Groups agree on what is common to all."""
        lr: object = None
        for g, group in enumerate(self.param_groups):
            if isinstance(group["lr"], Tensor) or not group["lr"]:
                continue  # nobody waits for a device to compare
            if lr is not None and group["lr"] != lr:
                raise ValueError(
                    f"lr (group {g}) is {group['lr']!r}, and {lr!r} in a group before it; Prodigy has one estimate for "
                    "all groups, and a group's lr is that of the others or 0"
                )
            lr = group["lr"]
        first = self.param_groups[0]
        for g, group in enumerate(self.param_groups):
            for key in COMMON:
                if not _are_equal(group, first, key):
                    raise ValueError(
                        f"{key} (group {g}) is {group[key]!r}; it is common to all, and {first[key]!r} in 0"
                    )


def _are_equal(a: Group, b: Group, key: str) -> bool:
    """Whether groups say the same; tensors, which are not looked at, are the same ones."""
    x, y = a[key], b[key]
    return x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and bool(x == y))
