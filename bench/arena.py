"""A race: one workload, stepped in turn by us, by a batch of peers, and by the limit."""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace

import torch

from fusedopt.bench import limits, looks, memory, quiet, suites
from fusedopt.bench.contenders import FAILURES, Contender, Course, Running, summary
from fusedopt.bench.rows import LIMIT, Row
from fusedopt.bench.timing import DISTURBED, NOISY, Stopwatch, Timings, interleave
from fusedopt.bench.workload import DTYPES, Footprint, Step, TensorBytes, Tensors, Workload, step_of

# Rounds are timed up to five times as often as asked for, where that takes no longer than two seconds.
MOST_TIMES, EXTRA_SECONDS = 5, 2.0


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
        self, bench: Course, workload: Workload, footprint: Footprint, contenders: list[Contender], sweep: str | None
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
        held = self._bytes_of(contender)
        moved = held.moved + 2 * state_bytes + self._footprint.measured(self._workload)
        row = self._row(contender.variant, contender.version, timings, contender.option, moved)
        row.note, row.storage = (peer.differs, peer.storage) if peer else (None, "full")
        row.same_update = row.note is None
        if stored := contender.stored:
            row.note, row.storage, row.same_update = stored.about, stored.name, stored.is_same_update
        row.states = kind if state_bytes else None
        of_all = not self._workload.case.algorithms  # else some parameters have fewer states than others
        if row.note is None and of_all and state_bytes < self._workload.suite.numel * sum(self._footprint.states):
            row.note = f"its states are {kind}"
        row.bytes_per_parameter = (held.resident + state_bytes) / max(1, self._workload.suite.numel)
        looks.look(row, one, self._workload_of(contender), self._watch, self._bench)
        return row

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
