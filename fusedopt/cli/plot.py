"""The demo's plots: loss curves, and the time that each optimizer took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusedopt.aliases import Json
from fusedopt.cli.report import CommandError

COLORS = {"torch": "#e8a33d", "fusedopt": "#1f5fa8"}


if TYPE_CHECKING:
    from fusedopt.cli.training import Run


def draw(path: Path, runs: dict[str, Run], difference: float) -> None:
    """Draw both loss curves on top of each other, and the times of the steps, into a PNG file.

    Args:
        path: The file.
        runs: The runs "torch" and "fusedopt" of ``fusedopt.cli.training``.
        difference: The largest difference between their losses.

    Raises:
        CommandError: If the file cannot be written.
    """
    figure, left, right = _panels((11, 4.2))
    _losses(left, runs, difference)
    _times(right, runs)
    _save(figure, path)


def draw_race(path: Path, runs: dict[str, Run], held_out: dict[str, float]) -> None:
    """Draw the losses of all runs, and how long the steps of each took, into a PNG file.

    Args:
        path: The file.
        runs: Of ``fusedopt.cli.race``, the best first.
        held_out: Their losses on text that was not trained on.

    Raises:
        CommandError: If the file cannot be written.
    """
    figure, left, right = _panels((12, 0.26 * len(runs) + 1.2))
    colors = {name: colormaps["turbo"](0.05 + 0.9 * i / max(1, len(runs) - 1)) for i, name in enumerate(runs)}
    for name, run in runs.items():
        left.plot(range(1, len(run.losses) + 1), _smooth(run.losses), color=colors[name], linewidth=1.2)
    left.set_title("Training loss, a running mean", loc="left")
    left.set_ylabel("nats per character")
    left.set_xlabel("step")
    times = [run.median_ms() for run in runs.values()]
    right.barh([f"{name}   {held_out[name]:.2f}" for name in runs], times, color=list(colors.values()))
    right.invert_yaxis()
    right.set_title("Held-out loss, and time of a step", loc="right")
    right.set_xlabel("milliseconds, median, clipping included")
    _save(figure, path)


def _smooth(losses: list[float]) -> list[float]:
    """Means in which a loss is forgotten over a thirtieth of the steps."""
    decay, mean, weight = 1 - 1 / max(1, len(losses) // 30), 0.0, 0.0
    result: list[float] = []
    for loss in losses:
        mean, weight = decay * mean + (1 - decay) * loss, decay * weight + (1 - decay)
        result.append(mean / weight)
    return result


def _panels(size: tuple[float, float]) -> tuple[Figure, Axes, Axes]:
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    return figure, left, right


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=140, format="png")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def _losses(axes: Axes, runs: dict[str, Run], difference: float) -> None:
    styles: dict[str, Json] = {
        "torch": {"linewidth": 5, "alpha": 0.6},
        "fusedopt": {"linewidth": 1.1},
    }
    for key, run in runs.items():
        axes.plot(range(1, len(run.losses) + 1), run.losses, color=COLORS[key], label=run.label, **styles[key])
    axes.set_title(f"Training loss: curves differ by at most {difference:.1e}", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per character")
    axes.legend(frameon=False)


def _times(axes: Axes, runs: dict[str, Run]) -> None:
    for key, run in runs.items():
        steps, median = range(1, len(run.step_ms) + 1), run.median_ms()
        axes.plot(steps, run.step_ms, ".", markersize=2.5, alpha=0.45, color=COLORS[key])
        axes.axhline(median, linewidth=2, color=COLORS[key], label=f"{run.label}: median {median:.2f} ms")
    # The first steps, which create the states, and whatever else the machine did, would flatten the rest.
    axes.set_ylim(0, 2.2 * max(run.median_ms() for run in runs.values()))
    axes.set_title("Clip and optimizer step", loc="left")
    axes.set_xlabel("step")
    axes.set_ylabel("milliseconds")
    axes.legend(framealpha=1, edgecolor="white", loc="upper right")
