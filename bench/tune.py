"""``fusedopt bench tune``: which choices of the GPU engines are the fastest, on which workloads.

JSON::

    {"arch": compute capability, "device": name or null, "commit", "versions",
     "variants": [{"name", "engine", "compiled": whether; null if the run ended before; "reason": why not, or null}],
     "workloads": [names], "notes": [what was left out, and why],
     "rows": [{"variant", "engine", "workload", "median", "q1", "q3" (seconds on the device), "of_copy": GB/s over those
               of a copy in the same round, "ratio", "ratio_q1", "ratio_q3": time over the default's}],
     "winners": [{"workload", "engine", "variant", "ratio", "ratio_q3"}]}

After ``--dry-run`` rows and winners are empty.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
from rich.table import Table

import fusedopt
from fusedopt.bench import limits, suites, timing
from fusedopt.bench.contenders import FAILURES, summary
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.rows import COPY, facts
from fusedopt.bench.variants import VARIANTS, Variant, build
from fusedopt.bench.workload import Footprint, Step, Tensors, Workload, ours, step_of
from fusedopt.cli import report
from fusedopt.context import StepRequest
from fusedopt.inspection import ahead
from fusedopt.inspection.triton import unavailable
from fusedopt.passes import Pass
from fusedopt.scaling import Scaling

DEFAULT, DEFAULT_ARCH = "default", "90"
ROUNDS, WARMUP = 20, 3
# Cycles for which the device is held before a step, so that the host is ahead of it: 1 ms, and 1 us for each tensor.
HOLD, HOLD_TENSOR = 2_000_000, 2_000
WORKERS = min(8, os.cpu_count() or 1)
NAME_WIDTH, CELL_WIDTH = 28, 13  # of a table in the terminal


@dataclass(frozen=True)
class Case:
    """What variants are compared on.

    Attributes:
        name: In the table.
        suite: Of tensors.
        more: Of the workload.
        only: ``norm``: the norm is measured, and nothing is updated; ``update``: it was measured before. Else empty.
        beside: Whether a kernel beside it occupies processors; see bench/occupant.py.
    """

    name: str
    suite: str
    more: dict[str, Any]
    only: str = ""
    beside: bool = False

    def workload(self, device: str) -> Workload:
        """What is stepped."""
        return Workload(suites.find(self.suite), CASES["AdamW"], device=device, **self.more)

    def nbytes(self, what: Workload) -> int:
        """Bytes that have to be moved."""
        footprint = Footprint.of(what)
        if self.only == "norm":
            return what.suite.numel * footprint.param
        return footprint.moved(replace(what, clip=None) if self.only == "update" else what)


WORKLOADS = (
    Case("gpt2", "gpt2", {}),
    Case("gpt2 clip", "gpt2", {"clip": 1.0}),
    Case("gpt2 norm only", "gpt2", {"clip": 1.0}, only="norm"),
    Case("gpt2 update only", "gpt2", {"clip": 1.0}, only="update"),
    Case("gpt2 bf16", "gpt2", {"dtype": "bf16"}),
    Case("gpt2 misaligned", "gpt2", {"gradients": "misaligned"}),
    Case("1000x1000", "1000x1000", {}),
    Case("10000x64", "10000x64", {}),
    Case("one element", "1x1", {}),
    Case("gpt2 beside 16 SMs", "gpt2", {}, beside=True),
    Case("gpt2 clip beside 16 SMs", "gpt2", {"clip": 1.0}, beside=True),
)


def run(args: argparse.Namespace) -> int:
    """Compile the variants, time them, print the table and who wins."""
    there = torch.cuda.is_available()
    if not there and not args.dry_run:
        raise report.CommandError("tune needs a GPU; with --dry-run it compiles the variants without one")
    arch = "{}{}".format(*torch.cuda.get_device_capability()) if there else DEFAULT_ARCH
    chosen = [v for v in VARIANTS if v.engine in (args.engine or (v.engine,))]
    states = {str(v): {"name": v.name, "engine": v.engine, "compiled": None, "reason": None} for v in chosen}
    document: dict[str, Any] = {
        "arch": arch,
        **{k: v for k, v in facts(torch.device("cuda" if there else "cpu"), []).items() if k != "machine"},
        "variants": list(states.values()),
        "workloads": [case.name for case in WORKLOADS],
        "notes": [],
        "rows": [],
        "winners": [],
    }
    try:
        for name, reason in compiled(chosen, arch):
            states[name] |= {"compiled": reason is None, "reason": reason}
        report.write_json(args.json, document)
        if not args.dry_run:
            _race(document, [v for v in chosen if states[str(v)]["compiled"]], args)
    except KeyboardInterrupt:  # what there is is worth having
        for v in chosen:
            if states[str(v)]["compiled"] is None and v.is_built():
                states[str(v)]["compiled"] = True
        document["notes"].append("the run was interrupted: what follows is missing")
        report.write_json(args.json, document)
        _show(document)
        return 130
    _show(document)
    return int(bool(document["notes"]) or not all(state["compiled"] for state in states.values()))


def _race(document: dict[str, Any], chosen: list[Variant], args: argparse.Namespace) -> None:
    """Time variants on all workloads; the file always has what there is so far."""
    for case in WORKLOADS:
        try:
            document["rows"] += raced(case, chosen, args.rounds)
        except FAILURES as error:  # the others are worth timing all the same
            document["notes"].append(f"{case.name}: FAILED: {summary(error)}")
        document["winners"] = winners(document["rows"])
        report.write_json(args.json, document)


def compiled(chosen: list[Variant], arch: str) -> Iterator[tuple[str, str | None]]:
    """Compiles variants; CUDA's beside Triton's.

    Yields:
        The engine and name of one, and why it does not compile; None if it does.
    """
    own, theirs = ([v for v in chosen if v.engine == engine] for engine in ("cuda", "triton"))
    # An interrupt is this process's to handle: the others end what they are at.
    pool = ProcessPoolExecutor(WORKERS, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    with ThreadPoolExecutor(1) as aside, pool:
        builds = aside.submit(build, own, arch) if own else None
        jobs = {pool.submit(_ahead, v.name, arch): str(v) for v in theirs}
        try:
            for job in as_completed(jobs):
                yield jobs[job], job.result()
            built = builds.result() if builds else {}
        finally:
            pool.shutdown(cancel_futures=True)
    yield from ((str(v), built[v.name]) for v in own)


def _ahead(name: str, arch: str) -> str | None:
    """Why the Triton engine's kernels of a variant do not compile; None if they do."""
    if reason := unavailable(arch):
        return reason
    (variant,) = (v for v in VARIANTS if (v.engine, v.name) == ("triton", name))
    try:
        if torch.cuda.is_available():
            _stepped(variant)
            return None
        with variant.applied():
            for kernel in ahead.specialised([fusedopt.AdamW.rule], ["fp32"], arch, {})[:2]:
                ahead.compiled(kernel, arch)
    except Exception as error:  # whatever the compiler raises
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return None


