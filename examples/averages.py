"""Trains a small character GPT, and compares its weights with their moving average on text that it has not seen.

Run ``python examples/averages.py``; it writes ``averages.png`` and prints a table. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.progress import track

import fusedopt
from fusedopt.cli.gpt import GPT, Shape, Text, batch

BATCH, SEED = 16, 0
DECAYS = (0.9, 0.98, 0.995)


@torch.no_grad()
def held_out_loss(model: GPT, text: Text, batches: int = 8) -> float:
    """Mean loss in nats per character, always of the same batches."""
    generator = torch.Generator().manual_seed(SEED)
    pairs = (batch(text.held_out, BATCH, model.context, generator) for _ in range(batches))
    return sum(model.loss(x, y).item() for x, y in pairs) / batches


def train(text: Text, decay: float, steps: int, every: int, anneals: bool) -> dict[str, list[float]]:
    """Held-out losses of the weights and of their average, every few steps."""
    torch.manual_seed(SEED)
    model = GPT(len(text.characters), Shape())
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, average=fusedopt.EMA(decay))
    generator = torch.Generator().manual_seed(SEED)
    losses: dict[str, list[float]] = {"step": [], "weights": [], "average": []}
    group = optimizer.param_groups[0]
    for step in track(range(1, steps + 1), f"decay {decay}{', annealed' if anneals else ''}"):
        group["lr"] = 1e-3 * min(1, step / 100) * (1 - step / (steps + 1) if anneals else 1)
        x, y = batch(text.train, BATCH, model.context, generator)
        optimizer.zero_grad()
        model.loss(x, y).backward()
        optimizer.step()
        if step % every == 0:
            losses["step"].append(step)
            losses["weights"].append(held_out_loss(model, text))
            with optimizer.averaged():
                losses["average"].append(held_out_loss(model, text))
    return losses


def draw(path: Path, runs: dict[tuple[float, bool], dict[str, list[float]]]) -> None:
    """The curves, with a constant learning rate and with one that goes to zero."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for ax, anneals in zip(axes, (False, True), strict=True):
        own = {decay: run for (decay, annealed), run in runs.items() if annealed == anneals}
        first = next(iter(own.values()))
        ax.plot(first["step"], first["weights"], color="0.6", label="weights")
        for decay, run in own.items():
            ax.plot(run["step"], run["average"], label=f"average, decay {decay}")
        ax.set(title="learning rate to zero" if anneals else "constant learning rate", xlabel="step")
        ax.legend(frameon=False)
    axes[0].set(ylabel="held-out loss, nats per character", ylim=(None, 2.6))
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=25, help="steps from one evaluation to the next")
    parser.add_argument("--output", type=Path, default="averages.png")
    args: Any = parser.parse_args()
    text = Text()
    runs = {}
    for anneals in (False, True):
        for decay in DECAYS:
            runs[decay, anneals] = run = train(text, decay, args.steps, args.every, anneals)
            print(
                f"decay {decay}, {'learning rate to zero' if anneals else 'constant learning rate'}: at the end "
                f"weights {run['weights'][-1]:.4f}, average {run['average'][-1]:.4f}; at best "
                f"{min(run['weights']):.4f} and {min(run['average']):.4f}"
            )
    draw(args.output, runs)


if __name__ == "__main__":
    main()
