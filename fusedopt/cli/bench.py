"""``fusedopt bench``; what it does, and its JSON, is in ``bench/command.py``."""

from __future__ import annotations

import argparse
from importlib import import_module

HELP = "time the step beside other packages' and beside what memory allows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options, and its own commands."""
    import_module("fusedopt.bench.options").add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, compare or report."""
    return import_module("fusedopt.bench.command").run(args)
