"""How many loads are under way at once: what a loop issues before it uses a register that one of them writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from fusedopt.inspection.instruction import Flow, Instruction


class _State(NamedTuple):
    """Where a way through a loop has come to.

    Attributes:
        at: The instruction.
        pending: The registers of loads under way.
        under_way: How many those are.
        known: Predicates that are true on this way, such as "P1" or "!P2".
    """

    at: int
    pending: frozenset[int]
    under_way: int
    known: frozenset[str]


def loads_in_flight(
    code: list[Instruction],
    flow: Flow,
    header: int,
    body: frozenset[int],
    counts: Callable[[Instruction], bool],
) -> int:
    """The most loads under way at once on any way through one round of an innermost loop.

    An instruction that names a register of a load under way waits; after it nothing is under way. What one predicate
    lets pass and what its opposite does are on different ways. Of the ways that come to an instruction with the same
    predicates only the one with the most loads under way is followed, or there would be too many.

    Args:
        code: Of a kernel.
        flow: Which instruction may follow which.
        header: Where the loop begins.
        body: Its instructions.
        counts: Which loads are looked at. One that is predicated counts.
    """
    most = 0
    todo = [_State(header, frozenset(), 0, frozenset())]
    best: dict[tuple[int, frozenset[str]], int] = {}
    while todo:
        for state in _after(todo.pop(), code, flow, counts):
            most = max(most, state.under_way)
            way = state.at, state.known
            if state.at in body and state.at != header and state.under_way > best.get(way, -1):
                best[way] = state.under_way
                todo.append(state)
    return most


def _after(
    state: _State, code: list[Instruction], flow: Flow, counts: Callable[[Instruction], bool]
) -> Iterator[_State]:
    """The states behind an instruction: two where it matters whether it passes and that is not known."""
    at, pending, under_way, known = state
    instruction = code[at]
    guard, opposite = instruction.guard, _opposite(instruction.guard)
    counted = instruction.kind == "load" and counts(instruction)
    ways = [(True, known)]
    if opposite in known:
        ways = [(False, known)]
    elif guard and guard not in known and (counted or instruction.kind == "branch"):
        ways = [(True, known | {guard}), (False, known | {opposite})]
    for passes, told in ways:
        now, n = pending, under_way
        if passes:
            if now & instruction.registers:
                now, n = frozenset[int](), 0
            if counted:
                now, n = now | instruction.written, n + 1
            told = frozenset(p for p in told if p.lstrip("!") not in instruction.predicates)
        for following in flow.successors(at):
            if not guard or instruction.kind != "branch" or (following != at + 1) == passes:
                yield _State(following, now, n, told)


def _opposite(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else f"!{guard}"
