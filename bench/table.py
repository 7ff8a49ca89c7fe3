"""Results in the terminal: a table for every workload and sweep, then one line for each workload."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from rich.table import Table

from fusedopt.bench.rows import OURS, Result, Row
from fusedopt.bench.timing import DISTURBED, NOISY
from fusedopt.bench.workload import DTYPES, described
from fusedopt.cli import report

GPU = "GPU us"
COLUMNS = ("ms", "±%", "GB/s", "limit", "ratio", "calls", GPU, "host us", "MiB")
LEGEND = (
    f"±%: the quartiles' distance; ~ above {NOISY:.0%}, or on a busy machine. limit: GB/s over those of the bare loop "
    "over the same streams. ratio: time over that of our first row. calls: kernels, or torch operators on a CPU. "
    f"{GPU}: how long a step's kernels ran. host us: host work of a step. MiB: what a step takes for itself. "
    "≠: another algorithm. °: states in fewer bits."
)
SUMMARY = ("workload", "ours", "ms", "limit", "fastest other", "ratio")
SWEEPS = {
    "tensors": "How time grows with the number of tensors, at a constant number of elements",
    "size": "How time grows with size: MB of parameters, in 100 tensors",
    "groups": "How time grows with the number of param groups",
}


def title(row: Row) -> str:
    """What was stepped, and how."""
    return described(row, row.suite, row.optimizer, row.tensors, row.numel, row.groups)


def short_title(row: Row) -> str:
    """The same for tables, without what is the default."""
    parts = (
        *(row.optimizer, row.suite),
        row.dtype if row.dtype != "fp32" else "",
        f"{row.groups} groups" if row.groups > 1 else "",
        "clip" if row.clip else "",
        "AMP" if row.amp else "",
        "warm" if row.cache == "warm" else "",
        f"{row.gradients} grads" if row.gradients != "kept" else "",
    )
    return " ".join(filter(None, parts))


def name(row: Row) -> str:
    """Variant and version."""
    marks = (" ≠" if row.same_update is False else "") + (" °" if row.note and row.same_update else "")
    return f"{row.variant} {row.version.partition('+')[0]}{marks}"


def spread(row: Row) -> str:
    """What quartiles are apart, in percent of the median; ~ marks a noisy row."""
    return f"{'~' if row.noisy else ''}{100 * (row.q3 - row.q1) / row.median:.0f}"


def number(value: float | None, digits: int) -> str:
    """A number with so many digits behind the point, none for a large one; empty for None."""
    if value is None:
        return ""
    return f"{value:.{digits if abs(value) < 100 else 0}f}"


def columns(rows: list[Row]) -> list[str]:
    """Those of ``COLUMNS`` that rows have: no row of a CPU has a GPU's time."""
    return [name for name in COLUMNS if name != GPU or any(row.device_time is not None for row in rows)]


def cells(row: Row, wanted: list[str]) -> list[str]:
    """The cells of some of ``COLUMNS``."""
    texts = (
        f"{row.median * 1e3:.4g}",
        spread(row),
        number(row.gbps, 1),
        number(row.limit, 2),
        number(row.ratio, 2),
        "" if row.launches is None else str(row.launches),
        "" if row.device_time is None else number(row.device_time * 1e6, 1),
        number(row.host, 1),
        "" if row.peak_memory is None else number(row.peak_memory / 2**20, 0),
    )
    return [text for name, text in zip(COLUMNS, texts, strict=True) if name in wanted]


def workloads(rows: list[Row]) -> list[list[Row]]:
    """Rows by workload, in order."""
    return [list(group) for _, group in groupby(rows, key=lambda row: row.workload)]


def workload_table(rows: list[Row]) -> Table:
    """The rows of one workload."""
    wanted = columns(rows)
    made = report.table(title(rows[0]), "", *wanted, numeric=COLUMNS)
    for row in rows:
        made.add_row(name(row), *cells(row, wanted))
    return made


def fastest_peer(rows: list[Row]) -> Row | None:
    """Who of the others is fastest, of those that compute the same update; None without any."""
    peers = [row for row in rows if row.peer and row.same_update]
    return min(peers, key=lambda row: row.median, default=None)


def summary_cells(rows: list[Row]) -> list[list[str]]:
    """The cells of ``SUMMARY`` for each workload and engine of ours."""
    lines = []
    for group in workloads(rows):
        fastest = fastest_peer(group)
        for row in (row for row in group if row.ours):
            other, ratio = "", ""
            if fastest is not None and fastest.ratio is not None:
                other = fastest.variant + (" °" if fastest.note else "")
                ratio = number(fastest.ratio / (row.ratio or 1), 2)
            engine = row.variant.removeprefix(OURS) + (" ~" if row.noisy else "")
            lines.append([short_title(row), engine, f"{row.median * 1e3:.4g}", number(row.limit, 2), other, ratio])
    return lines


def swept(row: Row) -> float:
    """Where a row stands on its sweep's axis."""
    if row.sweep == "size":
        return row.numel * DTYPES[row.dtype].itemsize / 2**20
    return row.tensors if row.sweep == "tensors" else row.groups


@dataclass(frozen=True)
class SweepTable:
    """The rows of a sweep as one table.

    Attributes:
        title: What grows.
        headings: The axis, and who.
        lines: Milliseconds, by point.
    """

    title: str
    headings: list[str]
    lines: list[list[str]]


def sweep_tables(rows: list[Row]) -> list[SweepTable]:
    """Every sweep's table."""
    made = []
    by_kind: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.sweep is not None:
            by_kind.setdefault((row.sweep, row.optimizer, row.dtype, row.device), []).append(row)
    for (sweep, optimizer, dtype, device), own in by_kind.items():
        who = list(dict.fromkeys(row.variant for row in own))
        points: dict[float, dict[str, str]] = {}
        for row in own:
            points.setdefault(swept(row), {})[row.variant] = f"{row.median * 1e3:.4g}{' ~' if row.noisy else ''}"
        lines = [[f"{x:,.0f}", *(times.get(v, "") for v in who)] for x, times in sorted(points.items())]
        about = f"{SWEEPS[sweep]}: ms, {optimizer} {dtype} on {device}"
        made.append(SweepTable(about, [sweep, *who], lines))
    return made


def noise(rows: list[Row]) -> str | None:
    """What to say of a noisy run; None of a quiet one."""
    noisy = sum(row.noisy for row in rows)
    if not noisy:
        return None
    return (
        f"Noisy run: {noisy} of {len(rows)} rows (~) spread by more than {NOISY:.0%} between quartiles, or saw other "
        f"processes use more than {DISTURBED:.0%} of the machine. Ratios and fractions of the limit, which are taken "
        "round by round, suffer less than times."
    )


def show(result: Result) -> None:
    """Print everything, the summary last."""
    out = report.console
    plain = [row for row in result.rows if row.sweep is None]
    for rows in workloads(plain):
        out.print(workload_table(rows), "")
    for sweep in sweep_tables(result.rows):
        made = report.table(sweep.title, *sweep.headings, numeric=tuple(sweep.headings))
        for line in sweep.lines:
            made.add_row(*line)
        out.print(made, "")
    for line in result.notes:
        out.print(line, markup=False)
    if plain:
        made = report.table("Ours, and the fastest other one", *SUMMARY, numeric=("ms", "limit", "ratio"))
        for line in summary_cells(plain):
            made.add_row(*line)
        out.print(LEGEND, "", made)
    if text := noise(result.rows):
        out.print(f"[yellow]{text}[/]")
