"""``fusedopt bench``; what it does, and its JSON, is in ``bench/command.py``."""

from __future__ import annotations

import argparse

HELP = "time the step beside other packages' and beside what memory allows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options, and its own commands."""
    from fusedopt.bench import options  # pyright: ignore[reportMissingImports]

    options.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, compare or report."""
    from fusedopt.bench import command  # pyright: ignore[reportMissingImports]

    return command.run(args)
