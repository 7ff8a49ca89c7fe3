"""The force of a step without memory and what momentum's memory adds to it, on one batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.diagnostics import recursions, show
from fusedopt.diagnostics.arguments import called
from fusedopt.diagnostics.point import Point, check_finite
from fusedopt.diagnostics.recursions import ADAM, LION, SGD, Recursion

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Batch = TypeVar("Batch")
MOST_POINTS = 5000  # of the plot
FEW = 0.5  # of the elements: where the expansion holds of fewer, that is said


@dataclass(frozen=True)
class MemoryCorrection:
    """What ``memory_correction`` found. Lists are by parameter, in the order of the optimizer's groups.

    Replacing past iterates by the present one gives the force F; what that leaves out is M, to first order in lr, in
    the steady state (bias corrections are over). With g the gradient, H the Hessian, decoupled decay w, and tau as in
    ``memory_coefficient``:

    * SGD: ``F = c g + w p``, ``M = k H F``, where ``c = (1-dampening)/(1-momentum)`` and
      ``k = c momentum/(1-momentum)``; Nesterov ``k = momentum^2/(1-momentum)^2``.
    * Adam, AdamW, NAdamW, whose eps is outside of the root: ``F = g/(|g|+eps) + w p`` and
      ``M = (tau1/(|g|+eps) - tau2 |g|/(|g|+eps)^2) H F`` (for the moments are ``g + lr tau1 H F`` and
      ``g^2 + 2 lr tau2 g H F``; the source has eps inside of the root). NAdamW: tau1 times beta1.
    * Lion with ``K(g) = sum sqrt(g^2 + smoothing^2)``: ``F = grad K(g) + w p``, ``M = beta1/(1-beta2) hess K(g) H F``.
      Without smoothing F has sign(g), and M vanishes; that is what ``fusedopt.Lion`` steps.

    Coupled decay is part of the gradient: g and L are of ``L + weight_decay/2 |p|^2`` then, and ``loss_fn`` leaves it
    out. Where groups have their own lr and decay, ``lr F`` is what H is applied to, each group's with its own.

    The term, where all groups are alike:

    * SGD: ``lr k (|g|^2/2 + w/c (g.p - L))``; heavy ball without decay ``lr momentum/(2 (1-momentum)^2) |g|^2``. It is
      None with dampening 1 and decay, when no gradient is in F.
    * Adam's, in the limit eps -> 0: ``lr (tau2-tau1) (w L - |g|_1 - w g.p)``, as a change of the loss whose gradient is
      divided by this one's size.
    * Lion: ``lr beta1/(1-beta2) (K(g) + w (g.p - L))`` inside of grad K; 0 without smoothing, as M.

    Attributes:
        loss: The batch's loss.
        term: What momentum adds to the loss, to first order in the learning rate; None where there is no such loss.
        force: F, detached tensors: a step without memory is ``p - lr F``.
        correction: ``lr M``, detached tensors: a step with what momentum adds is ``p - lr (F + correction)``.
        within: The share of elements whose gradient changes, over the time that moments remember, by less than what it
            is compared with: by ``tau |lr H F|``, with the longer tau, less than ``|g| + eps`` (Adam) or
            ``sqrt(g^2 + smoothing^2)`` (Lion); for SGD by ``k |lr H F|`` less than ``c |g|``. The expansion says little
            about others.
    """

    loss: float
    term: float | None
    force: list[Tensor]
    correction: list[Tensor]
    within: float


def memory_correction(
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[[Batch], Tensor],
    batch: Batch,
    *,
    smoothing: float = 0.0,
    quiet: bool = False,
    plot: show.Plot = None,
) -> MemoryCorrection:
    """The step without memory that goes where momentum goes: ``p <- p - lr (F + lr M)``, on one batch.

    ``MemoryCorrection`` says what F and M are of each optimizer, and what they come from.

    One forward, one backward, and one Hessian-vector product by a second backward. Parameters, their ``grad``, the
    optimizer's state and random numbers (torch's, Python's, numpy's) stay as they are; what the forward does to buffers
    (BatchNorm in training mode) it does, as an optimizer knows no modules. Parameters that the loss does not depend on,
    or that need no gradient, have zeros. What autograd takes as a constant in the backward, as of a custom function
    before a sum, counts as linear, which cannot be seen.

    Args:
        optimizer: As in ``memory_coefficient``, without clipping to a norm. Parameters are float32 or float64.
        loss_fn: Takes the batch, and returns the loss as a scalar of the optimizer's parameters.
        batch: What it is given.
        smoothing: Lion's, as large as gradients are (the source's epsilon is its square); 0 for others.
        quiet: Print no table.
        plot: A PNG file for the elements of correction over those of force.

    Returns:
        Loss, term, force and correction.

    Raises:
        TypeError: If the derivation is not of this optimizer, or a parameter or the loss is of another kind.
        ValueError: If it is not of an option, smoothing is given to other optimizers, or something is not finite.
        RuntimeError: If the loss depends on none of the parameters, or cannot be differentiated twice.

    Example:
        >>> found = diagnostics.memory_correction(optimizer, lambda batch: loss(model(batch[0]), batch[1]), (x, y))

    Reference:
        Cattaneo and Shigida, NeurIPS 2025, arXiv 2502.02132; the forms for our eps and decay are derived here, and
        checked by ``examples/memory_order.py``.
    """
    show.check_plot(plot)
    groups = recursions.of_optimizer(optimizer)
    _check(optimizer, groups, smoothing)
    owned = [(p, r) for r, group in zip(groups, optimizer.param_groups, strict=True) for p in group["params"]]
    with Point(lambda: called(loss_fn, "loss_fn(batch)", batch), [p for p, _ in owned]) as point:
        steps = [_Step(r, p.detach(), g, smoothing) for (p, r), g in zip(owned, point.gradients, strict=True)]
        force = [step.force() for step in steps]
        check_finite(force, "where Adam's eps is 0 and a gradient too, nothing is defined: the force")
        moved = [step.of.lr * f for step, f in zip(steps, force, strict=True)]
        curved = [step.with_decay(h, d) for step, h, d in zip(steps, point.times(moved), moved, strict=True)]
    correction = [step.correction(h) for step, h in zip(steps, curved, strict=True)]
    check_finite(correction, "the correction")
    result = MemoryCorrection(point.loss, _term(point.loss, steps), force, correction, _within(steps, curved))
    if not quiet:
        _print(result)
    show.draw(plot, "Memory's correction, by element", "|F|", "|lr M|", lambda axes: _scatter(axes, result))
    return result


def _check(optimizer: torch.optim.Optimizer, groups: list[Recursion], smoothing: object) -> None:
    """Smoothing is Lion's, and gradients are taken as they are."""
    value = checks.number(smoothing, "smoothing", "")
    if not 0 <= value < math.inf:
        raise ValueError(f"smoothing is {value!r}; it must be 0 or more, and finite")
    if value and any(r.kind != LION for r in groups):
        raise ValueError(f"smoothing is {value!r}, and {type(optimizer).__name__} has none; it is for Lion")
    norm = getattr(optimizer, "max_grad_norm", None)
    if norm is not None:
        raise ValueError(
            f"max_grad_norm is {norm!r}; the memory of momentum is not derived for clipped gradients, which change "
            "with the norm of all; give an optimizer without it"
        )


