"""ScheduleFreeAdamW and ScheduleFreeSGD: averages of iterates in the place of a schedule."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from fusedopt.aliases import Group, ParamGroup, ParamsT, ProcessGroup, States, Tensors, Values, is_group
from fusedopt.context import StepRequest
from fusedopt.forking import threads_that_exist
from fusedopt.interrupts import held_back
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import MASTER, Average, GradientNoise, Master, StateDtype
from fusedopt.rule import (
    EPS,
    LR,
    PARAM,
    RULE,
    WEIGHT_DECAY,
    Hyper,
    Hypers,
    Rule,
    Scalars,
    State,
    StepScale,
    bias_correction,
)
from fusedopt.rule import States as Specs
from fusedopt.scaling import Scaling
from fusedopt.stepper import Stepper

MODE = "train_mode"
SCHEDULE: Hypers = (Hyper("warmup_steps"), Hyper("r"), Hyper("weight_lr_power"))
SCALARS: Scalars = {"step": 0.0, "weight_sum": 0.0, "lr_max": 0.0}


def scheduled(h: Values, s: Values, beta: float) -> tuple[float, float, float]:
    """How far y goes towards z in a step, how far along its direction, and how far z does; advances the scalars."""
    lr = h.lr * min(s.step / h.warmup_steps, 1.0) if h.warmup_steps else h.lr
    s.lr_max = max(s.lr_max, lr)
    weight = s.step**h.r * s.lr_max**h.weight_lr_power
    s.weight_sum = s.weight_sum + weight
    share = weight / s.weight_sum if s.weight_sum else 0.0
    return share, lr * (1 - beta * (1 - share)), lr


class ScheduleFreeSGDRule(Rule):
    """``y <- y + c (z - y) - lr (1 - beta (1 - c)) u``, ``z <- z - lr u``, ``u = g + wd y``; z begins as y."""

    name = "schedulefreesgd"
    hyper: Hypers = (
        LR, WEIGHT_DECAY, Hyper("beta1", "momentum", low_open=True, high=1.0, high_open=True), *SCHEDULE
    )  # fmt: skip
    states: Specs = (State("z", init=PARAM, exact=True),)
    scalars: Scalars = SCALARS
    decay = RULE
    step_scale: StepScale = StepScale.ONE

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        share, along, lr = scheduled(h, s, h.beta1)
        return Values(share=share, along=along, lr=lr, decay=h.weight_decay)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        z, u = state["z"], g + c.decay * p
        return c.share * (p - z) + c.along * u, {"z": z - c.lr * u}


class ScheduleFreeAdamWRule(Rule):
    """``y <- y + c (z - y) - lr (1 - b1 (1 - c)) u``, ``z <- z - lr u``, with ``u = g / (sqrt(v) + eps) + wd y``."""

    name = "schedulefreeadamw"
    hyper: Hypers = (
        LR,
        WEIGHT_DECAY,
        Hyper("beta1", "betas", 0, low_open=True, high=1.0, high_open=True),
        Hyper("beta2", "betas", 1, high=1.0, high_open=True),
        EPS,
        *SCHEDULE,
    )
    states: Specs = (State("z", init=PARAM, exact=True), State("exp_avg_sq", signed=False))
    scalars: Scalars = SCALARS
    decay = RULE
    step_scale: StepScale = StepScale.ONE

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        share, along, lr = scheduled(h, s, h.beta1)
        return Values(
            share=share,
            along=along,
            lr=lr,
            decay=h.weight_decay,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            root_scale=1 / math.sqrt(bias_correction(h.beta2, s.step)),
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        z = state["z"]
        v = c.beta2 * state["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
        u = g / (c.root_scale * v.sqrt() + c.eps) + c.decay * p
        return c.share * (p - z) + c.along * u, {"z": z - c.lr * u, "exp_avg_sq": v}


class InterpolationRule(Rule):
    """``p <- p + weight (z - p)``, where the gradient is z."""

    name = "interpolation"
    hyper: Hypers = (Hyper("weight", low=-math.inf),)
    decay = RULE
    step_scale: StepScale = StepScale.ONE

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(weight=h.weight)

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        return c.weight * (p - g), {}


class ScheduleFree(FusedOptimizer):
    """What both have: parameters that are y in training, and x where the model is evaluated."""

    rules: tuple[type[Rule], ...] = (InterpolationRule,)

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters, in the mode of the others; see ``fusedopt.FusedOptimizer.add_param_group``."""
        if is_group(param_group) and self.param_groups:
            param_group.setdefault(MODE, self.param_groups[0][MODE])
        super().add_param_group(param_group)

    def train(self, mode: bool = True) -> None:
        """Make the parameters y, with which training goes on; those that are already, stay.

        Args:
            mode: False does what ``eval()`` does.
        """
        self._swap(mode)

    def eval(self) -> None:
        """Make the parameters x, with which the model is evaluated and saved; ``step()`` raises then."""
        self._swap(False)

    @torch.no_grad()
    def _swap(self, to_train: bool) -> None:
        """In one launch on each device. What was never stepped is both; what is given twice goes once."""
        with self._lock, threads_that_exist():
            swapped = [group for group in self.param_groups if group[MODE] != to_train]
            if not swapped:
                return
            super()._refuse_averaged("train() and eval()")
            groups: list[ParamGroup] = []
            states: States = {}
            seen: set[int] = set()
            for group in self.param_groups:  # all of them, so that messages count as the optimizer does
                aliases: list[Tensor] = []
                for p in group["params"]:
                    aliases.append(alias := p.detach())
                    state = self.state.get(p, {})
                    if group[MODE] != to_train and state.get("z") is not None and id(p) not in seen:
                        seen.add(id(p))
                        alias.grad_dtype = None  # of whatever dtype
                        alias.grad = state["z"]
                        states[alias] = state
                groups.append(_asking(group, aliases, to_train))
            whole = self._bring_up_to_date()
            context = replace(
                whole, rule=InterpolationRule, scope=InterpolationRule.scopes[0], param_groups=groups, state=states,
                process_group=None, statuses={}, retained=[],
            )  # fmt: skip
            with held_back():
                Stepper(context).step(StepRequest(Scaling(), increments_versions=self.increments_versions))
                for group in swapped:
                    group[MODE] = to_train
            torch.clear_autocast_cache()  # which has casts of what the parameters were

    def _refuse_averaged(self, what: str = "a step") -> None:
        super()._refuse_averaged(what)
        if what == "a step" and not all(group[MODE] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__} is in eval mode: its parameters are averages, from which it cannot step; call "
                "optimizer.train() before training goes on"
            )


