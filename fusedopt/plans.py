"""The plans that an optimizer keeps: of one set of param groups, or of several that take turns.

DeepSpeed and manual schemes put some of the groups in the place of all, and step them one set after another.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from fusedopt.aliases import ParamGroups
from fusedopt.context import Plan
from fusedopt.ranks import Ranks

MOST = 1024  # sets that are kept
TURNS = 4  # a set that was not used for so many times as many steps as there are sets is let go, with all that it holds


@dataclass
class Planned:
    """What steps a set of groups.

    Attributes:
        groups: The list in which they stand.
        plans: To be run in their order.
        ranks: Of their parameters.
        measures: Whether the plans were made for steps that measure gradients.
        used: The last step that used them.
        owners: Which group, by its id, a parameter stands in, by its own.
        is_asynchronous: Whether all plans are.
    """

    groups: ParamGroups
    plans: list[Plan]
    ranks: Ranks
    measures: bool
    used: int = 0
    owners: dict[int, int] = field(init=False)
    is_asynchronous: bool = field(init=False)

    def __post_init__(self) -> None:
        self.is_asynchronous = all(plan.asynchronous for plan in self.plans)
        self.owners = {id(p): id(group) for group in self.groups for p in group["params"]}

    def is_for(self, measures: bool, process_group: object) -> bool:
        """Whether a step can use them: which parameters share a plan may depend on what is measured."""
        if self.ranks.process_group is not process_group:
            return False
        return self.measures or not measures or not (self.ranks.are_many or self.ranks.are_hidden)

    def rebind(self, groups: ParamGroups) -> None:
        """The same groups stand in another list now."""
        self.groups = groups
        for plan in self.plans:
            plan.rebind(groups)

    def is_replaced_by(self, other: Planned) -> bool:
        """Whether a parameter of theirs stands in another group there, so that they cannot be right again."""
        return any(other.owners.get(p, group) != group for p, group in self.owners.items())


class Plans:
    """Plans by the groups that they step."""

    def __init__(self) -> None:
        self._by_groups: dict[tuple[int, ...], Planned] = {}  # the least recently used first; they hold their groups
        self.last: Planned | None = None  # that a step used
        self._steps = 0

    def find(self, groups: ParamGroups) -> Planned | None:
        """What steps these groups, as far as is known without looking at them."""
        self._steps += 1
        if self.last is None or self.last.groups is not groups:
            key = tuple(map(id, groups))
            self.last = self._by_groups.pop(key, None)
            if self.last:
                self._by_groups[key] = self.last
                self.last.rebind(groups)
        if self.last:
            self.last.used = self._steps
        if len(self._by_groups) > 1:
            key, oldest = next(iter(self._by_groups.items()))
            if self._steps - oldest.used > TURNS * len(self._by_groups) or len(self._by_groups) > MOST:
                del self._by_groups[key]
        return self.last

    def keep(self, planned: Planned) -> None:
        """Keep new ones, in the place of the last ones."""
        self.drop()
        self._by_groups = {key: kept for key, kept in self._by_groups.items() if not kept.is_replaced_by(planned)}
        planned.used = self._steps
        self._by_groups[tuple(map(id, planned.groups))] = self.last = planned

    def drop(self) -> None:
        """The last ones are no longer right."""
        last, self.last = self.last, None
        self._by_groups = {key: planned for key, planned in self._by_groups.items() if planned is not last}