class _Step(NamedTuple):
    """A parameter and its gradient, None where it has none, under its group's recursion."""

    of: Recursion
    p: Tensor
    raw: Tensor | None
    smoothing: float

    def gradient(self) -> Tensor:
        """With coupled decay."""
        return torch.zeros_like(self.p) if self.raw is None else self.raw + self.of.coupled * self.p

    def size(self) -> Tensor:
        """What a gradient is divided by: ``|g| + eps``, or ``sqrt(g^2 + smoothing^2)``."""
        g = self.gradient()
        return g.abs() + self.of.eps if self.of.kind == ADAM else (g * g + self.smoothing**2).sqrt()

    def force(self) -> Tensor:
        """F; zeros where nothing is stepped."""
        if self.raw is None:
            return torch.zeros_like(self.p)
        g = self.gradient()
        if self.of.kind == SGD:
            return self.of.gain * g + self.of.decay * self.p
        is_sign = self.of.kind == LION and not self.smoothing
        return (g.sign() if is_sign else g / self.size()) + self.of.decay * self.p

    def with_decay(self, curved: Tensor, moved: Tensor) -> Tensor:
        """The Hessian's product, with what coupled decay has of it."""
        return curved if self.raw is None else curved + self.of.coupled * moved

    def correction(self, curved: Tensor) -> Tensor:
        """``lr M``, of the Hessian times ``lr F``."""
        if self.raw is None or (self.of.kind == LION and not self.smoothing):
            return torch.zeros_like(self.p)
        if self.of.kind == SGD:
            return self.of.first * curved
        g, size = self.gradient(), self.size()
        if self.of.kind == LION:
            return self.of.first * self.smoothing**2 / size**3 * curved
        return (self.of.first / size - self.of.second * g.abs() / size**2) * curved


