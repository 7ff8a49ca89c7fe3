"""EntropySGD: a gradient of local entropy, from Langevin steps around where the parameters are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar, overload

import torch
from torch import Tensor

from fusedopt import codecs, memory, storage
from fusedopt.aliases import Group, ParamGroup, ParamsT, ProcessGroup, Tensors, Values, is_group
from fusedopt.checks import LARGEST_FLOAT
from fusedopt.context import Context, StepRequest
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.options import LARGEST_SEED, NOISE, Average, GradientNoise, Master, StateDtype
from fusedopt.rule import COUPLED, LR, PARAM, Hyper, Hypers, Rule, Scalars, State, States, StepScale
from fusedopt.stepper import Stepper, Told

T = TypeVar("T")

LOOP = ("inner", "outer")  # where a group is: how many steps of this loop are done, and how many loops
INNER = State("inner_momentum_buffer", when="inner_momentum")
OUTER = State("momentum_buffer", when="momentum")
OF_STEP = ("gamma", "begins", "ends")  # what a group is told before each step


class EntropySGDRule(Rule):
    """``p <- p - eta (u + gamma (p - x))``, ``mu <- alpha mu + (1-alpha) p``; at a loop's end ``p <- x - lr w``.

    u is g, or with momentum this loop's buffer or Nesterov's; w the same of ``x - mu``, with a buffer of all loops. At
    a loop's beginning x and mu are p. Where lr is 0, so is eta.
    """

    name = "entropysgd"
    hyper: Hypers = (
        LR,
        Hyper("momentum"),
        Hyper("inner_momentum"),
        Hyper("nesterov", high=1.0),
        Hyper("inner_lr"),
        Hyper("alpha", high=1.0),
        *(Hyper(name) for name in OF_STEP),
    )
    settings: Hypers = (
        Hyper("L", low=1.0, whole=True),
        Hyper("gamma0"),
        Hyper("gamma1"),
        Hyper("inner_lr"),
        Hyper("noise"),
        Hyper("seed", high=LARGEST_SEED, whole=True),
        *(Hyper(name) for name in LOOP),
    )
    states: States = (
        State("anchor", init=PARAM, exact=True),
        State("inner_average", init=PARAM, exact=True),
        OUTER,
        INNER,
    )
    scalars: Scalars = {"step": 0.0}
    decay = COUPLED
    step_scale: StepScale = StepScale.ONE

    @classmethod
    def conflict(cls, group: Group) -> str | None:
        if variance(group) > LARGEST_FLOAT:
            return f"noise is {group['noise']!r}, too large for an inner_lr of {group['inner_lr']!r}"
        return None

    @staticmethod
    def prepare(h: Values, s: Values, new_state: bool) -> Values:
        return Values(
            lr=h.lr,
            inner_lr=h.inner_lr if h.lr else 0.0,
            momentum=h.momentum,
            inner_momentum=h.inner_momentum,
            nesterov=h.nesterov,
            gamma=h.gamma,
            one_minus_alpha=1 - h.alpha,
            begins=h.begins,
            ends=h.ends,
        )

    @staticmethod
    def direction(p: Tensor, g: Tensor, state: Tensors, c: Values) -> tuple[Tensor, Tensors]:
        new: Tensors = {}
        x, mu = (p.clone(), p) if c.begins else (state["anchor"], state["inner_average"])
        if INNER.name in state:
            b = g if c.begins else c.inner_momentum * state[INNER.name] + g
            new[INNER.name] = torch.zeros_like(b) if c.ends else b
            g = g + c.inner_momentum * b if c.nesterov else b
        d = c.inner_lr * (g + c.gamma * (p - x))
        mu = mu + c.one_minus_alpha * (p - d - mu)
        if OUTER.name in state:
            new[OUTER.name] = state[OUTER.name]
        if c.ends:
            w = x - mu
            if OUTER.name in state:
                new[OUTER.name] = b = c.momentum * state[OUTER.name] + w
                w = w + c.momentum * b if c.nesterov else b
            d = (p - x) + c.lr * w
            x = mu = p - d
        return d, {"anchor": x, "inner_average": mu, **new}


def variance(group: Group) -> float:
    """Of the noise beside a gradient, by which a step of a loop has ``sqrt(inner_lr) noise``."""
    inner_lr, noise = float(group["inner_lr"]), float(group["noise"])
    return noise * noise / inner_lr if inner_lr else 0.0


def scoped(group: Group, t: int) -> float:
    """How strongly parameters are drawn together: ``gamma0 (1 + gamma1)^t``."""
    gamma0, gamma1 = float(group["gamma0"]), float(group["gamma1"])
    try:
        gamma = gamma0 * (1 + gamma1) ** t if gamma0 else 0.0
    except OverflowError:
        gamma = math.inf
    if gamma > LARGEST_FLOAT:
        raise ValueError(f"gamma0 (1 + gamma1)^{t} is too large, where gamma0 is {gamma0!r} and gamma1 {gamma1!r}")
    return gamma


def length(groups: Sequence[Group]) -> int:
    """How many steps a loop has, in all groups."""
    lengths = {int(group["L"]) for group in groups}
    if len(lengths) > 1:
        raise ValueError(f"L is {' and '.join(map(str, sorted(lengths)))}; it must be the same in all groups")
    return lengths.pop()


class InLoops(Stepper):
    """Steps an EntropySGD: tells groups where in a loop they are, and goes on."""

    def step(self, request: StepRequest) -> Told:
        """Do a step; see ``fusedopt.stepper.Stepper``."""
        groups = self.context.param_groups
        self.check_settings()
        steps = length(groups)
        for group in groups:
            inner, eta = group["inner"], variance(group)
            group.update(gamma=scoped(group, group["outer"]), begins=not inner, ends=inner + 1 >= steps)
            group[NOISE] = GradientNoise(eta, 0.0, int(group["seed"])) if eta else None
        told = super().step(request)
        if told.skipped:
            return told
        self._begin_without()
        for group in groups:
            ended = group["ends"]
            group.update(inner=0 if ended else group["inner"] + 1, outer=group["outer"] + ended)
        return told

    @torch.no_grad()
    def _begin_without(self) -> None:
        """Where a loop begins, it does so for parameters without a gradient, too, whose steps come later."""
        if not any(group["begins"] for group in self.context.param_groups):
            return
        for p, group in self.context.everyone():
            if p.grad is not None or not (state := self.context.state.get(p)):
                continue
            for name in ("anchor", "inner_average"):
                if (kept := state.get(name)) is not None:
                    memory.local(kept).copy_(storage.values(p, group, state))
            if state.get(INNER.name) is not None:
                operand = storage.state_operand(INNER, group, state)
                operand.tensors[0].fill_(codecs.constant(0.0, operand.codec) if operand.codec.block > 1 else 0.0)

    def step_again_and_free(self, increments_versions: bool) -> bool:
        """Each step is another."""
        return False


class EntropySGD(FusedOptimizer):
    """Descent on the local entropy of the loss: towards where Langevin steps around the parameters were on average.

    One step is a loop of ``L`` steps from x, where the parameters are, each with a gradient g of its own and standard
    normal numbers n, ``p <- p - inner_lr (g + gamma (p - x)) - sqrt(inner_lr) noise n``,
    ``mu <- alpha mu + (1-alpha) p``. Then the parameters are ``x - lr (x - mu)``. In loop t, from 0 on,
    ``gamma = gamma0 (1+gamma1)^t``. With ``momentum`` a buffer is kept, ``b <- momentum b + x - mu``, whose step is
    along b, or with ``nesterov`` along ``x - mu + momentum b``; ``inner_momentum`` does the same to g, with a buffer
    that begins from 0 in each loop, and noise that is in g. The last step of a loop and what follows it are one launch.

    ``step(closure)`` does what is left of a loop, each step with a new call of the closure. ``step()`` does one step of
    it, with the gradients that there are; the loop ends with every ``L``-th. The parameters are between x and the
    next x until then; a state that is saved there goes on from there. A step that is skipped does not count, and is
    left to the next call; where only a device knows of it, it counts.

    A parameter that has no gradient in a loop's last step stays where it is, and the next loop is around there. With
    ``average``, the average is one of where all steps end, those inside of loops among them.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: How far a loop goes towards the average; a float or a one-element tensor. Where it is 0, nothing moves.
        momentum: Momentum factor of ``x - mu``; 0 for none.
        weight_decay: L2 coefficient, added to the gradients g as ``weight_decay * p``.
        nesterov: Nesterov momentum, of both.
        inner_momentum: Momentum factor of g inside of each loop, noise included; 0 for none.
        L: Steps of a loop.
        inner_lr: Their learning rate.
        gamma0: How strongly they are drawn to x, in the first loop.
        gamma1: By which part of itself that grows with each loop.
        alpha: How much of the average each of them leaves.
        noise: The factor of n; its square is the temperature. With ``inner_momentum`` it is up to
            ``1/(1-inner_momentum)`` times as large in the long run, since it is kept, too.
        seed: Of n, which is the same on every engine and for every way to shard.
        maximize, foreach, capturable, differentiable, fused, average, state_dtype, master, max_grad_norm,
            skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.EntropySGD(model.parameters(), L=20)
        >>> optimizer.step(closure)  # which zeroes gradients, takes the next batch, goes backward, returns the loss

    Reference:
        Chaudhari et al., "Entropy-SGD: Biasing gradient descent into wide valleys", ICLR 2017, arXiv 1611.01838,
        algorithm 1, with gamma in the learning rate; momentum as in the authors' code.
    """

    rule: type[Rule] = EntropySGDRule
    of_steps: tuple[str, ...] = (*OF_STEP, NOISE)
    of_all: tuple[str, ...] = LOOP
    steps_together = "EntropySGD counts the steps of loops for all parameters together"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0,
        nesterov: bool = True,
        *,
        inner_momentum: float = 0.0,
        L: int = 20,  # noqa: N803 - as in the paper
        inner_lr: float = 0.1,
        gamma0: float = 1e-2,
        gamma1: float = 0.0,
        alpha: float = 0.75,
        noise: float = 1e-4,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        average: Average | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        handles_amp: bool = True,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(locals(), **dict.fromkeys(LOOP, 0), **dict.fromkeys(OF_STEP, 0.0)))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters, where the others are in the loop; see ``fusedopt.FusedOptimizer``."""
        if is_group(param_group) and param_group.get(NOISE) is not None:
            raise ValueError(f"{NOISE} is not for EntropySGD, which has noise and seed")
        super().add_param_group(param_group)
        try:
            length(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], T]) -> T: ...
    def step(self, closure: Callable[[], T] | None = None) -> T | None:
        """Do what is left of a loop with a closure; without one, one step of it.

        Args:
            closure: Reevaluates the model, on the next batch, and returns the loss. It is called for each step.

        Returns:
            What the closure returned last.

        Raises:
            RuntimeError: As ``fusedopt.FusedOptimizer.step``.
        """
        if closure is None:
            return super().step()
        loss = None
        for _ in range(max(1, length(self.param_groups) - self.param_groups[0]["inner"])):
            loss = super().step(closure)
        return loss

    def _stepper_of(self, context: Context) -> Stepper:
        return InLoops(context)
