"""KoalaV and KoalaM: the loss as a measurement of a Kalman filter whose state are the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast, overload

import torch
from torch import Tensor

from fusedopt import checks, codecs, memory, noise, storage
from fusedopt.aliases import Arguments, Member, ParamGroup, ParamsT, ProcessGroup, is_group
from fusedopt.optimizer import FusedOptimizer, arguments
from fusedopt.optimizers.koala_rules import KoalaMRule, KoalaVRule
from fusedopt.options import Average, GradientNoise, Master, StateDtype
from fusedopt.ranks import Ranks, Reduction
from fusedopt.rule import Rule

T = TypeVar("T")

ONLINE = "online"
MEASURED = ("loss", "loss_square", "measured")


class MeasuresLoss(FusedOptimizer):
    """What both optimizers have: a step that is told the loss.

    Groups have it while they step, as ``loss``, ``loss_square`` and ``measured``; no checkpoint does.
    """

    of_steps: tuple[str, ...] = MEASURED
    of_all: tuple[str, ...] = MEASURED

    def __init__(self, params: ParamsT, defaults: ParamGroup, **more: object) -> None:
        defaults.update({"online": False, "loss": 0.0, "loss_square": 0.0, "measured": False})
        super().__init__(params, defaults, **cast("Arguments", more))

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; see ``fusedopt.FusedOptimizer.add_param_group``."""
        if is_group(param_group):
            if param_group.get("r", self.defaults["r"]) == ONLINE:
                param_group.update(r=1.0, online=True)
        super().add_param_group(param_group)

    @overload
    def step(
        self, closure: None = None, *, loss: float | Tensor | None = None, per_sample_loss: Tensor | None = None
    ) -> None: ...
    @overload
    def step(
        self, closure: Callable[[], T], *, loss: float | Tensor | None = None, per_sample_loss: Tensor | None = None
    ) -> T: ...
    def step(
        self,
        closure: Callable[[], T] | None = None,
        *,
        loss: float | Tensor | None = None,
        per_sample_loss: Tensor | None = None,
    ) -> T | None:
        """Do one step.

        Args:
            closure: Reevaluates the model and returns the loss, which is taken where ``loss`` is not given.
            loss: The mean over the batch whose gradients there are, without the scale of a GradScaler; a number or a
                one-element tensor, which is not waited for. All ranks must be given the same. It may be left out where
                the learning rate is 0; nothing is measured then.
            per_sample_loss: The losses of the samples, of any shape. ``r="online"`` needs them; their mean is the loss
                where none is given.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If there is no loss.
            TypeError: If it is no number.
            RuntimeError: As ``fusedopt.FusedOptimizer.step``.
        """
        returned = None
        if closure is not None:
            self._before_closure()
            with torch.enable_grad():
                returned = closure()
        of_closure = loss is None and per_sample_loss is None
        self._take(returned if of_closure else loss, per_sample_loss)
        super().step()
        if self.param_groups[0]["measured"]:
            self._after_step()
        return returned

    def _before_closure(self) -> None:
        """What is to be done before the model is evaluated."""

    def _after_step(self) -> None:
        """What is to be done after a step that measured something."""

    @torch.no_grad()
    def _take(self, loss: object, samples: Tensor | None) -> None:
        """Put a step's measurement into the groups."""
        if isinstance(loss, Tensor) and loss.numel() > 1 and samples is None:
            loss, samples = None, loss
        if samples is not None:
            checks.samples(samples)
            samples = samples.detach().double()
            loss = samples.mean() if loss is None else loss
        if loss is not None:
            checks.one_number(loss, "loss")
            if samples is None and any(group["online"] for group in self.param_groups):
                raise ValueError("r='online' needs per_sample_loss, the losses of the samples")
        elif any(float(group["lr"]) for group in self.param_groups):
            raise ValueError(f"{type(self).__name__} measures the loss; give it to step(loss=...) or as a closure's")
        of_groups = [self.param_groups[0][key] for key in ("loss", "loss_square")]
        if not all(isinstance(value, Tensor) for value in of_groups):
            device = next(p.device for group in self.param_groups for p in group["params"])
            wide = torch.float32 if device.type == "mps" else torch.float64
            of_groups = [torch.zeros((), dtype=wide, device=device) for _ in of_groups]
        _put(of_groups[0], loss)
        _put(of_groups[1], None if samples is None else samples.square().mean())
        for group in self.param_groups:
            group.update(loss=of_groups[0], loss_square=of_groups[1], measured=loss is not None)


def _put(into: Tensor, value: object) -> None:
    """A number into a tensor, without waiting for either's device; None is 0."""
    if isinstance(value, Tensor):
        into.copy_(value.detach().reshape(()), non_blocking=True)
    else:
        into.fill_(0.0 if value is None else checks.number(value, "loss", ""))


class KoalaV(MeasuresLoss):
    """KOALA-V: stochastic gradient descent whose step is the gain of a Kalman filter that measures the loss.

    One variance s is that of all parameters; ``h = g + weight_decay p`` and ``S = s |h|^2 + r`` are those of a tensor:
    ``s <- s + q``, ``p <- p - lr (s / S) (loss + weight_decay |p|^2 / 2) h``, and
    ``s <- s - s^2 max(|h|^2 / S)`` over all tensors. Those whose gradient is shorter than 1e-9 are left out. The loss
    is measured against 0: what it can never be below is to be taken off it.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: How much of the loss a step is to take away; a float or a one-element tensor.
        sigma: The variance of the parameters before the first step.
        q: What is added to it in each step.
        r: The variance of the measurement; "online" for ``0.9 r + 0.1 mean(loss^2)`` over the samples, from 1 on.
        weight_decay: L2 coefficient; it is part of the loss that is measured.
        match_reference: Step along g in place of h, as the authors' code does.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.KoalaV(model.parameters())
        >>> optimizer.step(loss=loss)

    Reference:
        Davtyan et al., AAAI 2022, arXiv 2107.03331.
    """

    rule: type[Rule] = KoalaVRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        sigma: float = 0.1,
        q: float = 1.0,
        r: float | str = 1.0,
        weight_decay: float = 0,
        *,
        match_reference: bool = False,
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


