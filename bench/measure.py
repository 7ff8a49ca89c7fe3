"""Measuring workloads: who takes part, and what of it fits into memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import fusedopt
from fusedopt.bench import limits, memory, peers, quiet
from fusedopt.bench.arena import Arena
from fusedopt.bench.check import objection
from fusedopt.bench.contenders import FAILURES, Contender, summary
from fusedopt.bench.peers import Peer
from fusedopt.bench.rows import OURS, Row
from fusedopt.bench.stored import STORED, Stored
from fusedopt.bench.timing import FLUSHED
from fusedopt.bench.workload import Footprint, Workload, ours

USABLE = 0.95  # of the memory that is free
SHARES = {"full": 1.0, "8bit": 0.3, "4bit": 0.2}  # of what fp32 states take, with their scales

Report = Callable[[str], object]


@dataclass
class Bench:
    """What is measured for every workload, and what was found on the way.

    Attributes:
        engines: Ours, by engine; the first is what others are compared with.
        wanted: Names of peers.
        storages: Those of theirs that take part.
        stored: Keys of ``STORED``: ours with fewer bits, beside ours in full.
        repeats: Timed rounds.
        report: Told what is being done, for a progress bar.
        notes: What was left out, and why.
        packages: Of all peers that took part.
    """

    engines: tuple[str, ...]
    wanted: tuple[str, ...]
    storages: tuple[str, ...] = ("full",)
    stored: tuple[str, ...] = ()
    repeats: int = 15
    report: Report = lambda text: None
    notes: list[str] = field(default_factory=list)
    packages: set[str] = field(default_factory=set)
    _objections: dict[tuple[object, ...], str | None] = field(default_factory=dict)

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
        stored = [STORED[name] for name in self.stored]
        contenders = [self._ours(workload, engine, how) for how in (None, *stored) for engine in self.engines]
        others = list(self._peers(workload))
        footprint = Footprint.of(workload)
        states, tensors = workload.suite.numel * sum(footprint.states), footprint.tensor_bytes(workload).resident
        moved, n_states = footprint.moved(workload), len(footprint.states)
        streams = limits.resident_bytes(workload.kind, moved, n_states, workload.case.measured)
        # At its peak a peer's step may take as much again as parameters and gradients; but one peer at a time.
        base = FLUSHED.get(workload.kind, 0) + (2 + bool(stored)) * tensors + streams
        room = memory.room(torch.device(workload.device))
        spare = math.inf if room is None else USABLE * room - base
        if spare < states:
            self.note(f"{workload.title()}: left out, it needs {(base + states) / 2**30:.1f} GiB of memory")
            return []
        while spare < states * len(contenders):
            self.note(f"{contenders.pop().variant}, {workload.title()}: left out, there is no memory for its states")
        batches, alone = self._batches(others, spare - states * len(contenders), states)
        if alone:
            names = ", ".join(other.variant for other in alone)
            self.note(f"{workload.title()}: {names} left out, its states do not fit beside ours")
        rows: list[Row] = []
        with Arena(self, workload, footprint, contenders, sweep) as arena:
            for batch in batches or [[]]:
                rows += arena.race(batch, first=not rows)
        return rows

    @staticmethod
    def _batches(others: list[Contender], spare: float, states: int) -> tuple[list[list[Contender]], list[Contender]]:
        """Peers in batches whose states fit into memory together, and those that do not fit even alone."""
        batches: list[list[Contender]] = []
        alone, left = [], 0.0
        for other in others:
            needs = states * SHARES[other.peer.storage if other.peer else "full"]
            if needs > spare:
                alone.append(other)
                continue
            if not batches or needs > left:
                batches.append([])
                left = spare
            batches[-1].append(other)
            left -= needs
        return batches, alone

    def _ours(self, workload: Workload, engine: str, stored: Stored | None) -> Contender:
        option = tuple(word for name in dict.fromkeys((self.engines[0], engine)) for word in ("--engine", name))
        return Contender(
            OURS + engine + (f"-{stored.name}" if stored else ""),
            fusedopt.__version__,
            lambda groups: ours(workload, groups, engine, stored),
            None,
            option + (("--stored", stored.name) if stored else ()) + ("--peer", "none"),
            stored,
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
        if peer.most_dims is not None and any(len(shape) > peer.most_dims for shape in workload.suite.shapes):
            return f"{peer.name} on {workload.suite.name}: left out, it is for {peer.most_dims} dimensions at most"
        key = (peer.name, workload.case.name, workload.dtype, workload.kind, workload.clip is None, workload.amp)
        if key not in self._objections:
            self.report(f"checking {peer.name} {workload.case.name}")
            self._objections[key] = self._checked(peer, workload)
        return self._objections[key]

    @staticmethod
    def _checked(peer: Peer, workload: Workload) -> str | None:
        about = f"{peer.name} {peer.version()}, {workload.case.name} {workload.dtype}"
        try:
            with quiet.quiet():
                wrong = objection(peer, workload)
            if peer.compiles:
                torch.compiler.reset()
        except FAILURES as error:
            return f"{about}: left out, it does not run here: {summary(error)}"
        return None if wrong is None else f"{about}: left out, {wrong}"
