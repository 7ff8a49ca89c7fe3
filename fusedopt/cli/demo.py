"""``fusedopt demo``: a small character GPT, trained with torch's optimizer and with ours.

JSON::

    {"optimizer": name, "steps": int, "parameters": int, "engine": what ran our step,
     "runs": {"torch" and "fusedopt": {"train_loss", "held_out_loss", "optimizer_ms", "seconds", "losses"}},
     "optimizer_speedup": torch's optimizer_ms over ours,
     "max_loss_difference": float, "sample": text written by our model,
     "versions": {"fusedopt", "torch", "python", "numpy", "triton" if installed}}

Losses are in nats per character, ``optimizer_ms`` is the median over the steps, clipping included. With ``--optimizer
all`` the JSON is that of ``fusedopt.cli.race``.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.markup import escape

import fusedopt
from fusedopt.aliases import Json
from fusedopt.cli import machine, race, report
from fusedopt.optimizers import OPTIMIZERS

HELP = "train a small GPT with torch's optimizer and with ours: the same losses, and the time of each"

STEPS = 1500
ALL = "all"
SAMPLE_LENGTH = 240


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    theirs = {name for name in OPTIMIZERS if hasattr(torch.optim, name)} - {"Muon"}  # which takes matrices alone
    shared = sorted(theirs)
    parser.add_argument(
        "--steps", type=report.positive, help=f"of training (default: {STEPS}; {race.STEPS} of all optimizers)"
    )
    parser.add_argument(
        "--optimizer",
        default="AdamW",
        choices=[*shared, ALL],
        metavar="NAME",
        help=f"one that torch has too: {', '.join(shared)} (default: %(default)s); "
        f"or {ALL!r}: every one of ours, raced against one another",
    )
    parser.add_argument(
        "--output", type=Path, default="fusedopt-demo.png", metavar="FILE", help="the plot (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Train both models, print the comparison, draw the plot, and write the JSON file if one was asked for."""
    if find_spec("matplotlib") is None:
        raise report.CommandError("the plot needs matplotlib: pip install 'fusedopt[demo]'")
    report.check_writable(args.output)
    report.console.print(f"fusedopt {fusedopt.__version__}, torch {torch.__version__}. Reading the text ...")
    if args.optimizer == ALL:
        return race.run(args)
    from fusedopt.cli import gpt, plot, training

    steps = args.steps or STEPS
    text, shape = gpt.Text(), gpt.Shape()
    runs = training.new_runs(args.optimizer, steps, len(text.characters), shape)
    ours = runs["fusedopt"]
    parameters = sum(p.numel() for p in ours.model.parameters())
    report.console.print(
        f"A GPT of {parameters:,} parameters learns {len(text.train):,} characters of Python's documentation,\n"
        f"twice at once: same start, same batches; threads: {torch.get_num_threads()}.\n"
    )
    training.show(runs, text, steps)

    results = {
        key: {
            "train_loss": r.train_loss(),
            "held_out_loss": r.held_out_loss(text.held_out),
            "optimizer_ms": r.median_ms(),
            "seconds": r.seconds,
            "losses": r.losses,
        }
        for key, r in runs.items()
    }
    generator = torch.Generator().manual_seed(training.SEED)
    sample = text.decode(ours.model.continue_text(text.encode("The "), SAMPLE_LENGTH, generator))
    difference = max(abs(a - b) for a, b in zip(runs["torch"].losses, ours.losses, strict=True))
    content = {
        "optimizer": args.optimizer,
        "steps": steps,
        "parameters": parameters,
        "engine": training.engine(ours.optimizer),
        "runs": results,
        "optimizer_speedup": runs["torch"].median_ms() / ours.median_ms(),
        "max_loss_difference": difference,
        "sample": sample,
        "versions": machine.versions(),
    }
    _print(content, {key: r.label for key, r in runs.items()})
    plot.draw(args.output, runs, difference)
    report.console.print(f"Wrote {args.output}")
    report.write_json(args.json, content)
    return 0


def _print(content: Json, labels: dict[str, str]) -> None:
    rows = {
        "final training loss": ("train_loss", ".4f"),
        "held-out loss": ("held_out_loss", ".4f"),
        "optimizer ms per step": ("optimizer_ms", ".3f"),
        "seconds in all": ("seconds", ".1f"),
    }
    columns = (*labels.values(), "ratio")
    table = report.table(f"{content['steps']} steps; losses in nats per character", "", *columns, numeric=columns)
    for row, (key, form) in rows.items():
        values = [content["runs"][name][key] for name in labels]
        table.add_row(row, *(format(value, form) for value in values), f"{values[0] / values[1]:.2f}")
    report.console.print(table)
    report.console.print(f"\nOurs was stepped by engine {content['engine']}.")
    report.console.print(f"Largest difference between the loss curves: {content['max_loss_difference']:.1e}")
    report.console.print(f"\n[bold]Our model writes:[/]\n{escape(content['sample'])}\n")
