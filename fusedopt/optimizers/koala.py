"""KoalaV and KoalaM: the loss as a measurement of a Kalman filter whose state are the parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks, memory
from fusedopt.optimizer import FusedOptimizer, ParamsT, ProcessGroup, arguments
from fusedopt.options import Average, GradientNoise
from fusedopt.ranks import Ranks, Reduction
from fusedopt.rule import LR, RULE, WEIGHT_DECAY, Hyper, Rule, State

ONLINE = "online"
SHORTEST = 1e-9  # a tensor whose gradient is shorter is left out
NOISE = (Hyper("r"), Hyper("online", high=1.0))
MEASUREMENT = (Hyper("loss", low=-math.inf), Hyper("loss_square"), Hyper("measured", high=1.0))


class Koala(Rule):
    """What both are: ``h = g + wd p`` is the derivative by a tensor of a loss that was measured with noise R.

    The variance P of parameters makes a gain of ``P / S``, with ``S = P |h|^2 + R``.
    """

    decay = RULE
    scopes = ("all",)
    measures = ("grad", "slope", "param")

    @staticmethod
    def measure(p, g, state, c):
        h = g + c.weight_decay * p
        return g * g, h * h, p * p

    @staticmethod
    def residual(m: SimpleNamespace, c: SimpleNamespace, variance: float) -> float:
        """What multiplies a variance to a gain: ``(loss + wd |p|^2 / 2) / S``; 0 of what is left out."""
        S = variance * m.slope + c.noise
        return (c.loss + 0.5 * c.weight_decay * m.param) / S if m.grad >= SHORTEST**2 and S > 0 else 0.0

    @staticmethod
    def noise_after(h: SimpleNamespace, noise: float) -> float:
        """That of the measurement after this step: fixed, or a running mean of the losses' squares."""
        if not h.online:
            return h.r
        return 0.9 * noise + 0.1 * h.loss_square if h.measured else noise


def information(m: SimpleNamespace, variance: float, noise: float) -> float:
    """``|h|^2 / S`` of a tensor; 0 of what is left out."""
    S = variance * m.slope + noise
    return m.slope / S if m.grad >= SHORTEST**2 and S > 0 else 0.0


def by_sigma(c: SimpleNamespace, m: SimpleNamespace) -> float:
    """What the tensor tells that tells most is what the variance shrinks by: KoalaV's score."""
    return information(m, c.sigma, c.noise)


def by_covariance(c: SimpleNamespace, m: SimpleNamespace) -> float:
    """KoalaM's."""
    return information(m, c.p00, c.noise)


class KoalaVRule(Koala):
    """``s <- s + q``, ``p <- p - lr s / S (loss + wd |p|^2 / 2) h``, ``s <- s - s^2 max |h|^2 / S`` over all tensors.

    With ``match_reference`` the step is along g, as in the authors' code.
    """

    name = "koalav"
    hyper = (WEIGHT_DECAY, Hyper("q"), *NOISE, Hyper("match_reference", high=1.0), *MEASUREMENT)
    settings = (Hyper("sigma"),)
    scalars = {"step": 0.0, "sigma": "sigma", "noise": "r"}
    shared = ("sigma", "noise")
    score = by_sigma

    @staticmethod
    def prepare(h, s, new_state):
        if h.measured:
            s.sigma = s.sigma + h.q
        s.noise = Koala.noise_after(h, s.noise)
        return SimpleNamespace(
            weight_decay=h.weight_decay,
            sigma=s.sigma,
            noise=s.noise,
            loss=h.loss,
            measured=h.measured,
            gain=0.0,
            decay=0.0 if h.match_reference else h.weight_decay,
        )

    @staticmethod
    def finish(c, s, m):
        if not c.measured:
            return
        c.gain = c.sigma * Koala.residual(m, c, c.sigma)
        c.decay = c.decay * c.gain
        if m.largest > 0:
            s.sigma = c.sigma * (1 - c.sigma * m.largest)

    @staticmethod
    def direction(p, g, state, c):
        return c.gain * g + c.decay * p, {}


