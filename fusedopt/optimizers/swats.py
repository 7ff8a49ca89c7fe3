"""SWATS: Adam until the rate of the SGD step that it amounts to settles, then SGD with that rate."""

from __future__ import annotations

import math

from torch import Tensor

from fusedopt.aliases import ParamGroup, ParamsT, ProcessGroup, Tensors, Values
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import BETAS, COUPLED, EPS, LR, Hyper, Hypers, Names, Rule, Scalars, State, States, bias_correction

RELATIVE = 1e-6  # part of the tolerance
ADAM, SGD, MIXED = "adam", "sgd", "mixed"


class SWATSRule(Rule):
    """Adam's step ``q = -lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)``, and its sums over the scope.

    The SGD step that is projected on it has the rate ``r = <q, q> / -<q, g>``; ``l <- b2 l + (1 - b2) r``. In the step
    after one in which ``l / (1 - b2^k)``, k steps of the scope, was positive and nearer to r than ``tol + 1e-6 |r|``,
    and always from then on: ``b <- b1 b + g``, ``p <- p - (1 - b1) rate b`` with that as rate, times what lr has become
    of what it was.
    """

    name = "swats"
    hyper: Hypers = (LR, *BETAS, EPS, Hyper("tol"))
    states: States = (State("exp_avg"), State("exp_avg_sq", when="second_moment", signed=False))
    scalars: Scalars = {
        "step": 0.0,
        "phase": 0.0,
        "rate": 0.0,
        "scope_step": 0.0,
        "adam_lr": 0.0,
        "sgd_lr": 0.0,
        "buffered": 0.0,
        "step_square": 0.0,
        "step_grad": 0.0,
    }
    shared: Names = ("phase", "rate", "scope_step", "adam_lr", "sgd_lr")
    epilogue: Names = ("step_square", "step_grad")
    scopes: Names = ("group", "all", "tensor")
    decay = COUPLED

    @staticmethod
    def decide(h: Values, s: Values) -> None:
        """What the last step's sums tell."""
        if s.phase or s.scope_step < 1 or s.step_grad == 0:
            return
        rate = s.step_square / s.step_grad
        s.rate = h.beta2 * s.rate + (1 - h.beta2) * rate
        settled = s.rate / bias_correction(h.beta2, s.scope_step)
        if s.scope_step > 1 and settled > 0 and abs(settled - rate) < h.tol + RELATIVE * abs(rate):
            s.phase, s.sgd_lr = 1.0, settled

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        SWATSRule.decide(h, s)
        s.scope_step += 1
        if s.phase:
            base = s.adam_lr if s.adam_lr > 0 else h.lr
            keep = h.beta1 if s.buffered else 0.0
            s.buffered = 1.0
            return Values(
                lr=h.lr,
                keep=keep,
                take=1.0,
                beta2=1.0,
                one_minus_beta2=0.0,
                scale=(1 - h.beta1) * s.sgd_lr / base if base > 0 else 0.0,
                root_scale=0.0,
                eps=1.0,
            )
        s.adam_lr = h.lr
        return Values(
            lr=h.lr,
            keep=h.beta1,
            take=1 - h.beta1,
            beta2=h.beta2,
            one_minus_beta2=1 - h.beta2,
            scale=math.sqrt(bias_correction(h.beta2, s.step)) / bias_correction(h.beta1, s.step),
            root_scale=1.0,
            eps=h.eps,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        m = c.keep * state["exp_avg"] + c.take * g
        if "exp_avg_sq" not in state:
            return c.scale * m, {"exp_avg": m}
        v = c.beta2 * state["exp_avg_sq"] + c.one_minus_beta2 * (g * g)
        return c.scale * m / (c.root_scale * v.sqrt() + c.eps), {"exp_avg": m, "exp_avg_sq": v}

    @staticmethod
    def conclude(p: Tensor, g: Tensor, d: Tensor, state: Tensors, c: Values) -> tuple[Tensor, ...]:
        q = c.lr * d
        return q * q, q * g


class SWATS(FusedOptimizer):
    """Adam, which switches to SGD with momentum once the learning rate that SGD would need has settled.

    ``q = -lr sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps)`` is Adam's step; the SGD step whose projection on it is q
    has the rate ``r = <q, q> / -<q, g>``, of which ``l <- b2 l + (1 - b2) r`` is kept. Once ``l / (1 - b2^k)`` is
    positive and within ``tol + 1e-6 |r|`` of r, after two steps at least, it is the rate of SGD from the next step on:
    ``b <- b1 b + g``, ``p <- p - (1 - b1) rate b``. Schedulers go on to scale it: it is multiplied by what lr has
    become of what it was when the rate was found. The device decides by itself.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Adam's learning rate; a float or a one-element tensor.
        betas: Decay rates of the first and second moment, each in [0, 1); the first is SGD's momentum.
        eps: Added to the root of the second moment, before its bias is corrected.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        tol: How near the rates have to be.
        scope: Over what the sums are taken, and what switches together: "group", "all" parameters, or "tensor".
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.SWATS(model.parameters(), lr=1e-3)
        >>> optimizer.phase_of(0)  # of the first group
        'adam'

    Reference:
        Keskar and Socher, arXiv 1712.07628.
    """

    rule: type[Rule] = SWATSRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        *,
        scope: str = "group",
        tol: float = 1e-9,
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
        super().__init__(params, **arguments(locals(), second_moment=True))

    def phase_of(self, group: int | ParamGroup | Tensor = 0) -> str:
        """The phase in which the next step of a group or parameter will be. Waits for the device.

        Args:
            group: A param group, its number, or a parameter.

        Returns:
            "adam", "sgd", or, of a group in scope "tensor", "mixed". What was never stepped is in "adam".

        Raises:
            KeyError: If it is not the optimizer's.
        """
        if isinstance(group, Tensor):
            of = [(p, g) for g in self.param_groups for p in g["params"] if p is group]
        else:
            chosen = [g for i, g in enumerate(self.param_groups) if i == group or g is group]
            of = [(p, g) for g in chosen for p in g["params"]]
        if not of:
            raise KeyError("not a param group, the number of one, or a parameter of this optimizer")
        phases = {self._phase(p, g) for p, g in of if self.scope == "tensor" or p in self.state} or {ADAM}
        return phases.pop() if len(phases) == 1 else MIXED

    def _phase(self, p: Tensor, group: ParamGroup) -> str:
        state = self.state.get(p, {})
        if "phase" not in state:
            return ADAM
        s = Values(**{name: float(state[name]) for name in self.rule.scalars})
        SWATSRule.decide(Values(**{h.name: float(h.of(group)) for h in SWATSRule.hyper}), s)
        return SGD if s.phase else ADAM

    def drop_moments(self) -> int:
        """Free the second moments of groups that have switched to SGD. Waits for the device.

        Returns:
            How many bytes were freed here.
        """
        freed = 0
        for group in self.param_groups:
            if not group["second_moment"] or self.phase_of(group) != SGD:
                continue
            group["second_moment"] = False
            for p in group["params"]:
                moment = self.state[p].pop("exp_avg_sq", None) if p in self.state else None
                freed += 0 if moment is None else moment.numel() * moment.element_size()
        return freed
