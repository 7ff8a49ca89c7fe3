"""One step on all plans of an optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedopt.interrupts import held_back
from fusedopt.passes import Pass
from fusedopt.ranks import Ranks
from fusedopt.sums import Joint


@dataclass(slots=True)
class Scaling:
    """What a GradScaler hands to a step: one-element tensors on its device, or None."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    _inverse: float | None = None

    @property
    def inverse(self) -> float:
        """What unscales gradients. Waits for the device, once."""
        if self._inverse is None:
            self._inverse = 1.0 if self.grad_scale is None else 1.0 / float(self.grad_scale)
        return self._inverse

    def read(self) -> None:
        """Ask now for what unscales; whether it refuses was asked."""
        self.found_inf = None
        _ = self.inverse

    @property
    def refuses(self) -> bool:
        """Whether gradients were found that are not finite. Waits for the device."""
        return self.found_inf is not None and float(self.found_inf) != 0


_forks = 0


def _note_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


_AS_THEY_ARE = nullcontext()


def forks() -> int:
    """How many forks lie between this process and the one that imported this."""
    return _forks


def threads_that_exist() -> AbstractContextManager[None]:
    """One thread in a forked child, torch's included: the pool of its parent's is not there to be waited for."""
    return _one_thread() if _forks else _AS_THEY_ARE


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def launch(
    plans: list[Any],
    scaling: Scaling,
    max_norm: float,
    measure: bool,
    skip_nonfinite: bool,
    ranks: Ranks | None,
    joint: Joint | None,
    *,
    wait: bool,
) -> tuple[float | Tensor, bool] | None:
    """Run a step on all plans, which hold the step's gradients from then on.

    Plans are updated in their order. No signal handler runs between the update of a parameter and that of its counters,
    or of another parameter. Where the gradients' norm or a rule's sums span plans or ranks, all plans do a pass before
    any does the next, and what they found is joined between the two.

    Returns:
        The gradients' norm, and whether the step was skipped, if that is known: without asking where a plan is not
        asynchronous; and with ``wait``. None if a plan is not what it was, and nothing was done.
    """
    if not plans and not joint and not (measure and ranks):
        return 0.0, False
    is_alone = len(plans) == 1 and not joint and not (measure and ranks)
    if is_alone and plans[0].indivisible:
        outcome = plans[0].step(scaling, max_norm, measure, skip_nonfinite)
        return outcome and outcome[1:]
    if is_alone:
        (plan,) = plans
        with held_back():
            if not plan.scan():
                return None
            passes = plan.passes | Pass.NORM if measure else plan.passes
            _, norm, skipped = plan.run(passes, scaling, max_norm, skip_nonfinite, None)
    else:
        if not all(plan.scan() for plan in plans):
            return None
        totals: list[Any] = [None] * len(plans)
        if measure:
            squares = [plan.run(Pass.NORM, scaling, math.inf, False, None)[0] for plan in plans]
            if ranks:
                measured = [torch.as_tensor(square, dtype=torch.float64) for square in squares]
                squares = [ranks.sum(zip((plan.reduction for plan in plans), measured, strict=True))]
            totals = [_sum(squares, plan) for plan in plans]
        else:
            squares = [0.0]

        def run(passes: Pass) -> list[Any]:
            return [
                plan.run(plan.passes & passes, scaling, max_norm, skip_nonfinite, total)
                for plan, total in zip(plans, totals, strict=True)
            ]

        if joint:
            joint.measured(plans, run)
        with held_back():
            for plan in plans:  # much may have run since it was scanned
                plan.check()
            outcomes = run(Pass.UPDATE if joint else ~Pass.NORM)
            if joint:
                joint.concluded(plans, run)
        if not plans:
            return _of_others(float(squares[0]), scaling, skip_nonfinite)
        _, norm, skipped = next((o for o in outcomes if not isinstance(o[2], Tensor)), outcomes[0])
    if isinstance(skipped, Tensor):
        skipped = wait and bool(skipped)
    return norm, skipped


def _of_others(squared: float, scaling: Scaling, skip_nonfinite: bool) -> tuple[float, bool]:
    """What becomes of a step of parameters that only other ranks have."""
    norm = math.sqrt(squared) * scaling.inverse
    return norm, skip_nonfinite and not math.isfinite(norm)


def _sum(squares: Sequence[float | Tensor], plan: Any) -> float | Tensor:
    """The sum in the same order for all plans; waits only for those who cannot."""
    if not plan.asynchronous:
        return sum(float(s) for s in squares)
    total = torch.zeros((), dtype=torch.float64, device=plan.device)
    for s in squares:
        total = total + (s.to(plan.device, non_blocking=True) if isinstance(s, Tensor) else s)
    return total
