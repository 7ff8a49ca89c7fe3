"""A folder of results as one page of Markdown, with plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusedopt.bench import table
from fusedopt.bench.rows import Result, ResultError, Row

PAGE = "report.md"


def write(folder: Path) -> Path:
    """Write ``report.md`` and the plots of all results in a folder.

    Args:
        folder: Has JSON files of ``fusedopt bench``; others in it are left alone. With several results, the plots of
            each go into a folder of its name.

    Raises:
        ResultError: If there is no result in it, or one of another format.
    """
    from fusedopt.bench import plots  # needs matplotlib

    paths = [path for path in sorted(folder.glob("*.json")) if _is_result(path)]
    if not paths:
        raise ResultError(f"{folder} has no result of fusedopt bench: make one with fusedopt bench --json")
    parts = []
    for path in paths:
        result = Result.load(path)
        place = folder if len(paths) == 1 else folder / path.stem
        place.mkdir(exist_ok=True)
        images = [image.relative_to(folder).as_posix() for image in plots.draw(result, place)]
        parts.append(page(result, path.name, images))
    target = folder / PAGE
    target.write_text("\n\n".join(parts) + "\n")
    return target


def _is_result(path: Path) -> bool:
    """Whether a JSON file is meant to be one of ours, as ``fusedopt info --json`` is not."""
    text = path.read_text(errors="replace")
    return '"rows"' in text and '"format"' in text


def page(result: Result, source: str, images: list[str]) -> str:
    """One result as Markdown.

    Args:
        result: The rows.
        source: The name of its file.
        images: Its plots.
    """
    facts = result.facts
    here = facts.get("machine", {})
    versions = ", ".join(f"{package} {version}" for package, version in facts.get("versions", {}).items())
    summary = table.summary_cells([row for row in result.rows if row.sweep is None])
    lines = [
        f"# Benchmark: {facts.get('device', 'unknown device')}",
        "",
        f"[{source}]({source}), commit `{facts.get('commit') or 'unknown'}`, {here.get('cores')} cores, "
        f"{here.get('threads')} threads, {here.get('memory_gib')} GiB of memory, {here.get('platform')}.",
        f"Versions: {versions}.",
        "",
        *(f"![{Path(image).stem}]({image})\n" for image in images),
        "## Ours, and the fastest other one with the same update",
        "",
        *_table(table.SUMMARY, summary, ("workload", "ours", "fastest other")),
        "",
        table.LEGEND,
        "Ratios and fractions of the limit are medians of those taken round by round. What each column means: "
        "`bench/rows.py`.",
        "",
    ]
    if text := table.noise(result.rows):
        lines += [f"**{text}**", ""]
    if result.notes:
        lines += ["## Left out", "", *(f"- {note}" for note in result.notes), ""]
    for sweep in table.sweep_tables(result.rows):
        lines += [f"## {sweep.title}", "", *_table(sweep.headings, sweep.lines), ""]
    lines += ["## All rows", ""]
    for rows in table.workloads(result.rows):
        lines += _workload(rows)
    return "\n".join(lines).rstrip()


def _table(headings: Sequence[str], lines: list[list[str]], texts: Sequence[str] = ()) -> list[str]:
    """A table; columns are numbers but for those of ``texts``."""
    rule = "|".join("---" if heading in texts else "---:" for heading in headings)
    return [f"| {' | '.join(headings)} |", f"|{rule}|", *(f"| {' | '.join(line)} |" for line in lines)]


def _workload(rows: list[Row]) -> list[str]:
    each = ["" if row.bytes_per_parameter is None else f"{row.bytes_per_parameter:.3g}" for row in rows]
    wanted = table.columns(rows)
    cells = [[table.name(row), *table.cells(row, wanted), size] for row, size in zip(rows, each, strict=True)]
    lines = [f"### {table.title(rows[0])}", "", *_table(("by", *wanted, "B/param"), cells, ("by",))]
    lines += ["", "```", *(f"{row.command}  # {row.variant}" for row in rows), "```", ""]
    for row in rows:
        if row.note:
            lines += [f"{row.variant}: {row.note}.", ""]
    return lines
