"""The CPU benchmark: ``python -m fusedopt.bench.cpu``. What figures mean: docs/measurements.md."""

from __future__ import annotations

import argparse
import gc
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

import fusedopt
from fusedopt.bench import harness, memory, report
from fusedopt.bench.harness import Row, Variant, interleave, timed_row
from fusedopt.bench.limits import StreamLimit, step_bytes
from fusedopt.bench.peers import BY_NAME, CASES, Case
from fusedopt.bench.suites import GPT2, TEN_THOUSAND, THOUSAND, Suite, parameters
from fusedopt.engines import cpu

SECTIONS = ("limit", "torch", "small", "host", "clip", "memory")
OURS = "fusedopt"
LIMIT = "limit"

LIMIT_TARGET = 0.95
SMALL_TARGETS = ((TEN_THOUSAND, 30.0), (THOUSAND, 6.0))
SMALL_ROUNDS = 5  # small steps are short: so many times the rounds
FLUSHED = 2**26  # elements, 256 MiB: more than any cache
WARM_STEPS = 3
HOST_COUNTS = (500, 1000, 2000, 4000, 8000)
HOST_RANGES = ((500, 4000), (4000, 8000))  # torch's objects fit in a cache of 32 MiB, and do not
HOST_ELEMENTS = 8
HOST_TARGET = 0.15
CLIP_TARGET = 1.3
MEMORY_TARGET = 4.0

Ticker = Callable[[], object]


def steps(case: Case, params: list[Tensor], *, peers: bool) -> dict[str, Variant]:
    """Ours and the installed peers, all stepping the same parameters with states of their own."""
    made = {OURS: Variant(case.build(params).step)}
    for peer in case.peers if peers else ():
        optimizer = peer.build(params, case.options)
        if optimizer is not None:
            made[peer.label] = Variant(optimizer.step)
    return made


def judge_fastest(rows: Iterable[Row], target: float) -> None:
    """Hold the fastest peer against a target."""
    peers = [row for row in rows if row.ratio is not None]
    if peers:
        fastest = min(peers, key=lambda row: row.ratio)
        fastest.judge("ratio", fastest.ratio, target)


def large(
    params: list[Tensor], limit: StreamLimit, case: Case, sections: Sequence[str], repeats: int, tick: Ticker
) -> list[Row]:
    """Sections ``limit`` and ``torch``: ours, the limit and the peers in one run."""
    nbytes = step_bytes(GPT2.numel, case.states)
    variants = steps(case, params, peers="torch" in sections)
    variants[LIMIT] = Variant(limit.step(case.states))
    timings = interleave(variants, repeats, case.warmup, tick)

    def row(section: str, variant: str) -> Row:
        return timed_row(section, case.name, variant, timings, nbytes, OURS, LIMIT)

    rows = []
    if "limit" in sections:
        rows = [row("limit", OURS), row("limit", LIMIT)]
        rows[0].judge("limit", rows[0].limit, LIMIT_TARGET)
    if "torch" in sections:
        mine = [row("torch", variant) for variant in variants if variant != LIMIT]
        judge_fastest(mine, case.target)
        rows += mine
    return rows


def warm(step: Callable[[], object], then: Callable[[], object] = lambda: None) -> Variant:
    """A step right after others of its own: what it touches is in cache, as far as it fits."""

    def before() -> None:
        for _ in range(WARM_STEPS):
            step()
        then()

    return Variant(step, before)


def cold(step: Callable[[], object], flush: Tensor) -> Variant:
    """A step after much other memory was touched, as a model's backward pass does."""
    return Variant(step, before=lambda: flush.mul_(1))


def small(suite: Suite, target: float, repeats: int, tick: Ticker) -> list[Row]:
    """Section ``small``: tensors so small that everything but bytes decides."""
    case, params = BY_NAME["AdamW"], parameters(suite)
    limit, flush = StreamLimit(suite.numel), torch.ones(FLUSHED)
    made = steps(case, params, peers=True) | {LIMIT: Variant(limit.step(case.states))}
    nbytes = step_bytes(suite.numel, case.states)
    rows = []
    for cache in ("warm", "cold"):
        variants = {name: warm(v.step) if cache == "warm" else cold(v.step, flush) for name, v in made.items()}
        timings = interleave(variants, repeats * SMALL_ROUNDS, case.warmup, tick)
        name = f"{suite.name} {cache}"
        judged = [timed_row("small", name, v, timings, nbytes, OURS, LIMIT) for v in variants if v != LIMIT]
        judge_fastest(judged, target)
        rows += judged
    return rows


def renewed(params: list[Tensor]) -> Callable[[], None]:
    """What gives every parameter the other one of two gradients, as a backward pass that allocates does."""
    sets = [[p.grad for p in params], [p.grad.clone() for p in params]]

    def renew() -> None:
        sets.reverse()
        for p, g in zip(params, sets[0], strict=True):
            p.grad = g

    return renew


def host(repeats: int, tick: Ticker) -> list[Row]:
    """Section ``host``: how step time grows with the number of tensors, when they hold next to nothing."""
    variants: dict[str, Variant] = {}
    flush = torch.ones(FLUSHED)
    labels = (OURS, f"{OURS}, new gradients", f"{OURS}, cold", "torch fused", "torch fused, cold")
    for n in HOST_COUNTS:
        params = parameters(Suite("", ((HOST_ELEMENTS,),) * n))
        ours, theirs = fusedopt.AdamW(params).step, torch.optim.AdamW(params, fused=True).step
        made = (
            warm(ours),
            warm(ours, renewed(params)),
            cold(ours, flush),
            warm(theirs),
            cold(theirs, flush),
        )
        variants |= {f"{label} {n}": variant for label, variant in zip(labels, made, strict=True)}
    timings = interleave(variants, repeats, 3, tick)
    rows = []
    for first, last in HOST_RANGES:
        counts = [n for n in HOST_COUNTS if first <= n <= last]
        nbytes = step_bytes(last * HOST_ELEMENTS, BY_NAME["AdamW"].states)
        for label in labels:
            row = timed_row("host", f"{first} to {last}", f"{label} {last}", timings, nbytes, f"{OURS} {last}")
            row.variant = label
            medians = [timings.seconds(f"{label} {n}").median for n in counts]
            slope = float(np.polyfit(counts, medians, 1)[0]) * 1e6
            if label in labels[:2]:
                row.judge("us", slope, HOST_TARGET, at_most=True)
            else:
                row.measure, row.value = "us", slope
            rows.append(row)
    return rows


