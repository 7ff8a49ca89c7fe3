"""A race: one workload, stepped in turn by us, by a batch of peers, and by the limit."""

from __future__ import annotations

import gc
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fusedopt.bench import limits, memory, quiet, suites
from fusedopt.bench.peers import Groups, Peer
from fusedopt.bench.rows import LIMIT, Row
from fusedopt.bench.timing import DISTURBED, NOISY, Step, Stopwatch, Timings, interleave
from fusedopt.bench.workload import Footprint, Tensors, Workload, step_of
from fusedopt.engines import eager

SHORT, SHORT_ROUNDS = 0.2, 5  # rounds of fewer seconds are timed so many times as often
HOST_SECONDS, HOST_ROUNDS = 0.3, 7

if TYPE_CHECKING:
    from fusedopt.bench.measure import Bench


@dataclass(frozen=True)
class Contender:
    """Somebody whose step is timed.

    Attributes:
        variant: The name in reports.
        version: Of the package.
        build: Makes the optimizer of param groups.
        peer: Who it is; None for ours.
        option: What selects it on the command line.
    """

    variant: str
    version: str
    build: Callable[[Groups], torch.optim.Optimizer]
    peer: Peer | None
    option: tuple[str, ...]


def summary(error: Exception) -> str:
    """The first line of an error, and its kind."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}"


def _kernels(events: Iterable[Any]) -> int:
    """Kernels among a profiler's events, without copies and what the host says of itself."""
    names = [event.name() for event in events if event.device_type() != torch.autograd.DeviceType.CPU]
    return sum(not name.lower().startswith(("memcpy", "memset", "optimizer.")) for name in names)


def _operators(events: Iterable[Any]) -> int:
    """Operators among a profiler's events that called no other: those that end before the next one starts."""
    spans = sorted((e.start_ns(), -e.duration_ns()) for e in events if "::" in e.name())
    following = [start for start, _ in spans[1:]] + [math.inf]
    return sum(later >= start - length for (start, length), later in zip(spans, following, strict=False))


