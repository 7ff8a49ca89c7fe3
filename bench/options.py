"""The options of ``fusedopt bench`` and its commands."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fusedopt import engines
from fusedopt.bench import (
    compare,
    muon_parts,
    optimizers,
    peers,
    ranks,
    standard,
    stored,
    suites,
    trainer,
    tune,
    workload,
)

EPILOG = """\
Without --suite, --optimizer, --sweep and the options of a step: the standard set. With any of them: every
combination of the suites and optimizers (default: AdamW on gpt2), then the sweeps.
"""
REPEATS, STANDARD_REPEATS = 15, {"cpu": 7}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options, and its own commands."""
    parser.epilog = EPILOG
    _add_steps(parser)
    _add_contenders(parser)
    commands = parser.add_subparsers(
        dest="bench_command", metavar="compare | report | tune | ranks | trainer | muon", title="commands"
    )
    _add_compare(commands.add_parser("compare", help="two results side by side", description="Two results."))
    _add_tune(commands.add_parser("tune", help="the GPU engines' choices", description="Which are the fastest."))
    _add_ranks(commands.add_parser("ranks", help="FSDP2's shards", description="Parameters sharded by FSDP2."))
    _add_trainer(commands.add_parser("trainer", help="in transformers' loop", description="Steps in a Trainer."))
    _add_muon(commands.add_parser("muon", help="the parts of a step", description="Where Muon's time goes on GPT-2."))
    page = commands.add_parser("report", help="a folder of results as Markdown", description="Results as Markdown.")
    page.add_argument("folder", type=Path, metavar="DIR", help="has JSON files; report.md and plots are written to it")


def _add_steps(parser: argparse.ArgumentParser) -> None:
    """What is stepped, and how."""
    each = {"action": "append", "metavar": "NAME"}
    parser.add_argument("--suite", type=_suite, **each, help=f"repeatable: {suites.ACCEPTED}")
    cases = list(optimizers.CASES)
    parser.add_argument("--optimizer", choices=cases, **each, help=f"repeatable: {', '.join(cases)}")
    parser.add_argument("--dtype", choices=workload.DTYPES, help="of parameters (default: fp32)")
    parser.add_argument("--clip", type=_positive_float, metavar="NORM", help="clip the global norm of gradients")
    parser.add_argument("--amp", action="store_true", help="step through a GradScaler")
    parser.add_argument("--groups", type=_positive, metavar="N", help="param groups (default: the suite's own)")
    parser.add_argument("--cache", choices=workload.CACHES, help="state of the caches before a step (default: cold)")
    grads = parser.add_mutually_exclusive_group()
    for kind, about in workload.GRADIENTS.items():
        if about:
            grads.add_argument(f"--{kind}-grads", dest="gradients", action="store_const", const=kind, help=about)
    parser.add_argument("--sweep", action="append", choices=standard.SWEEPS, help="repeatable: how the cost grows")
    parser.add_argument("--device", type=_device, help="such as cpu or cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--repeats",
        type=_positive,
        metavar="N",
        help=f"timed rounds (default: {REPEATS}; on a CPU the standard set {STANDARD_REPEATS['cpu']})",
    )
    parser.add_argument("--plot", type=Path, metavar="DIR", help="also draw plots into a folder")


def _add_contenders(parser: argparse.ArgumentParser) -> None:
    """Who steps."""
    parser.add_argument(
        "--storage",
        action="append",
        choices=standard.STORAGES,
        help="repeatable: peers that keep states so (default: full)",
    )
    parser.add_argument(
        "--stored",
        action="append",
        choices=stored.STORED,
        help="repeatable: ours with fewer bits, or silent towards autograd, beside ours",
    )
    names = ["all", "none", *peers.known()]
    about = f"repeatable: {', '.join(names)} (default: all)"
    parser.add_argument("--peer", choices=names, action="append", metavar="NAME", help=about)
    own = ["auto", *engines.ENGINES]
    parser.add_argument(
        "--engine", action="append", choices=own, help="repeatable; the first is compared with (default: auto)"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, default=argparse.SUPPRESS, metavar="FILE", help="also write it to FILE")


def _add_rounds(parser: argparse.ArgumentParser, rounds: int) -> None:
    parser.add_argument("--rounds", type=_positive, default=rounds, metavar="N", help="timed (default: %(default)s)")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    measures = "; ".join(f"{name}: {about}" for name, about in compare.MEASURES.items())
    about = f"{measures} (default: %(default)s)"
    parser.add_argument("--measure", choices=compare.MEASURES, default="time", help=about)
    parser.add_argument(
        "--only",
        action="append",
        metavar="WORD",
        help="rows of a suite, optimizer, dtype, variant, device, cache, storage or gradients; clip, amp, or fusedopt "
        "for all of ours; repeatable: rows that are all of it",
    )
    parser.add_argument(
        "--bound",
        type=_positive_float,
        metavar="RATIO",
        help="exit with status 1 if a ratio is less than this, or a row is missing",
    )
    _add_json(parser)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    parser.add_argument("--dry-run", action="store_true", help="compile the variants, without a GPU, and time nothing")
    parser.add_argument(
        "--engine",
        action="append",
        choices=("cuda", "triton"),
        default=argparse.SUPPRESS,
        help="repeatable (default: both)",
    )
    _add_rounds(parser, tune.ROUNDS)


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    parser.add_argument("--ranks", type=_positive, default=ranks.RANKS, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--width",
        type=_positive,
        action="append",
        metavar="N",
        help=f"of the blocks; repeatable (default: {', '.join(map(str, ranks.WIDTHS))})",
    )
    parser.add_argument("--cache", choices=workload.CACHES, default=argparse.SUPPRESS, help="(default: cold)")
    _add_rounds(parser, ranks.ROUNDS)


def _add_trainer(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    parser.add_argument("--layers", type=_positive, default=12, metavar="N", help="of GPT-2 (default: %(default)s)")
    parser.add_argument("--width", type=_positive, default=768, metavar="N", help="(default: %(default)s)")
    _add_rounds(parser, trainer.ROUNDS)


def _add_muon(parser: argparse.ArgumentParser) -> None:
    _add_json(parser)
    parser.add_argument("--layers", type=_positive, default=12, metavar="N", help="of GPT-2 (default: %(default)s)")
    parser.add_argument("--width", type=_positive, default=768, metavar="N", help="(default: %(default)s)")
    _add_rounds(parser, muon_parts.ROUNDS)


def _suite(name: str) -> suites.Suite:
    try:
        return suites.find(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not there: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise argparse.ArgumentTypeError("tensors on 'meta' have no memory to be measured")
    return torch.device("cpu") if device.type == "cpu" else device