def _asking(group: Group, params: list[Tensor], to_train: bool) -> ParamGroup:
    """A group that asks for what a swap does. Masters are swapped, too; what draws is rounded to nearest."""
    beta = group["betas"][0] if "betas" in group else group["momentum"]
    off = {"maximize": False, "differentiable": False, "foreach": None, "fused": None}
    kept = {MASTER: group[MASTER]} if group.get(MASTER) in ("fp32", "split") else {}
    return {"params": params, "lr": 1.0, "weight": 1 - beta if to_train else 1 - 1 / beta, **off, **kept}


class ScheduleFreeAdamW(ScheduleFree):
    """AdamW that needs no schedule: what is evaluated is an average of where it has been.

    Of a parameter there are z, which is stepped, x, the average of z, and between them y, of which gradients are taken:
    ``u = g / (sqrt(v / (1-b2^t)) + eps) + weight_decay y``, ``z <- z - lr u``, ``x <- (1-c) x + c z``,
    ``y = b1 x + (1-b1) z``; c is the share of this step in the sum of all weights ``t^r lr_max^weight_lr_power``, with
    the largest learning rate so far, and lr grows in ``warmup_steps`` steps. The parameter is y; ``eval()`` makes it x,
    ``train()`` y again, each in one launch. Call ``eval()`` before evaluating or saving, ``train()`` before going on.
    It begins in training mode, which before the first step is the same.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, larger than AdamW's; a float or a one-element tensor.
        betas: Where y is between z and x, in (0, 1), and the decay rate of the second moment, in [0, 1).
        eps: Added to the root of the bias-corrected second moment.
        weight_decay: Decay coefficient, of y.
        warmup_steps: Steps until lr is reached.
        r: Power of the step in the weights.
        weight_lr_power: Power of the largest learning rate in them.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.ScheduleFreeAdamW(model.parameters(), lr=0.0025, warmup_steps=100)
        >>> optimizer.eval()  # and model.eval(); then optimizer.train() and model.train()

    Reference:
        Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682.
    """

    rule: type[Rule] = ScheduleFreeAdamWRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
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
        super().__init__(params, **arguments(locals(), train_mode=True))


class ScheduleFreeSGD(ScheduleFree):
    """SGD that needs no schedule: what is evaluated is an average of where it has been.

    As ``fusedopt.ScheduleFreeAdamW`` with ``u = g + weight_decay y``.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate, larger than SGD's; a float or a one-element tensor.
        momentum: Where y is between z and x, in (0, 1).
        weight_decay: Decay coefficient, of y.
        warmup_steps: Steps until lr is reached.
        r: Power of the step in the weights.
        weight_lr_power: Power of the largest learning rate in them.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.ScheduleFreeSGD(model.parameters(), lr=1.0, warmup_steps=100)

    Reference:
        Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv 2405.15682.
    """

    rule: type[Rule] = ScheduleFreeSGDRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
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
        super().__init__(params, **arguments(locals(), train_mode=True))