class KoalaM(MeasuresLoss):
    """KOALA-M: KOALA-V with a velocity of the parameters, whose variance is estimated as well.

    ``predict()`` before each forward pass moves the parameters along their velocities, ``p <- p + u``, ``u <- a u``, so
    that the gradients are those of where they are expected; with a closure, the step does so by itself. The step then
    corrects both, ``p <- p - lr P00 k h``, ``u <- u - lr P10 k h``, with ``h = g + weight_decay p`` and
    ``k = (loss + weight_decay |p|^2 / 2) / (P00 |h|^2 + r)`` of a tensor; ``KoalaMRule`` has the covariance P.
    Where the parameters drift from their average ``e <- 0.9 e + 0.1 p``, their variance grows by more.

    Args:
        params: Parameters, (name, parameter) pairs, or dicts of param groups.
        lr: How much of the loss a step is to take away; a float or a one-element tensor.
        sw, sv: The variances of parameters and velocities before the first step.
        a: How much of the velocity a step keeps.
        q: What is added to the parameters' variance in the first step; then ``q <- 0.9 q + 0.1 drift``, with the
            distance of parameters and averages, over their number, as drift.
        qv: What is added to the velocities' variance in each step.
        r: The variance of the measurement; "online" for ``0.9 r + 0.1 mean(loss^2)`` over the samples, from 1 on.
        weight_decay: L2 coefficient; it is part of the loss that is measured.
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, state_dtype, master,
            max_grad_norm, skip_nonfinite, process_group, handles_amp, engine: See ``fusedopt.FusedOptimizer``.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.KoalaM(model.parameters())
        >>> optimizer.predict()
        >>> loss = criterion(model(x), y)
        >>> loss.backward()
        >>> optimizer.step(loss=loss)

    Reference:
        Davtyan et al., AAAI 2022, arXiv 2107.03331.
    """

    rule: type[Rule] = KoalaMRule
    of_all: tuple[str, ...] = (*MEASURED, "drift", "predictions", "predicted")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        sw: float = 0.1,
        sv: float = 0.1,
        a: float = 0.9,
        q: float = 1e-2,
        qv: float = 1e-2,
        r: float | str = 1.0,
        weight_decay: float = 0,
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
        own = arguments(locals())
        own["defaults"].update({"drift": 0.0, "predictions": 0, "predicted": False})
        super().__init__(params, **own)

    @torch.no_grad()
    def predict(self) -> None:
        """Move the parameters along their velocities; to be called before each forward pass.

        Waits for no device. All ranks must call it.

        Raises:
            RuntimeError: If they are predicted already, or hold their averages.
        """
        if self.param_groups[0]["predicted"]:
            raise RuntimeError("predict() was called twice without a step between")
        self._refuse_averaged()
        everyone = self._bring_up_to_date().everyone()
        drift = self._drift(everyone)
        kept = self.param_groups[0]["drift"]
        drift = kept.copy_(drift) if isinstance(kept, Tensor) else drift
        for i, (p, group) in enumerate(everyone):
            if "velocity" in self.state.get(p, {}):
                self._move(i, p, group)
        for group in self.param_groups:
            group.update(drift=drift, predictions=group["predictions"] + 1, predicted=True)

    def _move(self, i: int, p: Tensor, group: ParamGroup) -> None:
        """Move a parameter along its velocity."""
        state, (spec, _) = self.state[p], self.rule.states
        stored = storage.param_operand(p, group, state), storage.state_operand(spec, group, state)
        wide = torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32
        values, velocity = (codecs.decode(operand, wide) for operand in stored)
        for operand, now in zip(stored, (values + velocity, velocity * float(group["a"])), strict=True):
            words = None
            if operand.codec.draws:
                step = int(group["predictions"])
                words = noise.rounding(self._context, i, p, group, operand.name, step, noise.PREDICTED)
            codecs.encode(operand, now, words)

    def _drift(self, everyone: list[Member]) -> Tensor:
        """``|e - p|`` over all parameters of all ranks, divided by how many numbers they are."""
        params = [p for p, _ in everyone]
        device, ranks = params[0].device, Ranks(params, self.process_group)
        wide = torch.float32 if device.type == "mps" else torch.float64
        sums = {reduction: torch.zeros(2, dtype=wide, device=device) for reduction in ranks.reductions}
        for p, group in everyone:
            state = self.state.get(p, {})
            here, average = storage.values(p, group, state), state.get("average")
            apart = here if average is None else memory.local(average) - here
            apart = torch.view_as_real(apart.resolve_conj()) if apart.is_complex() else apart
            both = sums[Reduction.of(p)]
            both[0] += torch.linalg.vector_norm(apart, dtype=wide).square().to(device, non_blocking=True)
            both[1] += here.numel()
        total = ranks.sum(sums.items())
        return total[0].sqrt() / total[1].clamp(min=1)

    def _before_closure(self) -> None:
        if not self.param_groups[0]["predicted"]:
            self.predict()

    def _take(self, loss: object, samples: Tensor | None) -> None:
        if not self.param_groups[0]["predicted"] and (loss is not None or samples is not None):
            raise RuntimeError("predict() must be called before the forward pass whose loss is measured")
        super()._take(loss, samples)

    def _after_step(self) -> None:
        for group in self.param_groups:
            group["predicted"] = False
