"""Trains the demo's character GPT with AdamW and with what is used beside it, each at its best learning rate.

Then Muon and AdamW from five starts each. ``pip install 'fusedopt[demo]'``, then ``python examples/field_rules.py``; it
writes ``field_rules.png`` and ``field_rules.json``, and prints both tables. Half an hour on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

import fusedopt
from fusedopt.cli import gpt, training

SEEDS = 5
MOST = 1e3  # nats: losses beyond it are all the same


@dataclass(frozen=True)
class Rule:
    """An optimizer, its options, and the learning rates of which the best is taken."""

    name: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)


ADAM = (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)
DECAY = {"weight_decay": 1e-2}
RULES = (
    Rule("AdamW", ADAM),
    Rule("Muon", (5e-3, 1e-2, 2e-2, 5e-2, 0.1), {**DECAY, "adamw": {"lr": 5e-3}}),
    Rule("AdEMAMix", ADAM, {**DECAY, "alpha_warmup": 300, "beta3_warmup": 300}),
    Rule("ADOPT", ADAM, {**DECAY, "decoupled_weight_decay": True}),
    Rule("Adan", (5e-4, 1e-3, 2e-3, 5e-3, 1e-2), DECAY),
    Rule("Lion", (1e-4, 2e-4, 5e-4, 1e-3, 2e-3), DECAY),
    Rule("Prodigy", (0.5, 1.0, 2.0), DECAY),
    Rule("ScheduleFreeAdamW", (1e-3, 2e-3, 5e-3, 1e-2, 2e-2), DECAY),
    Rule("ScheduleFreeSGD", (0.2, 0.5, 1.0, 2.0, 5.0)),
)


def trained(rule: Rule, rate: float, text: gpt.Text, steps: int, shape: gpt.Shape, seed: int = 0) -> dict[str, Any]:
    """One run: its losses, and the loss on what was held out."""
    kind = getattr(fusedopt, rule.name)
    run = training.new_run(kind, rule.name, {"lr": rate, **rule.options}, steps, len(text.characters), shape, seed)
    for _ in training.train({rule.name: run}, text, steps, seed):
        pass
    held_out = run.held_out_loss(text.held_out)
    found = {"train_loss": run.train_loss(), "held_out_loss": held_out if held_out < MOST else MOST}
    return {"optimizer": rule.name, "rate": rate, "seed": seed, **found, "losses": run.losses}


def best(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The run with the least loss on what was held out."""
    return min(runs, key=lambda run: run["held_out_loss"])


def show(chosen: list[dict[str, Any]], again: dict[str, list[dict[str, Any]]], rules: tuple[Rule, ...]) -> None:
    """Both tables."""
    console, rates = Console(), {rule.name: rule.rates for rule in rules}
    table = Table("optimizer", "rate", "of", "training", "held out", title="Losses in nats per character")
    for run in sorted(chosen, key=lambda run: run["held_out_loss"]):
        of = ", ".join(f"{rate:g}" for rate in rates[run["optimizer"]])
        table.add_row(
            run["optimizer"], f"{run['rate']:g}", of, f"{run['train_loss']:.3f}", f"{run['held_out_loss']:.3f}"
        )
    console.print(table)
    seeds = Table("optimizer", "rate", "held out", "mean", "deviation", title="From several starts")
    for name, runs in again.items():
        losses = [run["held_out_loss"] for run in runs]
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        each = ", ".join(f"{loss:.3f}" for loss in losses)
        seeds.add_row(name, f"{runs[0]['rate']:g}", each, f"{statistics.fmean(losses):.3f}", f"{spread:.3f}")
    console.print(seeds)


def draw(path: Path, chosen: list[dict[str, Any]], again: dict[str, list[dict[str, Any]]]) -> None:
    """Training losses: of all at their best rates, and of Muon and AdamW from every start."""
    _, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True)
    for run in sorted(chosen, key=lambda run: run["held_out_loss"]):
        left.plot(_smooth(run["losses"]), label=f"{run['optimizer']}, {run['held_out_loss']:.3f}", linewidth=1)
    for name, color in zip(again, ("tab:blue", "tab:orange"), strict=False):
        for run in again[name]:
            right.plot(_smooth(run["losses"]), color=color, linewidth=0.8, label=name if run["seed"] == 0 else None)
    for axes, title in ((left, "each at its best rate; held-out loss"), (right, "from several starts")):
        axes.set(xlabel="step", ylim=(1, 3.5), title=title)
        axes.legend(fontsize=8)
    left.set_ylabel("training loss, nats per character")
    plt.tight_layout()
    plt.savefig(path, dpi=110)


def _smooth(losses: list[float], width: int = 9) -> list[float]:
    return [statistics.fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]


def main() -> None:
    """Train all, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=int, default=gpt.Shape.layers)
    parser.add_argument("--width", type=int, default=gpt.Shape.width)
    parser.add_argument("--only", action="append", help="an optimizer; repeatable")
    parser.add_argument("--output", type=Path, default=Path("field_rules"))
    args = parser.parse_args()
    text, shape = gpt.Text(), gpt.Shape(layers=args.layers, width=args.width)
    rules = tuple(rule for rule in RULES if not args.only or rule.name in args.only)
    jobs = [(rule, rate) for rule in rules for rate in rule.rates]
    runs = [trained(rule, rate, text, args.steps, shape) for rule, rate in track(jobs, "rates")]
    chosen = [best([run for run in runs if run["optimizer"] == rule.name]) for rule in rules]
    compared = [(rule, run["rate"]) for rule, run in zip(rules, chosen, strict=True) if rule.name in ("AdamW", "Muon")]
    starts = [(rule, rate, seed) for rule, rate in compared for seed in range(SEEDS)]
    more = [trained(rule, rate, text, args.steps, shape, seed) for rule, rate, seed in track(starts, "starts")]
    again = {rule.name: [run for run in more if run["optimizer"] == rule.name] for rule, _ in compared}
    show(chosen, again, rules)
    draw(args.output.with_suffix(".png"), chosen, again)
    content = {"steps": args.steps, "runs": runs, "again": again, "torch": torch.__version__}
    args.output.with_suffix(".json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
