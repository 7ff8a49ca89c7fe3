"""ReplicatedSGD: copies of a model that are drawn to their mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedopt import checks, memory, state_checks, storage
from fusedopt.aliases import Group, ParamsT, ProcessGroup, Tensors, Values
from fusedopt.context import Context, StepRequest
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.entropy_sgd import scoped
from fusedopt.optimizers.sgd import MOMENTUM, SGDRule
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.rule import COUPLED, PARAM, Hyper, Hypers, Rule, Scalars, State, States
from fusedopt.stepper import Stepper, Told

CENTER = "center"


class ReplicatedSGDRule(Rule):
    """SGD's direction, of ``g + gamma (p - center)``."""

    name = "replicatedsgd"
    hyper: Hypers = (*MOMENTUM, Hyper("gamma"))
    settings: Hypers = (Hyper("replicas", low=1.0, whole=True), Hyper("gamma0"), Hyper("gamma1"), Hyper("steps"))
    states: States = (*SGDRule.states, State(CENTER, init=PARAM, exact=True))
    scalars: Scalars = {"step": 0.0}
    decay = COUPLED

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        replicas = group["replicas"]
        if replicas > 1:
            if len({id(p) for p in group["params"]}) < len(group["params"]):
                return "a parameter is given twice, whose replicas have one mean"
            for i, p in enumerate(group["params"]):
                if not p.dim() or p.shape[0] != replicas:
                    return f"parameter {i} has shape {tuple(p.shape)}; dimension 0 must be the {int(replicas)} replicas"
        if group["differentiable"]:
            return "differentiable=True is not for replicas, whose mean no gradient goes through"
        return SGDRule.conflict(group)

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        c = SGDRule.prepare(h, s, new_state)
        c.gamma = h.gamma
        return c

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        center = {CENTER: state[CENTER]}
        buffers = {name: t for name, t in state.items() if name != CENTER}
        d, buffers = SGDRule.direction(p, g + c.gamma * (p - center[CENTER]), buffers, c)
        return d, {**buffers, **center}


class _Center(NamedTuple):
    """A parameter's center: where it is, and one replica's part of what was there; None if it was made for the step."""

    p: Tensor
    here: Tensor
    before: Tensor | None


class AroundCenters(Stepper):
    """Steps a ReplicatedSGD: finds the means of replicas, and how strongly they are drawn there."""

    def step(self, request: StepRequest) -> Told:
        """Do a step; see ``fusedopt.stepper.Stepper``."""
        self.check_settings()
        for group in self.context.param_groups:
            group["gamma"] = scoped(group, group["steps"]) if group["replicas"] > 1 else 0.0
        found: list[_Center] = []
        skipped = True
        try:
            self._find_centers(found)
            told = super().step(request)
            skipped = told.skipped
        finally:
            if skipped:
                self._put_back(found)
        if skipped:
            return told
        if request.skip_nonfinite or request.scaling.found_inf is not None:
            self._put_back_where_skipped(found)
        for group in self.context.param_groups:
            group["steps"] += 1
        return told

    def step_again_and_free(self, increments_versions: bool) -> bool:
        """The centers are to be found first."""
        return False

    @torch.no_grad()
    def _find_centers(self, found: list[_Center]) -> None:
        """Write the means of replicas to where the step reads them; found: gets those that were written."""
        spec = next(spec for spec in self.context.rule.states if spec.name == CENTER)
        for i, (p, group) in enumerate(self.context.everyone()):
            if p.grad is None or group["replicas"] == 1:
                continue
            state = self.context.state.get(p, {})
            is_new = state.get(CENTER) is None
            if is_new:
                made = storage.new_state(spec, p, group, None)
                self.context.state.setdefault(p, {}).update(made)
                state = self.context.state[p]
            if state[CENTER].shape != p.shape or not state[CENTER].is_floating_point():
                state_checks.state_tensors(self.context.rule, p, state, checks.labels(self.context.param_groups)[i])
            center = memory.local(state[CENTER])
            found.append(_Center(p, center, None if is_new else center[:1].clone()))
            center.copy_(mean(p, storage.values(p, group, state).to(center.dtype)))

    def _put_back(self, found: Sequence[_Center]) -> None:
        """Take back what was written for a step that did not happen."""
        for p, here, before in found:
            if before is not None:
                here.copy_(before)
                continue
            state = self.context.state.get(p, {})
            state.pop(CENTER, None)
            if not state:
                self.context.state.pop(p, None)

    @torch.no_grad()
    def _put_back_where_skipped(self, found: Sequence[_Center]) -> None:
        """The same where only a device knows whether it skipped the step; nobody waits to hear of it."""
        skipped = {status.skipped.device: status.skipped for status in self.context.statuses.values()}
        for _, here, before in found:
            if before is not None and here.device in skipped:
                here.copy_(torch.where(skipped[here.device] != 0, before, here[:1]))


