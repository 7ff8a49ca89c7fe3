"""Results as PNG files: fractions of the limit, bytes per parameter, and how the cost grows."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusedopt.bench.rows import COPY, LIMIT, Result, Row
from fusedopt.bench.table import swept, workloads

SWEPT = {
    "tensors": "tensors, of the same number of elements together",
    "size": "size of the parameters, MB",
    "groups": "param groups of the same tensors",
}
OURS, LIMIT_COLOR, COPY_COLOR = ("#1f5fa8", "#5aa0d8", "#123a66"), "#888888", "#bbbbbb"
THEIRS = (
    *("#e8a33d", "#c8553d", "#7a9e3b", "#8d6cab", "#d98cb3", "#4aa59b", "#a8763e", "#b9b93a", "#666b9e", "#cc8f6b"),
    *("#9db7a4", "#6e4b3a", "#f2c879", "#b04a78", "#3f7d5a", "#c3b1dd", "#7f7f3f", "#e07b91", "#9aa3b5", "#54402e"),
)


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw what a result has data for.

    Args:
        result: The rows.
        folder: Of the files: ``limit.png``, ``bytes.png``, ``tensors.png``, ``size.png`` and ``groups.png``.

    Returns:
        The files that were written.
    """
    colors = _colors(result.rows)
    figures = {
        "limit": _limits([row for row in result.rows if row.sweep is None], colors),
        "bytes": _bytes([row for row in result.rows if row.sweep is None], colors),
    }
    for sweep in SWEPT:
        figures[sweep] = _sweep(sweep, [row for row in result.rows if row.sweep == sweep], colors)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            FigureCanvasAgg(figure)
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=110, format="png")
            written.append(path)
    return written


def _colors(rows: Iterable[Row]) -> dict[str, str]:
    """The same color for a variant in every plot."""
    found: dict[str, str] = {LIMIT: LIMIT_COLOR, COPY: COPY_COLOR}
    ours, theirs = cycle(OURS), cycle(THEIRS)
    for row in rows:
        if row.variant not in found:
            found[row.variant] = next(ours) if row.ours else next(theirs)
    return found


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)


def _limits(rows: list[Row], colors: dict[str, str]) -> Figure | None:
    """Bars by optimizer, of the suite, dtype and options that most optimizers were measured with."""
    groups = [group for group in workloads(rows) if any(row.limit for row in group if row.variant != LIMIT)]
    if not groups:
        return None
    alike: dict[tuple[object, ...], list[list[Row]]] = {}
    for group in groups:
        r = group[0]
        alike.setdefault((r.suite, r.groups, r.dtype, r.device, r.clip, r.amp, r.cache, r.gradients), []).append(group)
    chosen = max(alike.values(), key=len)
    bars = [[row for row in group if row.limit and (row.ours or row.peer)] for group in chosen]
    figure = Figure(
        figsize=(min(14.0, max(6.0, 0.2 * sum(map(len, bars)) + 0.3 * len(bars))), 4.6), layout="constrained"
    )
    axes = figure.subplots()
    at, middles = 0.0, []
    for group in bars:
        for k, row in enumerate(group):
            hatch = None if row.same_update else "//"  # another algorithm
            axes.bar(at + k, row.limit or 0, width=0.92, color=colors[row.variant], hatch=hatch, edgecolor="white")
        middles.append(at + (len(group) - 1) / 2)
        at += len(group) + 1.2
    axes.set_xticks(middles, [group[0].optimizer for group in chosen])
    axes.set_xlim(-1, at - 1.2)
    axes.axhline(1, color=LIMIT_COLOR, linewidth=1)
    first = chosen[0][0]
    axes.set_title(f"Fraction of the memory limit: {first.suite}, {first.dtype}, {first.device}", loc="left")
    axes.set_ylabel("of the same streams' bandwidth")
    _legend(axes, [row for group in bars for row in group], colors)
    _tidy(axes)
    return figure


def _bytes(rows: list[Row], colors: dict[str, str]) -> Figure | None:
    """Bars by variant: memory per parameter, from the workload with most storages."""
    groups = [[row for row in group if row.bytes_per_parameter] for group in workloads(rows)]
    groups = [group for group in groups if group]
    if not groups:
        return None
    chosen = max(groups, key=lambda group: (len({row.storage for row in group}), len(group)))
    figure = Figure(figsize=(7, 0.42 * len(chosen) + 1.3), layout="constrained")
    axes = figure.subplots()
    for row in reversed(chosen):
        axes.barh(row.variant, row.bytes_per_parameter or 0, color=colors[row.variant])
    for k, row in enumerate(reversed(chosen)):
        axes.text(row.bytes_per_parameter or 0, k, f" {row.bytes_per_parameter:.3g}", va="center")
    axes.set_xlim(0, 1.1 * max(row.bytes_per_parameter or 0 for row in chosen))
    axes.set_title(f"Memory: {chosen[0].optimizer} on {chosen[0].suite}, {chosen[0].dtype}", loc="left")
    axes.set_xlabel("bytes per parameter, of parameter, gradient and states")
    _tidy(axes)
    return figure


def _sweep(sweep: str, rows: list[Row], colors: dict[str, str]) -> Figure | None:
    if not rows:
        return None
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    for variant in dict.fromkeys(row.variant for row in rows):
        points = sorted(((swept(row), row) for row in rows if row.variant == variant), key=lambda point: point[0])
        across, times = [p for p, _ in points], [row.median * 1e3 for _, row in points]
        style = {"linestyle": "--"} if variant in (LIMIT, COPY) else {"marker": "o", "markersize": 4}
        axes.plot(across, times, color=colors[variant], label=variant, **style)
        low, high = [row.q1 * 1e3 for _, row in points], [row.q3 * 1e3 for _, row in points]
        axes.fill_between(across, low, high, color=colors[variant], alpha=0.2, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    first = rows[0]
    axes.set_title(f"Step time of {first.optimizer}, {first.dtype}, {first.device}", loc="left")
    axes.set_xlabel(SWEPT[sweep])
    axes.set_ylabel("milliseconds")
    axes.legend(frameon=False)
    _tidy(axes)
    return figure


def _legend(axes: Axes, rows: list[Row], colors: dict[str, str]) -> None:
    names = list(dict.fromkeys(row.variant for row in rows))
    handles = [axes.bar(0, 0, color=colors[name], label=name) for name in names]
    axes.legend(handles=handles, ncols=4, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1))
