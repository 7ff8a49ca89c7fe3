"""Measuring workloads: who takes part, and what of it fits into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import fusedopt
from fusedopt.bench import limits, memory, peers, quiet
from fusedopt.bench.arena import Arena, Contender, summary
from fusedopt.bench.check import same_update
from fusedopt.bench.peers import Peer
from fusedopt.bench.rows import OURS, Row
from fusedopt.bench.timing import FLUSHED
from fusedopt.bench.workload import Footprint, Workload, ours

USABLE = 0.95  # of the memory that is free

Report = Callable[[str], object]


@dataclass
class Bench:
    """What is measured for every workload, and what was found on the way.

    Attributes:
        engines: Ours, by engine; the first is what others are compared with.
        wanted: Names of peers.
        storages: Those of theirs that take part.
        repeats: Timed rounds.
        report: Told what is being done, for a progress bar.
        notes: What was left out, and why.
        packages: Of all peers that took part.
    """

    engines: tuple[str, ...]
    wanted: tuple[str, ...]
    storages: tuple[str, ...] = ("full",)
    repeats: int = 15
    report: Report = lambda text: None
    notes: list[str] = field(default_factory=list)
    packages: set[str] = field(default_factory=set)
    _verdicts: dict[tuple[object, ...], str | None] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Keep a line about what was left out, once."""
        if text not in self.notes:
            self.notes.append(text)

    def run(self, workload: Workload, sweep: str | None = None) -> list[Row]:
        """The rows of a workload; none, and a note, where it does not fit into memory.

        Args:
            workload: What is stepped.
            sweep: What to call it a point of.
        """
        contenders = [self._ours(workload, engine) for engine in self.engines]
        others = list(self._peers(workload))
        footprint = Footprint.of(workload)
        device = torch.device(workload.device)
        states = workload.suite.numel * sum(footprint.states)
        tensors = 2 * workload.suite.numel * footprint.param
        streams = limits.resident_bytes(workload.kind, footprint.moved(workload), len(footprint.states))
        base = FLUSHED.get(workload.kind, 0) + tensors + streams + states * len(contenders)
        # At its peak a peer's step may take as much again as parameters and gradients; but one peer at a time.
        spare = math.inf if (room := memory.room(device)) is None else USABLE * room - base - tensors
        if spare < 0:
            self.note(f"{workload.title()}: left out, it needs {(base + tensors) / 2**30:.1f} GiB of memory")
            return []
        batch = int(min(len(others), spare // max(1, states)))
        if others and batch == 0:
            names = ", ".join(other.variant for other in others)
            self.note(f"{workload.title()}: {names} left out, its states do not fit beside ours")
        rows: list[Row] = []
        with Arena(self, workload, footprint, contenders, sweep) as arena:
            for start in range(0, len(others), batch) if batch else ():
                rows += arena.race(others[start : start + batch], first=not rows)
            if not rows:
                rows = arena.race([], first=True)
        return rows

    def _ours(self, workload: Workload, engine: str) -> Contender:
        return Contender(
            OURS + engine,
            fusedopt.__version__,
            lambda groups: ours(workload, groups, engine),
            None,
            tuple(word for name in dict.fromkeys((self.engines[0], engine)) for word in ("--engine", name))
            + ("--peer", "none"),
        )

    def _peers(self, workload: Workload) -> Iterator[Contender]:
        for peer in peers.offered(workload.case, workload.kind):
            if peer.name not in self.wanted or peer.storage not in self.storages:
                continue
            reason = self._reason_against(peer, workload)
            if reason is not None:
                self.note(reason)
                continue
            self.packages.add(peer.package)
            option = ("--engine", self.engines[0], "--peer", peer.name)
            if peer.storage != "full":
                option += ("--storage", "full", "--storage", peer.storage)
            yield Contender(peer.name, str(peer.version()), peer.build, peer, option)

    def _reason_against(self, peer: Peer, workload: Workload) -> str | None:
        if peer.version() is None:
            return f"{peer.package} is not installed: its rows are left out"
        count = len(workload.suite.shapes)
        if peer.most_tensors is not None and count > peer.most_tensors:
            return f"{peer.name} on {workload.suite.name}: left out, {count:,} tensors would take it minutes to compile"
        key = (peer.name, workload.case.name, workload.dtype, workload.kind, workload.clip is None, workload.amp)
        if key not in self._verdicts:
            self.report(f"checking {peer.name} {workload.case.name}")
            self._verdicts[key] = self._checked(peer, workload)
        return self._verdicts[key]

    @staticmethod
    def _checked(peer: Peer, workload: Workload) -> str | None:
        about = f"{peer.name} {peer.version()}, {workload.case.name} {workload.dtype}"
        try:
            with quiet.quiet():
                same = same_update(peer, workload)
            if peer.compiles:
                torch.compiler.reset()
        except Exception as error:  # whatever a package raises where it cannot run
            return f"{about}: left out, it does not run here: {summary(error)}"
        if same or peer.differs:
            return None
        return f"{about}: left out, it does not compute the same update"
