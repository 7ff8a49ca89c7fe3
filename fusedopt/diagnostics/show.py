"""How diagnostics print their tables and draw their plots. rich and matplotlib are imported when first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

from fusedopt import printing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Plot = str | Path | None  # where a PNG goes, if anywhere
BLUE, ORANGE = "#1f5fa8", "#e8a33d"


def print_table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table in the style of the command line.

    Args:
        title: What stands above it.
        columns: The headings.
        rows: The cells; those that are numbers stand to the right.
    """
    cells = list(rows)
    numeric = [bool(cells) and all(_is_number(row[i]) for row in cells) for i in range(len(columns))]
    table = printing.table(title, *columns, numeric=tuple(compress(columns, numeric)))
    for row in cells:
        table.add_row(*row)
    say(table)


def say(what: object) -> None:
    """Print a sentence or a table."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(what)


def check_plot(plot: object) -> None:
    """A plot can be drawn and written, before the work for it is done.

    Raises:
        TypeError: If it is no path.
        ImportError: If matplotlib is not installed.
        FileNotFoundError: If the folder is missing.
        IsADirectoryError: If it is a folder itself.
    """
    if plot is None:
        return
    if not isinstance(plot, (str, Path)):
        raise TypeError(f"plot is {type(plot).__name__}; it must be a path (str or Path), or None")
    if find_spec("matplotlib") is None:
        raise ImportError("plot needs matplotlib: pip install 'fusedopt[demo]'")
    path = Path(plot)
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"plot is {str(plot)!r}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"plot is {str(plot)!r}, a folder; it must be a file's name")


def draw(plot: Plot, title: str, x: str, y: str, fill: Callable[[Axes], None]) -> None:
    """Draw one pair of axes into a PNG file, if one was asked for.

    Args:
        plot: The file, or None.
        title: What stands above.
        x: What the horizontal axis is.
        y: What the vertical axis is.
        fill: Draws into the axes.
    """
    if plot is None:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    fill(axes)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(Path(plot), dpi=120, format="png")


def _is_number(cell: str) -> bool:
    """Whether a cell's first word is a number."""
    try:
        float(cell.split()[0])
    except (ValueError, IndexError):
        return False
    return True
