"""``fusedopt bench muon``: where the time of a Muon step on GPT-2 goes, beside torch's Muon and fused AdamW.

Variants take turns on the same shapes: the whole step; both launches, without the matrix function between them; torch's
two optimizers; and memory's limit for the launches: as many bytes as they name, 28 for each parameter, read and written
as AdamW does it. Of these, 4 bytes for each element of a matrix are written without having been read, which takes a
processor one more read; ``limit_reads`` counts that.

JSON::

    {"commit", "versions", "machine", "device", "parameters", "matrices": elements of these,
     "rows": [{"variant", "median", "q1", "q3" (seconds), "rounds", "ratio", "ratio_q1", "ratio_q3": time over ours,
               "limit", "limit_reads": of the launches, the fraction of the limit that they reach}]}
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from fusedopt.bench import timing
from fusedopt.bench.limits import limits
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.peers import offered
from fusedopt.bench.rows import LIMIT, facts
from fusedopt.bench.suites import Suite, gpt2
from fusedopt.bench.workload import Tensors, Workload, ours
from fusedopt.cli import report
from fusedopt.optimizers.muon_stacks import Stacks

ROUNDS, WARMUP = 7, 1
OURS, LAUNCHES, PAIR = "fusedopt", "fusedopt, launches alone", "torch Muon and fused AdamW"
BYTES, MORE = 28, 4  # of a parameter that are moved; and of a matrix that are read only to be written


def run(args: argparse.Namespace) -> int:
    """Time every variant, print the table."""
    case = CASES["Muon"]
    shapes = gpt2(args.width, args.layers)
    suite = Suite("gpt2", (shapes,), frozenset(shapes[:2]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    workload = Workload(suite, case, device=device)
    tensors = [Tensors(workload) for _ in range(3)]
    whole = ours(workload, tensors[0].groups(), "auto")
    apart = ours(workload, tensors[1].groups(), "auto")
    (pair,) = (peer for peer in offered(case, device) if peer.name == "torch-pair")
    torchs = pair.build(tensors[2].groups())
    limit = limits(device, BYTES * suite.numel, states=2)[LIMIT]
    steps = {OURS: whole.step, LAUNCHES: _without_function(apart.step), PAIR: torchs.step, LIMIT: limit.step}
    with report.progress_bar() as bar:
        task = bar.add_task("muon", total=WARMUP + args.rounds)
        watch = timing.Stopwatch(torch.device(device), "cold")
        timings = timing.interleave(steps, watch, args.rounds, WARMUP, lambda: bar.advance(task))
    if timings.failed:
        raise report.CommandError(f"a variant failed: {timings.failed}")
    matrices = sum(p.numel() for group in whole.param_groups if group["algorithm"] == "muon" for p in group["params"])
    document = facts(torch.device(device), []) | {"parameters": suite.numel, "matrices": matrices}
    document["rows"] = [_row(name, timings) for name in steps]
    share = timings.ratio(LIMIT, LAUNCHES).median * BYTES * suite.numel / limit.nbytes
    found = {"limit": share, "limit_reads": share * (1 + MORE * matrices / (BYTES * suite.numel))}
    document["rows"][1] |= found
    _show(document)
    report.write_json(args.json, document)
    return 0


def _without_function(step: Callable[[], Any]) -> Callable[[], None]:
    """A step that leaves matrices as they are between the launches."""
    apply = Stacks.apply

    def launches() -> None:
        Stacks.apply = lambda self, skipped: None
        try:
            step()
        finally:
            Stacks.apply = apply

    return launches


def _row(name: str, timings: timing.Timings) -> dict[str, Any]:
    seconds, ratio = timings.seconds(name), timings.ratio(name, OURS)
    return (
        {"variant": name, "rounds": timings.rounds}
        | {"median": seconds.median, "q1": seconds.q1, "q3": seconds.q3}
        | {"ratio": ratio.median, "ratio_q1": ratio.q1, "ratio_q3": ratio.q3, "limit": None, "limit_reads": None}
    )


def _show(document: dict[str, Any]) -> None:
    made = report.table("A step of Muon beside AdamW", "variant", "ms", "x ours (quartiles)", "of the limit")
    for row in document["rows"]:
        ratio = f"{row['ratio']:.3g} ({row['ratio_q1']:.3g} to {row['ratio_q3']:.3g})"
        reached = f"{row['limit']:.2f} ({row['limit_reads']:.2f} with reads before writes)" if row["limit"] else ""
        made.add_row(row["variant"], f"{row['median'] * 1e3:.1f}", ratio, reached)
    report.console.print(made)