class Arena:
    """Tensors of a workload, the limit, and our optimizers, which all batches of peers are raced against.

    Args:
        bench: What to measure.
        workload: What is stepped.
        footprint: Of ours.
        contenders: Ours.
        sweep: What rows are a point of.
    """

    def __init__(
        self, bench: Bench, workload: Workload, footprint: Footprint, contenders: list[Contender], sweep: str | None
    ) -> None:
        self._bench, self._workload, self._sweep = bench, workload, sweep
        self._device = torch.device(workload.device)
        self._tensors = Tensors(workload)
        self._watch = Stopwatch(self._device, workload.cache)
        self._moved = footprint.moved(workload)
        self._limits = limits.limits(workload.kind, self._moved, len(footprint.states))
        self._ours = [(c, *self._built(c)) for c in contenders]

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.clear()
        self._limits.clear()
        del self._tensors, self._watch
        torch.compiler.reset()  # compiled steps of other optimizers count against the compiler's limit for one function

    def _built(self, contender: Contender) -> tuple[torch.optim.Optimizer, Step]:
        optimizer = contender.build(self._tensors.groups())
        step = step_of(optimizer, self._tensors.params, self._workload)
        with quiet.quiet():
            step()  # makes the states, and compiles
        return optimizer, step

    def race(self, others: list[Contender], *, first: bool) -> list[Row]:
        """Rows of some peers; of ours and the limit too in the first batch."""
        gc.collect()  # the states of the batch before
        running = list(self._ours)
        for other in others:
            self._bench.report(f"building {other.variant}")
            try:
                running.append((other, *self._built(other)))
            except Exception as error:  # whatever a package raises
                about = f"{other.variant} {other.version}, {self._workload.title()}"
                self._bench.note(f"{about}: left out: {summary(error)}")
        variants = {c.variant: step for c, _, step in running} | {name: lim.step for name, lim in self._limits.items()}
        rounds, warmup = self._bench.repeats, self._workload.case.warmup
        if self._round_seconds(variants.values()) < SHORT:
            rounds *= SHORT_ROUNDS
        total = rounds + warmup
        done = iter(range(1, total + 1))
        timings = interleave(
            variants, self._watch, rounds, warmup, lambda: self._bench.report(f"round {next(done)} of {total}")
        )
        rows = []
        for contender, optimizer, step in running:
            if contender.peer is None and not first:
                continue
            row = self._row(contender.variant, contender.version, timings, contender.option)
            self._bench.report(f"looking at {contender.variant}")
            self._inspect(row, contender, optimizer, step)
            rows.append(row)
        if first:
            option = running[0][0].option
            rows += [self._row(name, lim.how, timings, option) for name, lim in self._limits.items()]
        return rows

    def _round_seconds(self, steps: Iterable[Step]) -> float:
        start = time.perf_counter()
        for step in steps:
            self._watch(step)
        return time.perf_counter() - start

    def _row(self, variant: str, version: str, timings: Timings, option: Iterable[str]) -> Row:
        w, t = self._workload, timings.seconds(variant)
        limit = self._limits.get(variant)
        scale = self._moved / limit.nbytes if limit else 1.0
        row = Row(
            suite=w.suite.name,
            tensors=len(w.suite.shapes),
            numel=w.suite.numel,
            groups=len(w.suite.groups),
            optimizer=w.case.name,
            dtype=w.dtype,
            device=w.device,
            clip=w.clip,
            amp=w.amp,
            cache=w.cache,
            variant=variant,
            version=version,
            storage="full",
            same_update=None,
            note=None,
            median=t.median * scale,
            q1=t.q1 * scale,
            q3=t.q3 * scale,
            rounds=timings.rounds,
            bytes=self._moved,
            gbps=self._moved / (t.median * scale) / 1e9,
            others=timings.others,
            sweep=self._sweep,
            command=self.command(option),
        )
        row.noisy = t.noise > NOISY or (timings.others or 0) > DISTURBED
        if LIMIT in self._limits:
            row.limit = timings.ratio(LIMIT, variant).median * self._moved / self._limits[LIMIT].nbytes / scale
        base = self._ours[0][0].variant
        if limit is None and variant != base:
            ratio = timings.ratio(variant, base)
            row.ratio, row.ratio_q1, row.ratio_q3 = ratio.median, ratio.q1, ratio.q3
            row.noisy |= ratio.noise > NOISY
        if self._device.type != "cpu":
            row.host = timings.returned(variant) * 1e6
        return row

    def _inspect(self, row: Row, contender: Contender, optimizer: torch.optim.Optimizer, step: Step) -> None:
        """What is not a matter of time: launches, memory, host work, and whether the update is the same."""
        peer, params = contender.peer, self._tensors.params
        row.same_update = peer is None or peer.differs is None
        row.note, row.storage = (peer.differs, peer.storage) if peer else (None, "full")
        row.peak_memory = memory.peak(step, self._device)
        own = 2 * sum(p.nbytes for p in params) + memory.state_bytes(optimizer)
        row.bytes_per_parameter = own / max(1, self._workload.suite.numel)
        row.launches = self._launches(contender, optimizer, step)
        if self._device.type == "cpu" and not (peer and peer.compiles):
            row.host = self._host(contender) * 1e6

    def _launches(self, contender: Contender, optimizer: torch.optim.Optimizer, step: Step) -> int | None:
        on_cpu, peer = self._device.type == "cpu", contender.peer
        if on_cpu and peer and peer.compiles:
            return None  # the profiler does not see what was compiled
        kinds = torch.profiler.ProfilerActivity
        with quiet.quiet(), torch.profiler.profile(activities=[kinds.CPU if on_cpu else kinds.CUDA]) as profile:
            step()
            if not on_cpu:
                torch.get_device_module(self._device).synchronize()
        events = profile.profiler.kineto_results.events()  # profile.events() takes 40 times as long
        if not on_cpu:
            return _kernels(events) or None
        if peer is not None:
            return _operators(events) + peer.calls * len(self._tensors.params)
        return _operators(events) + sum(plan.__module__ != eager.__name__ for plan in optimizer._plans)

    def _host(self, contender: Contender) -> float:
        """Seconds of a step that has next to nothing to move."""
        tensors = Tensors(self._workload, single=True)
        step = step_of(contender.build(tensors.groups()), tensors.params, self._workload)
        for _ in range(2):
            step()
        taken: list[float] = []
        end = time.perf_counter() + HOST_SECONDS
        while len(taken) < HOST_ROUNDS and (not taken or time.perf_counter() < end):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def command(self, option: Iterable[str]) -> str:
        """What measures one row again."""
        w, grouped = self._workload, self._workload.suite
        words = ["fusedopt", "bench", "--suite", w.suite.name, "--optimizer", w.case.name, "--dtype", w.dtype]
        words += ["--device", w.device, "--cache", w.cache, *option]
        words += ["--groups", str(len(grouped.groups))] if grouped != suites.find(grouped.name) else []
        words += ["--clip", str(w.clip)] if w.clip is not None else []
        words += ["--amp"] if w.amp else []
        return shlex.join([*words, "--repeats", str(self._bench.repeats)])
