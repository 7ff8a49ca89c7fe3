"""What all subcommands share: the console, JSON files, and the error that a user can mend."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fusedopt.aliases import Json
from fusedopt.printing import table as table

console: Console = Console(highlight=False)


class CommandError(Exception):
    """Something the user can mend: one line on stderr and exit status 2."""


def progress_bar(detail: str = "{task.description}", console: Console = console) -> Progress:
    """A progress bar that disappears when it is done.

    Args:
        detail: What stands behind the bar, in rich's markup.
        console: Where it is shown.
    """
    columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn(detail))
    return Progress(*columns, console=console, transient=True)


def check_writable(path: Path | None) -> None:
    """A result file can be written, before the work for it is done.

    Raises:
        CommandError: If its folder is missing, or it is a folder itself.
    """
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise CommandError(f"cannot write {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise CommandError(f"cannot write {path}: it is a folder")


def write_json(path: Path | None, content: Json) -> None:
    """Write a command's result, if a file was asked for.

    Raises:
        CommandError: If the file cannot be written.
    """
    if path is None:
        return
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error
    console.print(f"Wrote {path}")


def positive(value: str) -> int:
    """An argument that counts something, for argparse.

    Raises:
        argparse.ArgumentTypeError: If it is not positive.
    """
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return number
