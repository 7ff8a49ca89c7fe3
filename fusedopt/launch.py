"""One step on all plans of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt.context import Outcome, Plan, StepRequest, is_indivisible
from fusedopt.interrupts import held_back
from fusedopt.passes import Pass
from fusedopt.ranks import Ranks
from fusedopt.sums import Joint


def launch(
    plans: Sequence[Plan], request: StepRequest, ranks: Ranks | None, joint: Joint | None, *, wait: bool
) -> Outcome | None:
    """Run a step on all plans, which hold the step's gradients from then on.

    Plans are updated in their order. No signal handler runs between the update of a parameter and that of its counters,
    or of another parameter. Where the gradients' norm or a rule's sums span plans or ranks, all plans do a pass before
    any does the next, and what they found is joined between the two.

    Args:
        plans: This rank's.
        request: Of the step.
        ranks: With whom the step is done together; None if there are none.
        joint: What is joined of sums.
        wait: Whether to wait for plans that are asynchronous to tell whether they skipped.

    Returns:
        What came of it; ``skipped`` is False where that is not known yet. None if a plan is not what it was, and
        nothing was done.
    """
    spans_ranks = request.measures and ranks is not None
    if len(plans) == 1 and not joint and not spans_ranks:
        outcome = _alone(plans[0], request)
    elif plans or joint or spans_ranks:
        outcome = _together(plans, request, ranks, joint)
    else:
        return Outcome(0.0, 0.0, False)
    if outcome and isinstance(outcome.skipped, Tensor):
        return outcome._replace(skipped=wait and bool(outcome.skipped))
    return outcome


def _alone(plan: Plan, request: StepRequest) -> Outcome | None:
    """A step that is one plan's."""
    if is_indivisible(plan):
        return plan.step(request)
    with held_back():
        if not plan.scan():
            return None
        return plan.run(plan.passes | Pass.NORM if request.measures else plan.passes, request, None)


def _together(plans: Sequence[Plan], request: StepRequest, ranks: Ranks | None, joint: Joint | None) -> Outcome | None:
    """A step of which plans or ranks have parts."""
    if not all(plan.scan() for plan in plans):
        return None
    squares: list[float | Tensor] = [0.0]
    totals: list[float | Tensor | None] = [None] * len(plans)
    if request.measures:
        squares = [plan.run(Pass.NORM, request.to_measure(), None).squared_norm for plan in plans]
        if ranks:
            measured = [torch.as_tensor(square, dtype=torch.float64) for square in squares]
            squares = [ranks.sum(zip((plan.reduction for plan in plans), measured, strict=True))]
        totals = [_sum(squares, plan) for plan in plans]

    def run(passes: Pass) -> list[Outcome]:
        return [plan.run(plan.passes & passes, request, total) for plan, total in zip(plans, totals, strict=True)]

    if joint:
        joint.measured(plans, run)
    with held_back():
        for plan in plans:  # much may have run since it was scanned
            plan.check()
        outcomes = run(Pass.UPDATE if joint else ~Pass.NORM)
        if joint:
            joint.concluded(plans, run)
    if not plans:
        return _of_others(float(squares[0]), request)
    return next((o for o in outcomes if not isinstance(o.skipped, Tensor)), outcomes[0])


def _of_others(squared: float, request: StepRequest) -> Outcome:
    """What becomes of a step of parameters that only other ranks have."""
    norm = math.sqrt(squared) * request.scaling.inverse
    return Outcome(squared, norm, request.skip_nonfinite and not math.isfinite(norm))


def _sum(squares: Sequence[float | Tensor], plan: Plan) -> float | Tensor:
    """The sum in the same order for all plans; waits only for those who cannot."""
    if plan.device is None:
        return sum(float(s) for s in squares)
    total = torch.zeros((), dtype=torch.float64, device=plan.device)
    for s in squares:
        total = total + (s.to(plan.device, non_blocking=True) if isinstance(s, Tensor) else s)
    return total
