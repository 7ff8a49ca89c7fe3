"""``fusedopt demo --optimizer all``: every optimizer trains the same small GPT from the same start.

JSON::

    {"steps": int, "parameters": int,
     "runs": {optimizer: {"arguments", "engine", "train_loss", "held_out_loss", "optimizer_ms", "losses"}},
     "versions": as everywhere}

Losses are in nats per character, ``optimizer_ms`` is the median over the steps, clipping included.
"""

from __future__ import annotations

import argparse
import math

import torch

from fusedopt.aliases import Json
from fusedopt.cli import machine, report
from fusedopt.optimizers import OPTIMIZERS

STEPS = 300
# What each is given: of rates that are 1, 2 or 5 times a power of ten, the one with the least held-out loss after as
# many steps.
ARGUMENTS: dict[str, Json] = {
    "ADOPT": {"lr": 5e-3},
    "AMAdamW": {"lr": 5e-3},
    "AMSGD": {"lr": 2.0},
    "ASGD": {"lr": 0.5},
    "AdEMAMix": {"lr": 5e-3},
    "AdaBound": {"lr": 2e-3},
    "Adadelta": {"lr": 5.0},
    "Adagrad": {"lr": 2e-2},
    "Adam": {"lr": 5e-3},
    "AdamP": {"lr": 5e-3},
    "AdamW": {"lr": 5e-3},
    "Adamax": {"lr": 1e-2},
    "Adan": {"lr": 2e-2},
    "EntropySGD": {"lr": 1.0, "inner_lr": 0.1, "inner_momentum": 0.9},
    "KoalaM": {"lr": 0.1},
    "KoalaV": {"lr": 0.1},
    "LAMB": {"lr": 2e-2},
    "LARS": {"lr": 0.1, "momentum": 0.9},
    "Lion": {"lr": 2e-3},
    "MBF": {"lr": 1e-3},
    "Muon": {"lr": 2e-2, "adamw": {"lr": 5e-3}},
    "NAdam": {"lr": 5e-3},
    "NAdamW": {"lr": 5e-3},
    "NSGD": {"lr": 1.0, "momentum": 0.9},
    "Prodigy": {"lr": 1.0},
    "RAdam": {"lr": 2e-2},
    "RMSprop": {"lr": 2e-3},
    "Rprop": {"lr": 2e-2},
    "ScheduleFreeAdamW": {"lr": 5e-3},
    "ScheduleFreeSGD": {"lr": 1.0},
    "ReplicatedSGD": {"lr": 0.1, "momentum": 0.9},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "SGDP": {"lr": 0.1, "momentum": 0.9},
    "SWATS": {"lr": 5e-3},
}


def run(args: argparse.Namespace) -> int:
    """Train all, print their table, draw the plot, and write the JSON file if one was asked for."""
    from fusedopt.cli import gpt, plot, training

    steps = args.steps or STEPS
    text, shape = gpt.Text(), gpt.Shape(layers=2, width=64)
    runs = {
        name: training.new_run(kind, f"fusedopt.{name}", ARGUMENTS[name], steps, len(text.characters), shape)
        for name, kind in OPTIMIZERS.items()
    }
    parameters = sum(p.numel() for p in next(iter(runs.values())).model.parameters())
    report.console.print(
        f"{len(runs)} optimizers teach {len(text.train):,} characters of Python's documentation to a GPT of "
        f"{parameters:,} parameters each:\nsame start, same batches, {steps} steps; "
        f"threads: {torch.get_num_threads()}.\n"
    )
    training.show(runs, text, steps)
    held_out = {name: one.held_out_loss(text.held_out) for name, one in runs.items()}
    results = {
        name: {
            "arguments": ARGUMENTS[name],
            "engine": training.engine(one.optimizer),
            "train_loss": one.train_loss(),
            "held_out_loss": held_out[name],
            "optimizer_ms": one.median_ms(),
            "losses": one.losses,
        }
        for name, one in sorted(runs.items(), key=lambda item: _order(held_out[item[0]]))
    }
    content = {"steps": steps, "parameters": parameters, "runs": results, "versions": machine.versions()}
    _print(content)
    plot.draw_race(args.output, {name: runs[name] for name in results}, held_out)
    report.console.print(f"\nWrote {args.output}")
    report.write_json(args.json, content)
    return 0


def _order(loss: float) -> tuple[bool, float]:
    """The least first, and what is no number last."""
    return math.isnan(loss), loss


def _print(content: Json) -> None:
    columns = ("optimizer", "arguments", "engine", "held-out loss", "training loss", "ms per step")
    table = report.table(f"{content['steps']} steps; losses in nats per character", *columns, numeric=columns[3:])
    table.columns[0].no_wrap = True
    for name, row in content["runs"].items():
        arguments = ", ".join(f"{key}={value!r}" for key, value in row["arguments"].items())
        numbers = f"{row['held_out_loss']:.3f}", f"{row['train_loss']:.3f}", f"{row['optimizer_ms']:.2f}"
        table.add_row(name, arguments, row["engine"], *numbers)
    report.console.print(table)
