"""``fusedopt verify``: the equivalence gate on this machine. Exit status 1 if anything misses its limit.

JSON::

    {"passed": bool,
     "results": [{"optimizer", "engine", "dtype", "oracle", "error", "limit", "unit", "passed", "note"}],
     "versions": {"fusedopt", "torch", "python", "numpy", "triton" if installed}}
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from fusedopt import engines, optimizers
from fusedopt.cli import machine, report

HELP = "check every optimizer on every engine against an independent implementation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--engine", action="append", choices=list(engines.ENGINES), help="repeatable; default: all available"
    )
    parser.add_argument(
        "--optimizer", action="append", choices=optimizers.__all__, metavar="NAME", help="repeatable; default: all"
    )


def run(args: argparse.Namespace) -> int:
    """Run the gate, print its verdicts, and write the JSON file if one was asked for."""
    from fusedopt.verification import gate

    results = []
    with report.progress_bar() as bar:
        task = bar.add_task("starting", total=None)
        results = gate.verify(_engines(args.engine), args.optimizer, lambda label: bar.update(task, description=label))
    _print(results)
    passed = all(r.passed for r in results)
    content = {"passed": passed, "results": [asdict(r) for r in results], "versions": machine.versions()}
    report.write_json(args.json, content)
    return 0 if passed else 1


def _engines(asked: list[str] | None) -> list[str]:
    if asked is None:
        return [name for name, engine in engines.ENGINES.items() if engine.available() is None]
    for name in asked:
        try:
            engines.require(name)
        except RuntimeError as error:
            raise report.CommandError(str(error)) from error
    return list(dict.fromkeys(asked))


def _print(results: list[Any]) -> None:
    headings = ("optimizer", "engine", "dtype", "oracle", "error", "limit", "verdict")
    table = report.table("Errors against their limits", *headings, numeric=("error", "limit"))
    for r in results:
        verdict = "[green]pass[/]" if r.passed else "[bold red]MISS[/]"
        limit = f"{r.limit:.2g} {r.unit}".strip()
        table.add_row(r.optimizer, r.engine, r.dtype, r.oracle, f"{r.error:.2g}", limit, verdict)
    report.console.print(table)
    for note in dict.fromkeys(f"{r.optimizer} on {r.engine}, {r.dtype}: {r.note}" for r in results if r.note):
        report.console.print(note)
    failed = sum(not r.passed for r in results)
    report.console.print(f"{len(results) - failed} passed, {failed} failed")
