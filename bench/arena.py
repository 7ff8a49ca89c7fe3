"""A race: one workload, stepped in turn by us, by a batch of peers, and by the limit."""

from __future__ import annotations

import gc
import math
import shlex
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fusedopt.bench import limits, memory, quiet, suites
from fusedopt.bench.peers import Groups, Peer
from fusedopt.bench.rows import LIMIT, Row
from fusedopt.bench.stored import Stored
from fusedopt.bench.timing import DISTURBED, NOISY, Stopwatch, Timings, interleave
from fusedopt.bench.workload import DTYPES, Footprint, Step, TensorBytes, Tensors, Workload, step_of

if TYPE_CHECKING:
    from fusedopt.bench.measure import Bench

# Rounds are timed up to five times as often as asked for, where that takes no longer than two seconds.
MOST_TIMES, EXTRA_SECONDS = 5, 2.0
HOST_SECONDS, HOST_ROUNDS = 0.3, 7
T = TypeVar("T")
FAILURES = (Exception, SystemExit)  # whatever a package raises; one ends the process when it finds no triton


@dataclass(frozen=True)
class Contender:
    """Somebody whose step is timed.

    Attributes:
        variant: The name in reports.
        version: Of the package.
        build: Makes the optimizer of param groups.
        peer: Who it is; None for ours.
        option: What selects it on the command line.
        stored: How ours stores less than its rule has; None if in full.
    """

    variant: str
    version: str
    build: Callable[[Groups], torch.optim.Optimizer]
    peer: Peer | None
    option: tuple[str, ...]
    stored: Stored | None = None


@dataclass(frozen=True)
class Running:
    """A contender's optimizer on tensors of a workload.

    Attributes:
        contender: Who.
        tensors: Which.
        optimizer: Its optimizer, which has states.
        step: What its users call for a step.
    """

    contender: Contender
    tensors: Tensors
    optimizer: torch.optim.Optimizer
    step: Step


def summary(error: BaseException) -> str:
    """The first line of an error, and its kind."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}"


def kernels(events: Iterable[Any]) -> list[tuple[str, float]]:
    """Names and seconds of kernels among a profiler's events, without copies and what the host says of itself."""
    on_device = [event for event in events if event.device_type() != torch.autograd.DeviceType.CPU]
    own = [e for e in on_device if not e.name().lower().startswith(("memcpy", "memset", "optimizer."))]
    return [(event.name(), event.duration_ns() / 1e9) for event in own]


