"""The command line: ``fusedopt info``, ``verify``, ``bench``, ``inspect``, ``diagnose`` and ``demo``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fusedopt
from fusedopt.cli import bench, demo, diagnose, info, inspect, verify
from fusedopt.cli.report import CommandError, check_writable

COMMANDS = {"info": info, "verify": verify, "bench": bench, "inspect": inspect, "diagnose": diagnose, "demo": demo}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: The arguments; those of the process if None.

    Returns:
        The exit status: 0, 1 for a verification that failed, or 2 for an error that the user can mend.
    """
    args = _parser().parse_args(argv)
    try:
        check_writable(args.json)
        return COMMANDS[args.command].run(args)
    except CommandError as error:
        print(f"fusedopt {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fusedopt", description=fusedopt.__doc__)
    parser.add_argument("--version", action="version", version=f"fusedopt {fusedopt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write the result to FILE as JSON")
        module.add_arguments(command)
    return parser