def clip(params: list[Tensor], repeats: int, tick: Ticker) -> list[Row]:
    """Section ``clip``: global-norm clipping and the step, ours and in two calls of torch's."""
    case = BY_NAME["AdamW"]
    theirs = torch.optim.AdamW(params, fused=True)

    def two_calls(foreach: bool) -> Callable[[], None]:
        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=foreach)
            theirs.step()

        return step

    variants = {
        OURS: Variant(case.build(params, max_grad_norm=1.0).step),
        "torch clip loop + fused": Variant(two_calls(False)),
        "torch clip foreach + fused": Variant(two_calls(True)),
    }
    timings = interleave(variants, repeats, case.warmup, tick)
    nbytes = step_bytes(GPT2.numel, case.states) + 4 * GPT2.numel
    rows = [timed_row("clip", "AdamW, norm 1", v, timings, nbytes, OURS) for v in variants]
    judge_fastest(rows, CLIP_TARGET)
    return rows


def temporaries(params: list[Tensor], tick: Ticker) -> list[Row]:
    """Section ``memory``: the peak of a step above what was there before it."""
    builders: dict[str, Callable[[], torch.optim.Optimizer]] = {
        OURS: lambda: fusedopt.AdamW(params),
        f"{OURS}, clipped": lambda: fusedopt.AdamW(params, max_grad_norm=1.0),
        "torch fused": lambda: torch.optim.AdamW(params, fused=True),
        "torch for-loop": lambda: torch.optim.AdamW(params, foreach=False),
        "torch foreach": lambda: torch.optim.AdamW(params, foreach=True),
    }
    rows = []
    for variant, build in builders.items():
        optimizer = build()
        optimizer.step()  # makes the states
        optimizer.step()
        row = Row("memory", "AdamW", variant)
        growth = max(memory.peak_growth(optimizer.step) for _ in range(3))
        if variant.startswith(OURS):
            row.judge("MiB", growth, MEMORY_TARGET, at_most=True)
        else:
            row.measure, row.value = "MiB", growth
        rows.append(row)
        tick()
    return rows


def run(sections: Sequence[str], cases: Sequence[Case], repeats: int) -> list[Row]:
    """Measure.

    Args:
        sections: Some of ``SECTIONS``.
        cases: The optimizers of sections ``limit`` and ``torch``.
        repeats: Timed rounds of large steps.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    rows: list[Row] = []
    with Progress(*columns, console=Console(stderr=True)) as progress:

        def ticker(what: str, total: int) -> Ticker:
            task = progress.add_task(what, total=total)
            return lambda: progress.advance(task)

        if {"limit", "torch"} & set(sections):
            params, limit = parameters(GPT2), StreamLimit(GPT2.numel)
            for case in cases:
                rows += large(params, limit, case, sections, repeats, ticker(case.name, repeats + case.warmup))
                gc.collect()
            del params, limit
        if "small" in sections:
            for suite, target in SMALL_TARGETS:
                rows += small(suite, target, repeats, ticker(suite.name, 2 * (repeats * SMALL_ROUNDS + 2)))
        if "host" in sections:
            rows += host(repeats, ticker("host", repeats + 3))
        if {"clip", "memory"} & set(sections):
            params = parameters(GPT2)
            if "clip" in sections:
                rows += clip(params, repeats, ticker("clip", repeats + 2))
            if "memory" in sections and (reason := memory.available()) is None:
                rows += temporaries(params, ticker("memory", 5))
            elif "memory" in sections:
                progress.console.print(f"Section memory is left out: {reason}")
    return sorted(rows, key=lambda row: SECTIONS.index(row.section))


def chosen(names: tuple[str, ...]) -> Callable[[str], list[str]]:
    """An argparse type: a comma-separated choice of names."""

    def parse(text: str) -> list[str]:
        picked = [name.strip() for name in text.split(",")]
        unknown = [name for name in picked if name not in names]
        if unknown:
            raise argparse.ArgumentTypeError(f"no {', '.join(unknown)}; there are {', '.join(names)}")
        return picked

    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fusedopt.bench.cpu", description="Benchmark of the CPU engine.")
    only, cases = chosen(SECTIONS), chosen(tuple(BY_NAME))
    parser.add_argument("--only", type=only, default=list(SECTIONS), metavar="SECTIONS", help=", ".join(SECTIONS))
    parser.add_argument("--cases", type=cases, default=list(BY_NAME), help="optimizers of sections limit and torch")
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds of large steps (default 15)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to a file")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a target is missed")
    options = parser.parse_args(arguments)
    if (reason := cpu.available()) is not None:
        parser.exit(1, f"the CPU engine is not available: {reason}\n")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some peers are older than torch's deprecations
        rows = run(options.only, [c for c in CASES if c.name in options.cases], options.repeats)
    report.show(rows)
    if options.json:
        harness.write_json(options.json, rows, isa=cpu.load()[2], suite=GPT2.name, repeats=options.repeats)
    return int(options.strict and any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
