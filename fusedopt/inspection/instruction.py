"""Machine code, as far as it is looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import networkx

    Flow = networkx.DiGraph[int]  # which instruction may follow which, by their numbers
else:
    Flow = object


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, as far as it matters here.

    Attributes:
        kind: "load", "store" (of global memory), "spill", "branch", "jump" (a branch always taken), "end" or "".
        bits: How wide an access is for one thread.
        label: Where it stands; may be empty.
        target: Where a branch goes.
        registers: Numbers of the general registers that it names; of NVIDIA's only.
        written: Those that a load writes.
        guard: The predicate, such as "P1" or "!P1", without which it does nothing; may be empty.
        predicates: Those that it names otherwise, and may change.
    """

    kind: str
    bits: int = 0
    label: str = ""
    target: str = ""
    registers: frozenset[int] = frozenset()
    written: frozenset[int] = frozenset()
    guard: str = ""
    predicates: frozenset[str] = frozenset()