class KoalaMRule(Koala):
    """The same with a velocity u, and P of 2 by 2 with what both have in common.

    Predicted, ``p <- p + u``, ``u <- a u`` beforehand: ``qw <- 0.9 qw + 0.1 drift`` and
    ``P <- F P F' + diag(qw, qv)``, ``F = (1 1; 0 a)``. Then, with ``k = (loss + wd |p|^2 / 2) / S``:
    ``p <- p - lr P00 k h``, ``u <- u - lr P10 k h``, ``e <- 0.9 e + 0.1 p``, and
    ``P <- P - max |h|^2 / S P[:,0] P[:,0]'`` over all tensors.
    """

    name = "koalam"
    hyper = (LR, WEIGHT_DECAY, Hyper("a"), Hyper("qv"), *NOISE, *MEASUREMENT, Hyper("drift"), Hyper("predictions"))
    settings = (Hyper("sw"), Hyper("sv"), Hyper("q"))
    states = (State("velocity"), State("average"))
    scalars = {"step": 0.0, "p00": "sw", "p10": 0.0, "p11": "sv", "qw": "q", "noise": "r", "predictions": 0.0}
    shared = ("p00", "p10", "p11", "qw", "noise", "predictions")
    score = by_covariance

    @staticmethod
    def prepare(h, s, new_state):
        for _ in range(2):  # one, or two after steps that were skipped, until all are done
            if s.predictions >= h.predictions:
                break
            s.predictions += 1
            s.qw = 0.9 * s.qw + 0.1 * h.drift
            s.p00 = s.p00 + 2 * s.p10 + s.p11 + s.qw
            s.p10 = h.a * (s.p10 + s.p11)
            s.p11 = h.a * h.a * s.p11 + h.qv
        s.noise = Koala.noise_after(h, s.noise)
        return SimpleNamespace(
            lr=h.lr,
            weight_decay=h.weight_decay,
            p00=s.p00,
            p10=s.p10,
            p11=s.p11,
            noise=s.noise,
            loss=h.loss,
            measured=h.measured,
            gain=0.0,
            velocity_gain=0.0,
            follow=0.0,
        )

    @staticmethod
    def finish(c, s, m):
        if not c.measured:
            return
        k = Koala.residual(m, c, c.p00)
        c.gain, c.velocity_gain = c.p00 * k, c.lr * c.p10 * k
        c.follow = 0.1 if m.grad >= SHORTEST**2 else 0.0
        if m.largest > 0:
            s.p00 = c.p00 * (1 - m.largest * c.p00)
            s.p10 = c.p10 * (1 - m.largest * c.p00)
            s.p11 = c.p11 - m.largest * c.p10 * c.p10

    @staticmethod
    def direction(p, g, state, c):
        h = g + c.weight_decay * p
        d, e = c.gain * h, state["average"]
        return d, {"velocity": state["velocity"] - c.velocity_gain * h, "average": e + c.follow * (p - c.lr * d - e)}


class MeasuresLoss(FusedOptimizer):
    """What both optimizers have: a step that is told the loss.

    Groups have it while they step, as ``loss``, ``loss_square`` and ``measured``; no checkpoint does.
    """

    _of_steps = ("loss", "loss_square", "measured")
    _of_all: tuple[str, ...] = ()  # keys that are the same in all groups

    def __init__(self, params: ParamsT, **more: Any) -> None:
        more["defaults"].update({"online": False, "loss": 0.0, "loss_square": 0.0, "measured": False})
        super().__init__(params, **more)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see :meth:`fusedopt.FusedOptimizer.add_param_group`."""
        if isinstance(param_group, dict):
            if param_group.get("r", self.defaults["r"]) == ONLINE:
                param_group.update(r=1.0, online=True)
            for group in self.param_groups[:1]:
                param_group.update({key: group[key] for key in (*self._of_steps, *self._of_all)})
        super().add_param_group(param_group)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        loss: float | Tensor | None = None,
        per_sample_loss: Tensor | None = None,
    ) -> Any:
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
            RuntimeError: As :meth:`fusedopt.FusedOptimizer.step`.
        """
        returned = None
        if closure is not None:
            self._before_closure()
            with torch.enable_grad():
                returned = closure()
            loss = returned if loss is None and per_sample_loss is None else loss
        self._take(loss, per_sample_loss)
        super().step()
        if self.param_groups[0]["measured"]:
            self._after_step()
        return returned

    def _before_closure(self) -> None:
        """What is to be done before the model is evaluated."""

    def _after_step(self) -> None:
        """What is to be done after a step that measured something."""

    @torch.no_grad()
    def _take(self, loss: Any, samples: Any) -> None:
        """Put a step's measurement into the groups."""
        if isinstance(loss, Tensor) and loss.numel() > 1 and samples is None:
            loss, samples = None, loss
        if samples is not None:
            if not isinstance(samples, Tensor) or not samples.numel() or not samples.is_floating_point():
                raise TypeError(f"per_sample_loss is {samples!r}; it must be a floating point tensor with elements")
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

    def state_dict(self) -> dict[str, Any]:
        """The state; see :meth:`fusedopt.FusedOptimizer.state_dict`."""
        saved = super().state_dict()
        for group in saved.get("param_groups", ()):
            for key in self._of_steps:
                group.pop(key, None)
        return saved


