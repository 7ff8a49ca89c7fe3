"""Two results side by side: how a row of one stands to the same row of the other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fusedopt.bench import table
from fusedopt.bench.rows import KEY, Result, Row
from fusedopt.cli import report

# What is compared: the ratio is above 1 where the second result is the better one.
MEASURES = {
    "time": "seconds of a step",
    "limit": "fraction of the same-stream limit: steadier than times where a machine's memory is shared",
    "ratio": "a peer's time over ours",
    "device_time": "seconds that kernels of a step ran on the device",
    "host": "host microseconds",
    "launches": "launches per step",
    "peak_memory": "bytes that a step takes for itself",
}


@dataclass(frozen=True)
class Ratio:
    """How a row of one result stands to the same row of another.

    Attributes:
        before, after: The rows.
        value: The measure's ratio, above 1 where ``after`` is better.
        low, high: Between what it lies, by the quartiles of both rows; the value itself where a measure has none.
    """

    before: Row
    after: Row
    value: float
    low: float
    high: float


def compare(first: Result, second: Result, measure: str, chosen: Iterable[str] = ()) -> list[Ratio]:
    """The ratios of all rows that both results have.

    Args:
        first: What is compared with.
        second: What is compared.
        measure: A key of ``MEASURES``.
        chosen: Words of which each has to occur among a row's suite, optimizer, dtype, variant and the like.
    """
    before: dict[tuple[Any, ...], Row] = {}
    for row in first.rows:
        before.setdefault(row.key, row)  # a point of a sweep may be a workload of its own as well
    ratios = []
    for row in second.rows:
        other = before.get(row.key)
        if other is not None and all(matches(word, row) for word in chosen):
            ratio = _ratio(other, row, measure)
            if ratio is not None:
                ratios.append(ratio)
    return ratios


def missing(first: Result, second: Result, chosen: Iterable[str] = ()) -> list[Row]:
    """The chosen rows of the first result that the second has not."""
    there = {row.key for row in second.rows}
    return [row for row in first.rows if row.key not in there and all(matches(word, row) for word in chosen)]


def matches(word: str, row: Row) -> bool:
    """Whether a word is one of those that describe a row."""
    words = {row.suite, row.optimizer, row.dtype, row.device, row.variant, row.cache, row.storage, row.gradients}
    words |= {"fusedopt"} if row.ours else set()
    words |= {"clip"} if row.clip else set()
    words |= {"amp"} if row.amp else set()
    words |= {row.sweep} if row.sweep else set()
    return word.lower() in {w.lower() for w in words}


def _ratio(before: Row, after: Row, measure: str) -> Ratio | None:
    if measure == "time":
        spread = before.q1 / after.q3, before.q3 / after.q1
        return Ratio(before, after, before.median / after.median, *spread)
    if measure == "ratio" and before.ratio and after.ratio:
        assert before.ratio_q1 and before.ratio_q3 and after.ratio_q1 and after.ratio_q3
        spread = after.ratio_q1 / before.ratio_q3, after.ratio_q3 / before.ratio_q1
        return Ratio(before, after, after.ratio / before.ratio, *spread)
    a, b = getattr(before, measure), getattr(after, measure)
    if a is None or b is None or measure == "ratio":
        return None
    value = _quotient(b, a) if measure == "limit" else _quotient(a, b)
    return Ratio(before, after, value, value, value)


def _quotient(a: float, b: float) -> float:
    return a / b if b else 1.0 if a == b else float("inf")


def show(ratios: list[Ratio], gone: list[Row], measure: str, bound: float | None) -> None:
    """Print ratios, those under the bound standing out, and rows that are gone."""
    numeric = ("before", "after", "ratio", "between")
    made = report.table(f"{MEASURES[measure]}: above 1, the second is better", "row", *numeric, numeric=numeric)
    for ratio in ratios:
        row = ratio.after
        about = f"{table.title(row)}: {row.variant}" + (" ~" if row.noisy or ratio.before.noisy else "")
        a, b = (_shown(r, measure) for r in (ratio.before, row))
        low = bound is not None and ratio.value < bound
        value = f"[bold red]{ratio.value:.3f}[/]" if low else f"{ratio.value:.3f}"
        made.add_row(about, a, b, value, f"{ratio.low:.2f} to {ratio.high:.2f}")
    report.console.print(made)
    for row in gone:
        report.console.print(f"{table.title(row)}: {row.variant}: missing in the second result", markup=False)


def _value(row: Row, measure: str) -> float:
    return row.median if measure == "time" else getattr(row, measure)


def _shown(row: Row, measure: str) -> str:
    value = _value(row, measure)
    return f"{value * 1e3:.4g} ms" if measure == "time" else f"{value:.4g}"


def document(ratios: list[Ratio], gone: list[Row], measure: str, bound: float | None) -> dict[str, Any]:
    """What ``--json`` writes: measure and bound, both figures and the ratio of each row, and the keys of those missing.

    A ratio is null where the second figure is 0 and the first is not.
    """
    rows = [
        dict(zip(KEY, r.after.key, strict=True))
        | {"before": _value(r.before, measure), "after": _value(r.after, measure)}
        | {k: v if math.isfinite(v) else None for k, v in (("ratio", r.value), ("low", r.low), ("high", r.high))}
        | {"under": bound is not None and r.value < bound}
        for r in ratios
    ]
    gone_keys = [dict(zip(KEY, row.key, strict=True)) for row in gone]
    return {"measure": measure, "bound": bound, "rows": rows, "missing": gone_keys}
