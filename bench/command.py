"""``fusedopt bench``: how long a step takes, beside other packages' and beside what memory allows.

JSON::

    {"format": 1, "commit": hash, "+" behind it if files differ, or null; "versions": {package: version},
     "machine": {"platform", "cpu", "isa", "threads", "gpus", "cores", "memory_gib"}, "device": name,
     "notes": [what was left out, and why],
     "rows": [the attributes of fusedopt.bench.rows.Row: "suite", "optimizer", "dtype", "variant", "version",
              "median", "q1", "q3" (seconds), "bytes", "gbps", "limit", "ratio", "launches", "device_time" (seconds),
              "host" (microseconds), "peak_memory" (bytes), "bytes_per_parameter", "noisy", "command" and others]}
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from fusedopt import engines
from fusedopt.bench import (
    compare,
    contenders,
    markdown,
    muon_parts,
    optimizers,
    peers,
    quiet,
    ranks,
    standard,
    suites,
    table,
    trainer,
    tune,
    workload,
)
from fusedopt.bench.measure import Bench
from fusedopt.bench.options import REPEATS, STANDARD_REPEATS
from fusedopt.bench.rows import Result, ResultError, facts
from fusedopt.bench.standard import Entry
from fusedopt.cli import report


def run(args: argparse.Namespace) -> int:
    """Measure, compare, report or tune."""
    try:
        commands = {None: _measure, "compare": _compare, "report": _report, "tune": tune.run, "ranks": ranks.run}
        return (commands | {"trainer": trainer.run, "muon": muon_parts.run})[args.bench_command](args)
    except ResultError as error:
        raise report.CommandError(str(error)) from error


def _engines(asked: list[str] | None, device: torch.device) -> tuple[str, ...]:
    """The engines for a device, the preferred one first.

    Raises:
        CommandError: If one that was asked for cannot run on it.
    """
    chosen: list[str] = []
    for name in asked or ["auto"]:
        if name == "auto":
            homes = {n: e.home().type for n, e in engines.ENGINES.items() if n != "eager" and e.available() is None}
            chosen += [n for n, home in homes.items() if home == device.type and not _interpreted(n)] or ["eager"]
            continue
        try:
            engines.require(name)
        except RuntimeError as error:
            raise report.CommandError(str(error)) from error
        if name != "eager" and engines.ENGINES[name].home().type != device.type:
            raise report.CommandError(f"--engine {name} does not step tensors on --device {device}")
        chosen.append(name)
    return tuple(dict.fromkeys(chosen))


def _interpreted(engine: str) -> bool:
    return engine == "triton" and engines.ENGINES["triton"].interprets()


def _peers(asked: list[str] | None) -> tuple[str, ...]:
    if asked is None or "all" in asked:
        return tuple(peers.known())
    return tuple(name for name in asked if name != "none")


def _is_standard(args: argparse.Namespace) -> bool:
    """Whether nothing in particular was asked for."""
    asked = (args.suite, args.optimizer, args.sweep, args.dtype, args.clip, args.groups, args.cache, args.storage)
    asked += (args.gradients, args.stored)
    return not args.amp and all(option is None for option in asked)


def _entries(args: argparse.Namespace, device: torch.device) -> list[Entry]:
    """What is to be measured.

    Raises:
        CommandError: If options do not go together.
    """
    if _is_standard(args):
        entries = standard.standard(str(device))
        if args.peer is not None:
            wanted = _peers(args.peer)
            entries = [replace(e, peers=tuple(name for name in e.peers if name in wanted)) for e in entries]
        return entries
    dtype, wanted = args.dtype or "fp32", _peers(args.peer)
    if args.amp and dtype == "fp16":
        raise report.CommandError("--amp with --dtype fp16: torch's GradScaler does not unscale fp16 gradients")
    options = {"dtype": dtype, "device": str(device), "clip": args.clip, "amp": args.amp, "cache": args.cache or "cold"}
    options["gradients"] = args.gradients or "kept"
    storages, stored, entries = tuple(args.storage or ["full"]), tuple(args.stored or ()), []
    cases = [optimizers.CASES[name] for name in args.optimizer or ["AdamW"]]
    if args.suite or not args.sweep:
        for suite in args.suite or [suites.find("gpt2")]:
            try:
                grouped = suite if args.groups is None else suite.regrouped(args.groups)
            except ValueError as error:
                raise report.CommandError(f"--groups {args.groups}: {error}") from error
            for case in cases:
                entries.append(Entry(workload.Workload(grouped, case, **options), wanted, storages, stored))
    for sweep in args.sweep or ():
        if args.groups is not None:
            raise report.CommandError("--groups and --sweep: a sweep has groups of its own")
        few = None if args.peer is None else wanted
        for case in cases:
            for entry in standard.swept(sweep, str(device), case.name, dtype, few):
                one = replace(entry.workload, **options)
                entries.append(replace(entry, workload=one, storages=storages, stored=stored))
    return entries


def _measure(args: argparse.Namespace) -> int:
    if args.plot is not None:
        _check_plots(args.plot)
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cpu" and device.index is not None:
        torch.get_device_module(device).set_device(device)
    repeats = args.repeats or (STANDARD_REPEATS.get(device.type, REPEATS) if _is_standard(args) else REPEATS)
    bench, entries = Bench(_engines(args.engine, device), (), repeats=repeats), _entries(args, device)
    result = Result(notes=bench.notes, facts=facts(device, []))
    status = _run_all(bench, entries, result, args.json)
    for name in set(args.peer or ()) - {"all", "none"} - {row.variant for row in result.rows}:
        if not any(name in line or peers.known()[name] in line for line in bench.notes):
            bench.note(f"{name}: left out, it has none of these optimizers in such a storage on {device.type}")
    elsewhere = peers.known().keys() - peers.known(device.type).keys()
    if elsewhere and (args.peer is None or "all" in args.peer):
        bench.note(f"Left out, because they are not for tensors on {device.type}: {', '.join(sorted(elsewhere))}")
    result.facts = facts(device, sorted(bench.packages))
    table.show(result)
    if args.json is not None:
        result.save(args.json)
        report.console.print(f"Wrote {args.json}")
    if args.plot is not None:
        from fusedopt.bench import plots  # needs matplotlib

        for path in plots.draw(result, args.plot):
            report.console.print(f"Wrote {path}")
    return status


def _run_all(bench: Bench, entries: list[Entry], result: Result, path: Path | None) -> int:
    """Measure every entry under a progress bar.

    Args:
        bench: What measures.
        entries: What is measured.
        result: Gets the rows.
        path: A file that always holds what was measured so far, in case that the run is ended.

    Returns:
        The exit status: 1 if an entry failed, 130 if the run was interrupted.
    """
    status = 0
    with report.progress_bar(console=Console(file=quiet.own_stderr(), highlight=False)) as bar:
        task = bar.add_task("", total=len(entries))
        for entry in entries:
            about = f"{entry.workload.case.name} {entry.workload.suite.name}"
            bench.wanted, bench.storages, bench.stored = entry.peers, entry.storages, entry.stored
            bench.report = lambda text, about=about: bar.update(task, description=f"{about}: {text}")
            try:
                result.rows += bench.run(entry.workload, entry.sweep)
                if path is not None:
                    result.save(path)
            except KeyboardInterrupt:
                bench.note("the run was interrupted: what follows is missing")
                return 130
            except contenders.FAILURES as error:  # the others are worth measuring all the same
                bench.note(f"{entry.workload.title()}: FAILED: {contenders.summary(error)}")
                status = 1
            bar.advance(task)
    return status


def _check_plots(folder: Path) -> None:
    if find_spec("matplotlib") is None:
        raise report.CommandError("plots need matplotlib: pip install 'fusedopt[demo]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise report.CommandError(f"--plot {folder}: {error.strerror}") from error


def _compare(args: argparse.Namespace) -> int:
    before, after, chosen = Result.load(args.before), Result.load(args.after), args.only or ()
    ratios, gone = compare.compare(before, after, args.measure, chosen), compare.missing(before, after, chosen)
    if not ratios:
        raise report.CommandError(f"{args.before} and {args.after} have no row in common that was asked for")
    compare.show(ratios, gone, args.measure, args.bound)
    report.write_json(args.json, compare.document(ratios, gone, args.measure, args.bound))
    if args.bound is None:
        return 0
    low = sum(ratio.value < args.bound for ratio in ratios)
    report.console.print(f"{low} of {len(ratios)} ratios are less than {args.bound:g}, {len(gone)} rows are missing")
    return 1 if low or gone else 0


def _report(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        raise report.CommandError(f"{args.folder} is not a folder")
    _check_plots(args.folder)
    report.console.print(f"Wrote {markdown.write(args.folder)}")
    return 0
