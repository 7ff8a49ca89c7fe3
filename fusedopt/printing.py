"""Tables in the terminal. rich is imported when the first is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table(title: str, *columns: str, numeric: tuple[str, ...] = ()) -> Table:
    """An empty table, in the style of all that are printed.

    Args:
        title: What stands above it.
        columns: The headings.
        numeric: Those of them whose cells are numbers, and so stand to the right.
    """
    from rich import box
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, show_edge=False)
    result.padding = (0, 1, 0, 0)
    for column in columns:
        result.add_column(column, justify="right" if column in numeric else "left", overflow="fold")
    return result
