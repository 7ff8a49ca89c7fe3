"""Trains two nets without normalisation from scales that do not suit them, and from those that grad_init finds.

One explodes: a residual perceptron whose layers are drawn as if no path went around them. One vanishes: a plain
perceptron as torch draws it. Both predict the next character of a text, from five starts each, with SGD and AdamW.
Beside grad_init stand the plain remedies: smaller learning rates (the best of three), clipping, and the other way to
draw the weights. Seconds are of one core's own time.
``pip install 'fusedopt[demo]'``, then ``python examples/initialization.py``; it writes ``initialization.png`` and
``initialization.json``, and prints a table. Five minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import fusedopt
from fusedopt.cli import gpt

BATCH, CONTEXT, WIDTH, BLOCK = 64, 16, 64, 10
RATES = {"SGD": 0.1, "AdamW": 3e-3}
SMALLER = (0.1, 0.01, 0.001)
AS_IS, SLOWER, CLIPPED, OTHER, OURS = "as it is", "smaller rate", "clipped to 1", "other draw", "grad_init"
COLORS = {AS_IS: "0.4", SLOWER: "tab:orange", CLIPPED: "tab:red", OTHER: "tab:green", OURS: "tab:blue"}


class Perceptron(nn.Module):
    """Predicts a character from those before it; no normalisation.

    Args:
        characters: How many there are.
        depth: Of hidden layers.
        residual: Whether each is added to what it gets.
        he: Whether weights keep the variance of what goes through them, or are drawn as torch does.
    """

    def __init__(self, characters: int, depth: int, *, residual: bool, he: bool) -> None:
        super().__init__()
        self.residual = residual
        self.embedding = nn.Embedding(characters, 16)
        sizes = [16 * CONTEXT] + [WIDTH] * (depth + 1)
        self.hidden = nn.ModuleList(nn.Linear(n, m) for n, m in zip(sizes, sizes[1:], strict=False))
        self.output = nn.Linear(WIDTH, characters)
        for layer in self.hidden if he else ():
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the character that follows."""
        first, *others = self.hidden
        x = F.relu(first(self.embedding(x).flatten(1)))
        for layer in others:
            x = x + F.relu(layer(x)) if self.residual else F.relu(layer(x))
        return self.output(x)


NETS = {
    "residual, 16 layers, drawn by He et al.": {"depth": 16, "residual": True, "he": True},
    "plain, 12 layers, drawn by torch": {"depth": 12, "residual": False, "he": False},
}


@dataclass(frozen=True)
class Job:
    """One run: of which net, what begins and trains it, and where its randomness begins."""

    net: str
    optimizer: str
    row: str
    rate: float
    seed: int


def batch(numbers: Tensor, generator: torch.Generator, size: int = BATCH) -> tuple[Tensor, Tensor]:
    """Stretches of a text, and the character after each."""
    x, y = gpt.batch(numbers, size, CONTEXT, generator)
    return x, y[:, -1]