def operators(events: Iterable[Any]) -> int:
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
        self._tensors: dict[Workload, Tensors] = {}  # of each dtype
        self._watch = Stopwatch(self._device, workload.cache, self._renew)
        self._footprint = footprint
        self._moved = footprint.moved(workload)
        self._limits = limits.limits(workload.kind, self._moved, len(footprint.states), workload.case.measured)
        self._ours = self._built(contenders)
        if not self._ours:
            raise RuntimeError("none of fusedopt's engines can step it")

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.clear()
        self._limits.clear()
        del self._tensors, self._watch
        torch.compiler.reset()  # compiled steps of other optimizers count against the compiler's limit for one function

    def _built(self, contenders: list[Contender]) -> list[Running]:
        """Those whose optimizer can be made and does a step, which makes its states and compiles what there is to."""
        built = []
        for contender in contenders:
            self._bench.report(f"building {contender.variant}")
            try:
                with quiet.quiet():
                    tensors = self._tensors_of(contender)
                    optimizer = contender.build(tensors.groups())
                    step = step_of(optimizer, tensors.params, self._workload)
                    step()
                built.append(Running(contender, tensors, optimizer, step))
            except FAILURES as error:
                self._leave_out(contender, error)
        return built

    def _workload_of(self, contender: Contender) -> Workload:
        """Its tensors' types are its own."""
        return replace(self._workload, dtype=contender.stored.dtype) if contender.stored else self._workload

    def _tensors_of(self, contender: Contender) -> Tensors:
        workload = self._workload_of(contender)
        if workload not in self._tensors:
            self._tensors[workload] = Tensors(workload)
        return self._tensors[workload]

    def _bytes_of(self, contender: Contender) -> TensorBytes:
        param = DTYPES[self._workload_of(contender).dtype].itemsize
        return replace(self._footprint, param=param).tensor_bytes(self._workload)

    def _renew(self) -> None:
        for tensors in self._tensors.values():
            tensors.renew()

    def _leave_out(self, contender: Contender, error: BaseException) -> None:
        about = f"{contender.variant} {contender.version}, {self._workload.title()}"
        self._bench.note(f"{about}: left out: {summary(error)}")

    def race(self, others: list[Contender], *, first: bool) -> list[Row]:
        """Rows of some peers; of ours and the limit too in the first batch."""
        gc.collect()  # the states of the batch before
        running = self._ours + self._built(others)
        steps = {one.contender.variant: one.step for one in running}
        steps |= {name: limit.step for name, limit in self._limits.items()}
        rounds, warmup = self._bench.repeats * self._times(steps.values()), self._workload.case.warmup
        total = rounds + warmup
        done = iter(range(1, total + 1))
        timings = interleave(
            steps, self._watch, rounds, warmup, lambda: self._bench.report(f"round {next(done)} of {total}")
        )
        rows = []
        for one in running:
            if (error := timings.failed.get(one.contender.variant)) is not None:
                self._leave_out(one.contender, error)
            elif one.contender.peer is not None or first:
                self._bench.report(f"looking at {one.contender.variant}")
                rows.append(self._inspected(one, timings))
        if first:
            option = running[0].contender.option
            rows += [self._row(name, limit.how, timings, option, self._moved) for name, limit in self._limits.items()]
        if not all(torch.isfinite(p.grad).all() for t in self._tensors.values() for p in t.params):
            self._bench.note(f"{self._workload.title()}: somebody left gradients that are not finite")
        return rows

    def _times(self, steps: Iterable[Step]) -> int:
        """How many times as often as asked for rounds are timed."""
        start = time.perf_counter()
        for step in steps:
            with suppress(Exception):  # interleave says who raises
                self._watch(step)
        seconds = (time.perf_counter() - start) * self._bench.repeats
        return min(MOST_TIMES, max(1, int(EXTRA_SECONDS / seconds)))

    def _row(self, variant: str, version: str, timings: Timings, option: Iterable[str], moved: int) -> Row:
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
            gradients=w.gradients,
            variant=variant,
            version=version,
            storage="full",
            states=None,
            same_update=None,
            note=None,
            median=t.median * scale,
            q1=t.q1 * scale,
            q3=t.q3 * scale,
            rounds=timings.rounds,
            bytes=moved,
            gbps=moved / (t.median * scale) / 1e9,
            others=timings.others,
            sweep=self._sweep,
            command=self.command(option),
        )
        row.noisy = t.noise > NOISY
        if LIMIT not in timings.failed:
            row.limit = timings.ratio(LIMIT, variant).median / scale * moved / self._limits[LIMIT].nbytes
        base = self._ours[0].contender.variant
        if limit is None and variant != base and base not in timings.failed:
            ratio = timings.ratio(variant, base)
            row.ratio, row.ratio_q1, row.ratio_q3 = ratio.median, ratio.q1, ratio.q3
            row.noisy |= ratio.noise > NOISY
        if self._device.type == "cpu":
            row.noisy |= (timings.others or 0) > DISTURBED
        return row

    def _inspected(self, one: Running, timings: Timings) -> Row:
        """A row with what is not a matter of time: launches, memory, host work, and whether the update is the same."""
        contender, peer = one.contender, one.contender.peer
        state_bytes, kind = memory.states(one.optimizer)
        moved = self._bytes_of(contender).moved + 2 * state_bytes + self._footprint.measured(self._workload)
        row = self._row(contender.variant, contender.version, timings, contender.option, moved)
        row.note, row.storage = (peer.differs, peer.storage) if peer else (None, "full")
        row.same_update = row.note is None
        if stored := contender.stored:
            row.note, row.storage, row.same_update = stored.about, stored.name, stored.is_same_update
        row.states = kind if state_bytes else None
        if row.note is None and state_bytes < self._workload.suite.numel * sum(self._footprint.states):
            row.note = f"its states are {kind}"
        row.bytes_per_parameter = (self._bytes_of(contender).resident + state_bytes) / max(
            1, self._workload.suite.numel
        )
        row.peak_memory = self._found(contender, "memory", lambda: memory.peak(one.step, self._device))
        row.launches, row.device_time = self._found(contender, "launches", lambda: self._profiled(one)) or (None, None)
        row.host = self._found(contender, "host", lambda: self._host(one))
        return row

    def _found(self, contender: Contender, what: str, find: Callable[[], T]) -> T | None:
        """A figure; None and a note where it cannot be had."""
        try:
            return find()
        except FAILURES as error:
            self._bench.note(f"{contender.variant}: {what} is not known here: {summary(error)}")
            return None

    def _profiled(self, one: Running) -> tuple[int | None, float | None]:
        """Launches of a step; on a GPU also how long its kernels ran, in the state of caches that is timed."""
        on_cpu, peer = self._device.type == "cpu", one.contender.peer
        if on_cpu and peer and peer.compiles:
            return None, None  # the profiler does not see what was compiled
        kinds = torch.profiler.ProfilerActivity
        if not on_cpu:
            self._watch.prepare(one.step)
            self._synchronize()
        with quiet.quiet(), torch.profiler.profile(activities=[kinds.CPU if on_cpu else kinds.CUDA]) as profile:
            one.step()
            self._synchronize()
        events = profile.profiler.kineto_results.events()  # profile.events() takes 40 times as long
        if not on_cpu:
            found = kernels(events)
            return (len(found), sum(seconds for _, seconds in found)) if found else (None, None)
        if peer is not None:
            return operators(events) + peer.calls * len(one.tensors.params), None
        return operators(events) + sum(plan.name != "eager" for plan in one.optimizer._plans), None

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.get_device_module(self._device).synchronize()

    def _host(self, one: Running) -> float | None:
        """Microseconds of host work in a step.

        On a GPU, until the call returns. On a CPU, those of a step that has next to nothing to move; None for what is
        compiled, which would have to be compiled again for such tensors.
        """
        step, tensors = one.step, one.tensors
        if self._device.type == "cpu":
            if one.contender.peer and one.contender.peer.compiles:
                return None
            tensors = Tensors(self._workload_of(one.contender), single=True)
            step = step_of(one.contender.build(tensors.groups()), tensors.params, self._workload)
        for _ in range(2):
            step()
        taken: list[float] = []
        end = time.perf_counter() + HOST_SECONDS
        while len(taken) < HOST_ROUNDS and (not taken or time.perf_counter() < end):
            tensors.renew()
            self._synchronize()
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken) * 1e6

    def command(self, option: Iterable[str]) -> str:
        """What measures one row again."""
        w, grouped = self._workload, self._workload.suite
        words = ["fusedopt", "bench", "--suite", w.suite.name, "--optimizer", w.case.name, "--dtype", w.dtype]
        words += ["--device", w.device, "--cache", w.cache, *option]
        words += ["--groups", str(len(grouped.groups))] if grouped != suites.find(grouped.name) else []
        words += ["--clip", str(w.clip)] if w.clip is not None else []
        words += ["--amp"] if w.amp else []
        words += [f"--{w.gradients}-grads"] if w.gradients != "kept" else []
        return shlex.join([*words, "--repeats", str(self._bench.repeats)])
