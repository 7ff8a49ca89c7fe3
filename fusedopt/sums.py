"""What rules add up over tensors before and while they step: where a plan keeps it, and what plans and ranks join.

A plan keeps, for all parameters of the optimizer and not only its own, so that plans and ranks agree on the places:

==========  ===========================  ==============================================================================
tensor      float64, shape               what it holds
==========  ===========================  ==============================================================================
segments    (n_segments, n_measures)     sums over each segment; 0 where there is no gradient
wholes      (n_scopes, n_measures + 1)   sums over each scope, and how many of its segments were added up; not where
                                         scopes are tensors
largest     (n_scopes)                   the largest score in each scope, -inf without one; not where scopes are tensors
epilogue    (n_scopes, n_epilogue)       what was added up in the step
==========  ===========================  ==============================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt import memory
from fusedopt.aliases import Group
from fusedopt.passes import Pass
from fusedopt.ranks import Ranks, Reduction, reduced
from fusedopt.rule import Rule

TENSOR, CHANNEL, GROUP, ALL = SCOPES = ("tensor", "channel", "group", "all")


class Segments:
    """Which segments and scopes there are.

    Args:
        scope: One of SCOPES.
        groups: The optimizer's.

    Attributes:
        first: The first segment of each parameter, counted through all groups; at the end, how many there are.
        scopes: The scope of each parameter.
        n_scopes: How many there are.
    """

    first: list[int]
    scopes: list[int]
    n_scopes: int

    def __init__(self, scope: str, groups: Sequence[Group]) -> None:
        self.scope = scope
        params = [p for group in groups for p in group["params"]]
        counts = (segments_of(p) if scope == CHANNEL else 1 for p in params)
        self.first = [0, *accumulate(counts)]
        if scope == GROUP:
            self.scopes = [g for g, group in enumerate(groups) for _ in group["params"]]
            self.n_scopes = len(groups)
        else:
            self.scopes = [0] * len(params) if scope == ALL else list(range(len(params)))
            self.n_scopes = 1 if scope == ALL else len(params)


def segments_of(p: Tensor) -> int:
    """How many slices of dimension 0 are here of a parameter; one if it has less than two dimensions."""
    local = memory.local(p)
    return local.shape[0] if not local.is_nested and local.dim() > 1 else 1


class Sums:
    """A plan's sums; see the module's text.

    Args:
        rule: The optimizer's.
        scope: Its scope.
        groups: Its groups.
        device: Where the plan keeps them.
    """

    places: Segments
    segments: Tensor
    wholes: Tensor
    largest: Tensor
    epilogue: Tensor

    def __init__(self, rule: type[Rule], scope: str, groups: Sequence[Group], device: torch.device) -> None:
        self.places = places = Segments(scope, groups)
        n_measures, n_scopes = len(rule.measures), 0 if scope == TENSOR else places.n_scopes

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.segments = zeros(places.first[-1], n_measures)
        self.wholes, self.largest = zeros(n_scopes, n_measures + 1), zeros(n_scopes)
        self.epilogue = zeros(places.n_scopes, len(rule.epilogue))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return self.segments, self.wholes, self.largest, self.epilogue


class HasSums(Protocol):
    """A plan, as far as its sums go."""

    reduction: Reduction

    @property
    def sums(self) -> Sums | None:
        """What it keeps; None if its rule adds nothing up."""
        ...


class Joint:
    """What plans and ranks join of their sums, between the passes of a step.

    Args:
        rule: The optimizer's.
        scope: Its scope.
        groups: Its groups.
        ranks: Of its parameters.
    """

    def __init__(self, rule: type[Rule], scope: str, groups: Sequence[Group], ranks: Ranks | None) -> None:
        self._rule, self._scope, self._groups, self._ranks = rule, scope, groups, ranks
        self._params = [p for group in groups for p in group["params"]]

    @classmethod
    def of(
        cls, rule: type[Rule], scope: str, groups: Sequence[Group], ranks: Ranks | None, plans: Sequence[HasSums]
    ) -> Joint | None:
        """What plans need; None where each has all that it needs by itself."""
        if not rule.has_sums() or not (ranks or (len(plans) > 1 and scope in (GROUP, ALL))):
            return None
        return cls(rule, scope, groups, ranks)

    def measured(self, plans: Sequence[HasSums], run: Callable[[Pass], object]) -> None:
        """Do the passes before the update.

        Args:
            plans: This rank's; there may be none.
            run: Does passes on all of them, as far as they need them.
        """
        run(Pass.SUMS)
        if self._ranks and self._rule.measures:
            self._join_segments(plans)
        run(Pass.SCOPES)
        self._join_scopes(plans)

    def concluded(self, plans: Sequence[HasSums], run: Callable[[Pass], object]) -> None:
        """Do the pass after it; see ``measured``."""
        if self._rule.epilogue:
            self._join_epilogue(plans)
            run(Pass.EPILOGUE)

    def skipped(self) -> None:
        """Take part in a step that is not done here: others find out on their devices that they do not either."""
        self.measured([], lambda passes: None)
        self.concluded([], lambda passes: None)

    def _join_segments(self, plans: Sequence[HasSums]) -> None:
        """Add up segments of which parts are on other ranks."""
        total, first = self._total(plans, "segments"), Segments(self._scope, self._groups).first
        for reduction, members in self._by_reduction(inner=True):
            at = torch.cat([torch.arange(first[i], first[i + 1], device=total.device) for i in members])
            total[at] = reduced(total[at], reduction.groups(), dist.ReduceOp.SUM)
        self._give(plans, "segments", total)

    def _join_scopes(self, plans: Sequence[HasSums]) -> None:
        """Add up scopes of which other plans or ranks have segments, and find the largest scores there."""
        if self._scope == TENSOR:
            return
        for name, op in (("wholes", dist.ReduceOp.SUM), ("largest", dist.ReduceOp.MAX)):
            total = self._total(plans, name)
            if self._scope == CHANNEL:
                for reduction, members in self._by_reduction(inner=False):
                    at = torch.tensor(members, device=total.device)
                    total[at] = reduced(total[at], reduction.groups(), op)
            elif self._ranks:
                total = reduced(total, self._ranks.everyone(), op)
            self._give(plans, name, total)

    def _join_epilogue(self, plans: Sequence[HasSums]) -> None:
        """Add up what was added up in the step."""
        if self._scope in (GROUP, ALL) and self._ranks:
            parts = [(plan.reduction, plan.sums.epilogue) for plan in plans if plan.sums]
            total = self._ranks.sum(parts or [(Reduction(), self._none("epilogue"))])
        else:
            total = self._total(plans, "epilogue")
            for reduction, members in self._by_reduction(inner=None):
                at = torch.tensor(members, device=total.device)
                total[at] = reduced(total[at], reduction.groups(), dist.ReduceOp.SUM)
        self._give(plans, "epilogue", total)

    def _by_reduction(self, inner: bool | None) -> list[tuple[Reduction, list[int]]]:
        """Parameters by the ranks that have parts of their segments, of their scopes, or with None of either."""
        which: dict[Reduction, list[int]] = {}
        for i, p in enumerate(self._params if self._ranks else ()):
            of = Reduction.of(p)
            if inner is not None:
                cut = {d for d in of.dims if self._scope == CHANNEL and p.dim() > 1 and p.placements[d].dim == 0}
                of = Reduction(of.mesh, tuple(d for d in of.dims if (d in cut) != inner))
            if of.dims:
                which.setdefault(of, []).append(i)
        return list(which.items())

    def _total(self, plans: Sequence[HasSums], name: str) -> Tensor:
        """What plans have found, all of it: of each thing one plan has found something, and the others nothing."""
        found = [getattr(plan.sums, name) for plan in plans]
        if not found:
            return self._none(name)
        together = torch.stack([t.to(found[0].device) for t in found])
        return together.amax(0) if name == "largest" else together.sum(0)

    def _none(self, name: str) -> Tensor:
        """What a rank has that steps nothing."""
        none = getattr(Sums(self._rule, self._scope, self._groups, torch.device("cpu")), name)
        return none.fill_(-math.inf) if name == "largest" else none

    @staticmethod
    def _give(plans: Iterable[HasSums], name: str, total: Tensor) -> None:
        for plan in plans:
            getattr(plan.sums, name).copy_(total, non_blocking=True)
