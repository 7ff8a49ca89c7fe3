"""Result rows as tables of at most 100 columns, and a verdict for every target."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from fusedopt.bench.harness import DISTURBED, NOISY, Row

TITLES = {
    "limit": "Time of the same-stream limit over ours",
    "torch": "Other implementations' time over ours",
    "small": "Many small tensors: other implementations' time over ours",
    "host": "Work on the host per tensor: slope of step time over tensors of 8 elements, between two counts",
    "clip": "Clipping by global norm and stepping: time over ours",
    "memory": "Growth of peak memory during a step, beyond parameters, gradients and states",
}


def console() -> Console:
    """Where reports go; 100 columns wide when that is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)


def _number(value: float | None, digits: int, suffix: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{suffix}"


def _time_and_spread(row: Row) -> tuple[str, str]:
    """Median in milliseconds, and what the quartiles are apart; ~ marks a noisy row."""
    if row.median is None or row.q1 is None or row.q3 is None:
        return "", ""
    return f"{row.median * 1e3:.4g}", f"{'~' if row.noisy else ''}{(row.q3 - row.q1) / row.median:.0%}"


def section_table(section: str, rows: Iterable[Row]) -> Table:
    """The rows of one section."""
    table = Table(title=TITLES.get(section, section), title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("name", "variant"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "spread", "GB/s", "limit", "ratio", "figure"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        table.add_row(
            row.name if row.name != previous else "",
            row.variant,
            *_time_and_spread(row),
            _number(row.gbps, 1),
            _number(row.limit, 3),
            _number(row.ratio, 2),
            _figure(row),
        )
        previous = row.name
    return table


def _figure(row: Row) -> str:
    if row.value is None or row.measure in ("limit", "ratio"):
        return ""
    return f"{row.value:.3g} {row.measure}"


def verdict_table(rows: Iterable[Row]) -> Table:
    """One line per target."""
    table = Table(title="Verdicts", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("section", "name", "variant"):
        table.add_column(heading, no_wrap=True)
    for heading in ("figure", "target"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        if row.met is None or row.value is None:
            continue
        verdict = "[green]met[/]" if row.met else "[bold red]missed[/]"
        bound = ">=" if row.measure in ("limit", "ratio") else "<="
        unit = "" if row.measure in ("limit", "ratio") else f" {row.measure}"
        table.add_row(
            row.section,
            row.name,
            row.variant,
            f"{row.value:.3g}{unit}",
            f"{bound} {row.target:g}",
            verdict + (" ~" if row.noisy else ""),
        )
    return table


def show(rows: list[Row]) -> None:
    """Print everything that is known about a run."""
    out = console()
    for section in dict.fromkeys(row.section for row in rows):
        out.print(section_table(section, (row for row in rows if row.section == section)))
    out.print(verdict_table(rows))
    noisy = sum(row.noisy for row in rows)
    if noisy:
        out.print(
            f"[yellow]Noisy run:[/] {noisy} of {len(rows)} rows (~) spread by more than {NOISY:.0%} between "
            f"quartiles, or saw other processes use more than {DISTURBED:.0%} of the machine. Ratios, which are taken "
            "round by round, suffer less than times."
        )