def _stepped(variant: Variant, device: str = "cuda") -> None:
    """A step of each kind on few tensors; what it compiles is in Triton's cache when the race begins."""
    for dtype, clip in (("fp32", 1.0), ("bf16", None)):
        what = Workload(suites.find("2x4096"), CASES["AdamW"], dtype=dtype, device=device, clip=clip)
        _step(variant, what, Tensors(what), "")()


def raced(case: Case, chosen: list[Variant], rounds: int, device: str = "cuda") -> list[dict[str, Any]]:
    """Rows of variants that take turns on a workload, beside a copy of as many bytes."""
    gc.collect()  # what the case before left, which may be half of the memory
    what = case.workload(device)
    tensors, nbytes = Tensors(what), case.nbytes(what)
    copy = limits.copy(device, nbytes)
    steps: dict[str, Step] = {COPY: copy.step}
    for variant in chosen:
        steps[str(variant)] = _step(variant, what, tensors, case.only)
    hold = HOLD + HOLD_TENSOR * len(tensors.params)
    with report.progress_bar() as bar:
        task = bar.add_task(case.name, total=WARMUP + rounds)
        watch = timing.Stopwatch(torch.device(device), "cold", hold=hold, beside=_beside() if case.beside else None)
        timings = timing.interleave(steps, watch, rounds, WARMUP, lambda: bar.advance(task))
    rows = []
    for variant in chosen:
        name, default = str(variant), f"{variant.engine} {DEFAULT}"
        if {name, default} & timings.failed.keys():
            report.console.print(f"{case.name}: {name}: {timings.failed.get(name)}", markup=False)
            continue
        seconds, ratio = timings.seconds(name), timings.ratio(name, default)
        rows.append(
            {"variant": variant.name, "engine": variant.engine, "workload": case.name}
            | {"median": seconds.median, "q1": seconds.q1, "q3": seconds.q3}
            | {"of_copy": timings.ratio(COPY, name).median * nbytes / copy.nbytes}
            | {"ratio": ratio.median, "ratio_q1": ratio.q1, "ratio_q3": ratio.q3}
        )
    return rows


