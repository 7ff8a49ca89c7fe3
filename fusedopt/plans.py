"""The plans that an optimizer keeps: of one set of param groups, or of several that take turns.

DeepSpeed and manual schemes put some of the groups in the place of all, and step them one set after another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fusedopt.ranks import Ranks

Groups = list[dict[str, Any]]

MOST = 256  # sets that are kept
UNUSED = 1000  # steps after which a set's plans are let go, with all that they hold


@dataclass
class Planned:
    """What steps a set of groups.

    Attributes:
        groups: The list in which they stand.
        plans: To be run in their order.
        ranks: Of their parameters.
        measures: Whether the plans were made for steps that measure gradients.
        settles: Whether gradients may have to be settled first, see fusedopt/ranks.py.
        used: The last step that used them.
    """

    groups: Groups
    plans: list[Any]
    ranks: Ranks
    measures: bool
    settles: bool
    used: int = 0

    def is_for(self, measures: bool, process_group: Any) -> bool:
        """Whether a step can use them: which parameters share a plan may depend on what is measured."""
        if self.ranks.process_group is not process_group:
            return False
        return self.measures or not measures or not (self.ranks.are_many or self.ranks.are_hidden)

    def rebind(self, groups: Groups) -> None:
        """The same groups stand in another list now."""
        self.groups = groups
        for plan in self.plans:
            plan.rebind(groups)


class Plans:
    """Plans by the groups that they step."""

    def __init__(self) -> None:
        self._by_groups: dict[tuple[int, ...], Planned] = {}  # the least recently used first; they hold their groups
        self.last: Planned | None = None  # that a step used
        self._steps = 0

    def find(self, groups: Groups) -> Planned | None:
        """What steps these groups, as far as is known without looking at them."""
        self._steps += 1
        if self.last is None or self.last.groups is not groups:
            self.last = self._by_groups.get(self._key(groups))
            if self.last:
                self.last.rebind(groups)
        if self.last:
            self.last.used = self._steps
        if len(self._by_groups) > 1:
            self._let_go()
        return self.last

    def keep(self, planned: Planned) -> None:
        """Keep new ones."""
        self.drop()
        planned.used = self._steps
        self._by_groups[self._key(planned.groups)] = self.last = planned

    def drop(self) -> None:
        """The last ones are no longer right."""
        last, self.last = self.last, None
        self._by_groups = {key: planned for key, planned in self._by_groups.items() if planned is not last}

    @staticmethod
    def _key(groups: Groups) -> tuple[int, ...]:
        return tuple(map(id, groups))

    def _let_go(self) -> None:
        oldest = min(self._by_groups, key=lambda key: self._by_groups[key].used)
        if len(self._by_groups) > MOST or self._steps - self._by_groups[oldest].used > UNUSED:
            del self._by_groups[oldest]