def _put(into: Tensor, value: float | Tensor | None) -> None:
    """A number into a tensor, without waiting for either's device; None is 0."""
    if isinstance(value, Tensor):
        into.copy_(value.detach().reshape(()), non_blocking=True)
    else:
        into.fill_(0.0 if value is None else float(value))


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
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, max_grad_norm, skip_nonfinite,
            process_group, engine: See :class:`fusedopt.FusedOptimizer`.

    Raises:
        ValueError: If a hyperparameter is outside its domain.

    Example:
        >>> optimizer = fusedopt.KoalaV(model.parameters())
        >>> optimizer.step(loss=loss)

    Reference:
        Davtyan et al., AAAI 2022, arXiv 2107.03331.
    """

    rule = KoalaVRule

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
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
        engine: str = "auto",
    ) -> None:
        super().__init__(params, **arguments(locals()))


class KoalaM(MeasuresLoss):
    """KOALA-M: KOALA-V with a velocity of the parameters, whose variance is estimated as well.

    ``predict()`` before each forward pass moves the parameters along their velocities, ``p <- p + u``, ``u <- a u``, so
    that the gradients are those of where they are expected; with a closure, the step does so by itself. The step then
    corrects both, ``p <- p - lr P00 k h``, ``u <- u - lr P10 k h``, with ``h = g + weight_decay p`` and
    ``k = (loss + weight_decay |p|^2 / 2) / (P00 |h|^2 + r)`` of a tensor; :class:`KoalaMRule` has the covariance P.
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
        maximize, foreach, capturable, differentiable, fused, average, gradient_noise, max_grad_norm, skip_nonfinite,
            process_group, engine: See :class:`fusedopt.FusedOptimizer`.

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

    rule = KoalaMRule
    _of_all = ("drift", "predictions", "predicted")

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
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        process_group: ProcessGroup | None = None,
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
        checks.not_averaged(self)
        everyone = [(p, group) for group in self.param_groups for p in group["params"]]
        drift = self._drift([p for p, _ in everyone])
        kept = self.param_groups[0]["drift"]
        drift = kept.copy_(drift) if isinstance(kept, Tensor) else drift
        for p, group in everyone:
            if "velocity" in self.state.get(p, {}):
                velocity = memory.local(self.state[p]["velocity"])
                memory.local(p).add_(velocity)
                velocity.mul_(float(group["a"]))
        for group in self.param_groups:
            group.update(drift=drift, predictions=group["predictions"] + 1, predicted=True)

    def _drift(self, params: list[Tensor]) -> Tensor:
        """``|e - p|`` over all parameters of all ranks, divided by how many numbers they are."""
        device, ranks = params[0].device, Ranks(params, self.process_group)
        wide = torch.float32 if device.type == "mps" else torch.float64
        sums = {reduction: torch.zeros(2, dtype=wide, device=device) for reduction in ranks.reductions}
        for p in params:
            here, average = memory.local(p), self.state.get(p, {}).get("average")
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

    def _take(self, loss: Any, samples: Any) -> None:
        if not self.param_groups[0]["predicted"] and (loss is not None or samples is not None):
            raise RuntimeError("predict() must be called before the forward pass whose loss is measured")
        super()._take(loss, samples)

    def _after_step(self) -> None:
        for group in self.param_groups:
            group["predicted"] = False