def mean(p: Tensor, value: Tensor) -> Tensor:
    """The mean over dimension 0 of what a parameter stands for; of a DTensor, whose part here is given, the part here.

    Args:
        p: The parameter.
        value: What it stands for, as much of it as is here.

    Returns:
        As much of the mean as is here; dimension 0 has one element, if ranks do not have parts of it.
    """
    if not memory.is_dtensor(p):
        return value.mean(0, keepdim=True)
    from torch.distributed.tensor import Replicate

    whole = storage.spread(p, value, p.shape).mean(0, keepdim=True)
    assert memory.is_dtensor(whole)
    placements = [Replicate() if at.is_partial() or at.is_shard(0) else at for at in whole.placements]
    return memory.local(whole.redistribute(placements=placements))


class ReplicatedSGD(FusedOptimizer):
    """SGD of several copies of a model at once, that are drawn to their mean.

    Of each parameter there are ``replicas``, stacked along its dimension 0; ``w`` is one of them, ``m`` their mean
    before the step, g the gradient of its own loss: ``h = g + gamma (w - m)``, ``b <- momentum b + (1-dampening) h``
    (first step: ``b <- h``), ``w <- w - lr b``; with ``nesterov`` ``w <- w - lr (h + momentum b)``; without momentum
    ``w <- w - lr h``. In step t, from 0 on, ``gamma = gamma0 (1+gamma1)^t``: the replicas explore first, and come
    together then. Where ``lr gamma`` passes 1 they overshoot: without momentum it must stay below 2.

    The loss is the sum of those of the replicas. Clipping, noise and decay are as those of one model with all the
    parameters. ``center`` in the state is the mean before the last step, once for each replica;
    ``optimizer.mean_of(p)`` is that of now. A step that is skipped is not counted, unless only a device knows of it.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: Learning rate; a float or a one-element tensor.
        momentum: Momentum factor; 0 for none.
        dampening: Of the part in the momentum, from the second step on.
        weight_decay: L2 coefficient, added to the gradient as ``weight_decay * p``.
        nesterov: Nesterov momentum; needs momentum, and no dampening.
        replicas: How many there are: the size of dimension 0 of every parameter. 1: they are not stacked, as in SGD.
        gamma0: How strongly replicas are drawn to their mean, in the first step.
        gamma1: By which part of itself that grows with each step.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.
            It cannot be differentiable.

    Raises:
        ValueError: If a hyperparameter is outside its domain, or a parameter is no stack of so many.

    Example:
        >>> stacked, buffers = torch.func.stack_module_state(models)
        >>> optimizer = fusedopt.ReplicatedSGD(stacked.values(), lr=0.1, replicas=len(models))

    Reference:
        Pittorino et al., "Entropic gradient descent algorithms and wide flat minima", ICLR 2021, arXiv 2006.07897;
        the step is the gradient of the objective there, ``sum_a L(w_a) + gamma/2 sum_a |w_a - m|^2``.
    """

    rule: type[Rule] = ReplicatedSGDRule
    of_steps: tuple[str, ...] = ("gamma",)
    of_all: tuple[str, ...] = ("steps",)
    steps_together = "ReplicatedSGD finds the means of replicas before it steps"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        replicas: int = 1,
        gamma0: float = 1e-2,
        gamma1: float = 1e-4,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
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
        super().__init__(params, **arguments(locals(), steps=0, gamma=0.0))

    def _stepper_of(self, context: Context) -> Stepper:
        return AroundCenters(context)

    @torch.no_grad()
    def mean_of(self, p: Tensor) -> Tensor:
        """The mean of a parameter's replicas, of their masters if they have any.

        Args:
            p: A parameter of this optimizer.

        Returns:
            A new tensor of the shape of one replica, float32 or wider; of a DTensor what is on this rank.

        Raises:
            ValueError: If the parameter is not this optimizer's.
        """
        for group in self.param_groups:
            if any(q is p for q in group["params"]):
                value = storage.values(p, group, self.state.get(p, {}))
                value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
                return mean(p, value)[0] if group["replicas"] > 1 else value
        raise ValueError("the parameter is in none of this optimizer's groups")