def _beside() -> timing.Beside:
    from fusedopt.bench.occupant import Occupant  # needs triton

    return Occupant()


def _step(variant: Variant, what: Workload, tensors: Tensors, only: str) -> Step:
    with variant.applied():
        optimizer = ours(what, tensors.groups(), variant.engine)
        optimizer.step()
    (plan,) = optimizer._plans
    if not variant.one_launch:
        plan._launcher.in_one_launch = False

    def measure() -> None:
        plan.scan()
        plan.run(Pass.NORM, StepRequest(Scaling()), None)
        plan.finish()

    squared = plan.status.squared_norm  # what the step has measured; a plan does not copy its own

    def update() -> None:
        plan.scan()
        plan.run(Pass.UPDATE, StepRequest(Scaling(), what.clip or math.inf), squared)
        plan.finish()

    return {"norm": measure, "update": update}.get(only) or step_of(optimizer, tensors.params, what)


def winners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest variant of each engine on each workload; the default, unless it is beaten in three rounds of four."""
    found = []
    for key in dict.fromkeys((row["workload"], row["engine"]) for row in rows):
        alike = [row for row in rows if (row["workload"], row["engine"]) == key]
        best = min(alike, key=lambda row: row["ratio"])
        if best["ratio_q3"] >= 1:
            best = next(row for row in alike if row["variant"] == DEFAULT)
        found.append({name: best[name] for name in ("workload", "engine", "variant", "ratio", "ratio_q3")})
    return found


def _show(document: dict[str, Any]) -> None:
    """Print what compiles, microseconds and fractions of the copy, and who wins."""
    rows = document["rows"]
    timed = list(dict.fromkeys(row["workload"] for row in rows))
    fit = max(1, (report.console.width - NAME_WIDTH) // CELL_WIDTH)
    for start in range(0, max(1, len(timed)), fit):
        report.console.print(_table(document, timed[start : start + fit]))
    if left := [name for name in document["workloads"] if name not in timed]:
        report.console.print(f"Not timed: {', '.join(left)}", markup=False)
    for line in document["notes"]:
        report.console.print(line, markup=False)
    for w in document["winners"]:
        won = f"{w['variant']} wins by {1 - w['ratio']:.1%}" if w["variant"] != DEFAULT else "nothing beats the default"
        report.console.print(f"{w['engine']}, {w['workload']}: {won}", markup=False)


def _table(document: dict[str, Any], names: list[str]) -> Table:
    """What became of the variants on some workloads."""
    rows = document["rows"]
    title = f"Microseconds (of the copy's bandwidth) on sm_{document['arch']}"
    made = report.table(title if rows else f"For sm_{document['arch']}", "variant", "", *names)
    cells = {(r["engine"], r["variant"], r["workload"]): f"{r['median'] * 1e6:.0f} ({r['of_copy']:.2f})" for r in rows}
    for v in document["variants"]:
        key = v["engine"], v["name"]
        state = {True: "" if rows else "compiles", False: v["reason"], None: "not compiled yet"}[v["compiled"]]
        made.add_row(" ".join(key), state, *(cells.get((*key, name), "") for name in names))
    return made