def loss_of(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in nats."""
    return F.cross_entropy(model(pair[0]), pair[1])


def run(job: Job, text: gpt.Text, steps: int, scale_steps: int) -> dict[str, Any]:
    """Draw a net, scale it if that is what the row says, and train it."""
    torch.manual_seed(job.seed)
    options: dict[str, Any] = NETS[job.net]
    model = Perceptron(len(text.characters), **options | {"he": options["he"] != (job.row == OTHER)})
    generator, found = torch.Generator().manual_seed(job.seed), {}
    begun = time.process_time()
    if job.row == OURS:
        pairs = [batch(text.train, generator) for _ in range(2 * scale_steps)]
        rule = "sgd" if job.optimizer == "SGD" else "adam"
        done = fusedopt.grad_init(model, loss_of, pairs, rule, lr=job.rate, steps=scale_steps, progress=False)
        found = {"norm_steps": done.norm_steps, "grad_norms": [done.grad_norms[0], done.grad_norms[-1]]}
        found["scales"] = {name: round(scale, 4) for name, scale in done.scales.items()}
    scaled = time.process_time()
    extra = {"momentum": 0.9} if job.optimizer == "SGD" else {}
    extra |= {"max_grad_norm": 1.0} if job.row == CLIPPED else {}
    optimizer = getattr(fusedopt, job.optimizer)(model.parameters(), lr=job.rate, **extra)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(text.train, generator))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    trained = time.process_time()
    with torch.no_grad():
        held_out = loss_of(model, batch(text.held_out, torch.Generator().manual_seed(0), 4096)).item()
    blocks = [round(statistics.fmean(losses[i : i + BLOCK]), 4) for i in range(0, steps, BLOCK)]
    seconds = {"init_seconds": round(scaled - begun, 2), "train_seconds": round(trained - scaled, 2)}
    return {**asdict(job), "first_loss": losses[0], "held_out_loss": held_out, **seconds, **found, "losses": blocks}


def rows(runs: list[dict[str, Any]]) -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Runs by net, optimizer and row; of the smaller rates those of the best."""
    found: dict[tuple[str, str, str], dict[float, list[dict[str, Any]]]] = {}
    for one in runs:
        rates = found.setdefault((one["net"], one["optimizer"], one["row"]), {})
        rates.setdefault(one["rate"], []).append(one)
    return {key: min(rates.values(), key=mean) for key, rates in found.items()}


def mean(runs: list[dict[str, Any]]) -> float:
    """Of held-out losses; infinite if any run diverged."""
    losses = [one["held_out_loss"] for one in runs]
    return statistics.fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def show(chosen: dict[tuple[str, str, str], list[dict[str, Any]]]) -> None:
    """The table."""
    columns = ("net", "optimizer", "", "rate", "first loss", "held out", "deviation", "diverged", "seconds")
    table = Table(*columns, title="Means of several starts, nats per character")
    for (net, optimizer, row), runs in chosen.items():
        held_out = [one["held_out_loss"] for one in runs if math.isfinite(one["held_out_loss"])]
        spread = f"{statistics.stdev(held_out):.3f}" if len(held_out) > 1 else ""
        each = [f"{statistics.fmean(one[key] for one in runs):.1f}" for key in ("init_seconds", "train_seconds")]
        table.add_row(
            *(net.split(",")[0], optimizer, row, f"{runs[0]['rate']:g}"),
            f"{statistics.fmean(one['first_loss'] for one in runs):.4g}",
            *(f"{statistics.fmean(held_out):.3f}" if held_out else "", spread),
            *(f"{len(runs) - len(held_out)} of {len(runs)}", " + ".join(each)),
        )
    Console(width=120).print(table)


def draw(path: Path, chosen: dict[tuple[str, str, str], list[dict[str, Any]]]) -> None:
    """Training losses: means, and from the least to the largest, of those that did not diverge."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True, layout="constrained")
    for (net, optimizer, row), runs in chosen.items():
        ax = axes[list(NETS).index(net)][list(RATES).index(optimizer)]
        kept = [one["losses"] for one in runs if math.isfinite(one["held_out_loss"])]
        lost = len(runs) - len(kept)
        label = f"{row}, rate {runs[0]['rate']:g}" + (f" ({lost} of {len(runs)} diverged)" if lost else "")
        at = list(zip(*kept, strict=True))  # means of blocks of steps, of all starts
        steps = [BLOCK * (i + 0.5) for i in range(len(at))]
        ax.plot(steps, [statistics.fmean(losses) for losses in at], color=COLORS[row], label=label)
        ax.fill_between(steps, [min(x) for x in at], [max(x) for x in at], color=COLORS[row], alpha=0.2, linewidth=0)
        ax.set(title=f"{net}: {optimizer}", ylim=(1.6, 5))
        ax.legend(frameon=False, fontsize=8, loc="lower left")
    for ax in axes[1]:
        ax.set_xlabel("training step")
    for ax in axes[:, 0]:
        ax.set_ylabel("training loss, nats per character")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train all, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--scale-steps", type=int, default=390, help="of grad_init")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("initialization"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    text, jobs = gpt.Text(), list[Job]()
    for net in NETS:
        for optimizer, rate in RATES.items():
            for seed in range(args.seeds):
                jobs += [Job(net, optimizer, row, rate, seed) for row in (AS_IS, OURS, CLIPPED, OTHER)]
                jobs += [Job(net, optimizer, SLOWER, rate * part, seed) for part in SMALLER]
    runs = [run(job, text, args.steps, args.scale_steps) for job in track(jobs, "runs")]
    chosen = rows(runs)
    show(chosen)
    draw(args.output.with_suffix(".png"), chosen)
    # What is not finite has no place in JSON: it is null there.
    said = json.dumps(runs).replace("NaN", "null").replace("-Infinity", "null").replace("Infinity", "null")
    content = {"steps": args.steps, "scale_steps": args.scale_steps, "torch": torch.__version__}
    args.output.with_suffix(".json").write_text(json.dumps({**content, "runs": json.loads(said)}) + "\n")


if __name__ == "__main__":
    main()