def _term(loss: float, steps: list[_Step]) -> float | None:
    """What momentum adds to the loss."""
    stepped = [step for step in steps if step.raw is not None]
    of, smoothing = stepped[0].of, stepped[0].smoothing
    if any(step.of != of for step in stepped):
        return None
    if of.kind == LION and not smoothing:
        return 0.0
    if of.kind == SGD and of.gain == 0:
        return None if of.decay else 0.0

    def total(part: Callable[[_Step], Tensor]) -> float:
        return sum(part(step).double().sum().item() for step in stepped)

    decayed = of.decay / of.gain * (total(lambda step: step.gradient() * step.p) - loss)
    if of.kind == SGD:
        return of.lr * of.first * (total(lambda step: step.gradient() ** 2 / 2) + decayed)
    if of.kind == LION:
        return of.lr * of.first * (total(lambda step: step.size()) + decayed)
    return of.lr * (of.first - of.second) * (total(lambda step: step.gradient().abs()) + decayed)


def _within(steps: list[_Step], curved: list[Tensor]) -> float:
    """The share of elements whose gradient changes by less than its size while moments remember it, or not at all."""
    stepped = [(step, h) for step, h in zip(steps, curved, strict=True) if step.raw is not None]
    inside = 0.0
    for step, h in stepped:
        change = max(step.of.first, step.of.second) * h.abs()
        size = step.of.gain * step.gradient().abs() if step.of.kind == SGD else step.size()
        inside += ((change < size) | (change == 0)).sum().item()
    return inside / max(1, sum(h.numel() for _, h in stepped))


def _norm(tensors: list[Tensor]) -> float:
    """The Euclidean norm of all elements."""
    return math.sqrt(sum((t.double() ** 2).sum().item() for t in tensors))


def _print(result: MemoryCorrection) -> None:
    """The numbers, and norms of the lists."""
    force, correction = _norm(result.force), _norm(result.correction)
    rows = [
        ("loss", f"{result.loss:.6g}"),
        ("what momentum adds to it", "no such term" if result.term is None else f"{result.term:.6g}"),
        ("norm of the force F", f"{force:.6g}"),
        ("norm of the correction lr M", f"{correction:.6g}"),
        ("elements within the expansion", f"{result.within:.1%}"),
    ]
    show.print_table("Memory of momentum on this batch", ("", "value"), rows)
    if result.within < FEW or correction > force:
        show.say(
            "The expansion, of first order, says little here: the correction is larger than the force, or most "
            "gradients change by more than their size while momentum remembers them. Try a smaller lr or shorter "
            "memory."
        )


def _scatter(axes: Axes, result: MemoryCorrection) -> None:
    """Some of the elements, those that are not zero."""
    force, correction = (
        torch.cat([t.flatten().abs().double().cpu() for t in ts]) for ts in (result.force, result.correction)
    )
    shown = ((force > 0) & (correction > 0)).nonzero()[:, 0]
    shown = shown[:: max(1, len(shown) // MOST_POINTS)]
    axes.plot(force[shown].numpy(), correction[shown].numpy(), ".", markersize=3, color=show.BLUE)
    if len(shown):
        axes.set_xscale("log")
        axes.set_yscale("log")
