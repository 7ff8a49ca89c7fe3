"""``fusedopt verify``: the equivalence gate on this machine. Exit status 1 if anything misses its limit.

JSON::

    {"passed": bool,
     "results": [{"optimizer", "engine", "dtype", "oracle", "error", "limit", "unit", "passed", "note"}],
     "versions": {"fusedopt", "torch", "python", "numpy", "triton" if installed}}
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from fusedopt import engines
from fusedopt.cli import machine, report
from fusedopt.cli.info import STORAGE

if TYPE_CHECKING:
    from fusedopt.verification.gate import Result

HELP = "check every optimizer on every engine against an independent implementation"
SHORT = {str(dtype).removeprefix("torch."): label for label, dtype in STORAGE.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--engine", action="append", choices=list(engines.ENGINES), help="repeatable; default: all available"
    )
    parser.add_argument(
        "--optimizer", action="append", metavar="NAME", help="class, or one of its cases; repeatable; default: all"
    )


def run(args: argparse.Namespace) -> int:
    """Run the gate, print what it finds, and write the JSON file if one was asked for."""
    from fusedopt.verification import gate

    names, wanted = _engines(args.engine), _optimizers(args.optimizer)
    with report.progress_bar() as bar:
        task = bar.add_task("", total=len(gate.comparisons(names, wanted)), completed=-1)
        results = gate.verify(names, wanted, lambda label: bar.update(task, advance=1, description=label))
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


def _optimizers(asked: list[str] | None) -> list[str] | None:
    from fusedopt.verification.cases import CASES

    known = dict.fromkeys(name for case in CASES for name in (case.optimizer, case.name))
    unknown = [name for name in asked or () if name.lower() not in {n.lower() for n in known}]
    if unknown:
        raise report.CommandError(f"no optimizer is called {unknown[0]!r}; there are {', '.join(known)}")
    return asked


def _print(results: list[Result]) -> None:
    headings = ("optimizer", "engine", "dtype", "oracle", "error", "limit", "result")
    units = ", ".join(f"{SHORT[dtype]} {unit}" for dtype, unit in {r.dtype: r.unit for r in results}.items())
    table = report.table(f"Errors against their limits ({units})", *headings, numeric=("error", "limit"))
    for r in results:
        result = "[green]pass[/]" if r.passed else "[bold red]MISS[/]"
        table.add_row(r.optimizer, r.engine, SHORT[r.dtype], r.oracle, f"{r.error:.1e}", f"{r.limit:.1e}", result)
    report.console.print(table)
    for note in dict.fromkeys(f"{r.optimizer} on {r.engine}, {SHORT[r.dtype]}: {r.note}" for r in results if r.note):
        report.console.print(note)
    failed = sum(not r.passed for r in results)
    report.console.print(f"{len(results) - failed} passed, {failed} failed")
