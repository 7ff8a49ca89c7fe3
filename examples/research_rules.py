"""Trains two small models with every research rule and with SGD, Adam and AdamW beside them, each at its best rate.

A convolutional net with batch normalisation on scikit-learn's handwritten digits, and a character GPT on English text.
``pip install scikit-learn 'fusedopt[demo]'``, then ``python examples/research_rules.py``; it writes
``research_rules.png`` and ``research_rules.json``, and prints a table. A quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import fusedopt
from fusedopt.cli.gpt import GPT, Shape, Text, batch

SEED = 0
Losses = Callable[[nn.Module], Tensor]  # of the samples of a batch


@dataclass(frozen=True)
class Rule:
    """An optimizer, its options, and the learning rates of which the best is taken."""

    name: str
    optimizer: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    rescales: bool = False

    def build(self, model: nn.Module, lr: float) -> fusedopt.FusedOptimizer:
        """The optimizer of a model."""
        params: Any = fusedopt.scale_invariant_groups(model) if self.rescales else model.parameters()
        params = model if self.optimizer == "NSGD" else params
        return getattr(fusedopt, self.optimizer)(params, lr=lr, **self.options)


LARGE, SMALL, KALMAN = (0.03, 0.1, 0.3, 1.0), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1), (0.03, 0.1, 0.3, 1.0, 3.0)
MOMENTUM, DECAY = {"momentum": 0.9}, {"weight_decay": 1e-2}
RULES = (
    Rule("SGD", "SGD", (0.01, *LARGE), MOMENTUM),
    Rule("Adam", "Adam", SMALL),
    Rule("AdamW", "AdamW", SMALL, DECAY),
    Rule("AMSGD", "AMSGD", (*LARGE, 3.0, 10.0)),
    Rule("AMAdamW", "AMAdamW", SMALL),
    Rule("AdamP", "AdamP", SMALL, DECAY),
    Rule("SGDP", "SGDP", (0.01, *LARGE), MOMENTUM),
    Rule("SGD, rescaled", "SGD", (0.01, *LARGE), MOMENTUM, rescales=True),
    Rule("SWATS", "SWATS", SMALL, {"tol": 1e-3}),
    Rule("KoalaV", "KoalaV", KALMAN, {"r": "online"}),
    Rule("KoalaM", "KoalaM", KALMAN, {"r": "online"}),
    Rule("NSGD", "NSGD", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0), MOMENTUM),
)
COLORS = [f"tab:{name}" for name in "blue orange green red purple brown pink olive cyan".split()]
BASELINES = {"SGD": "0.2", "Adam": "0.45", "AdamW": "0.65"}


class Digits:
    """Handwritten digits of 8 by 8, a fifth of them held out, and a net for them."""

    name, steps = "digits", 300
    judged = "held out"  # the others are learnt by heart

    def __init__(self) -> None:
        data = load_digits()
        order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(SEED))
        self.x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
        self.y = torch.tensor(data.target)[order]
        self.kept = len(self.y) * 4 // 5

    def model(self) -> nn.Module:
        """Three convolutions, each followed by batch normalisation."""
        layers: list[nn.Module] = []
        for i, o, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 2)):
            layers += [nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))

    def batches(self) -> Iterator[Losses]:
        """What tells the losses of each batch."""
        generator = torch.Generator().manual_seed(SEED)
        while True:
            i = torch.randint(self.kept, (64,), generator=generator)
            yield lambda model, i=i: functional.cross_entropy(model(self.x[i]), self.y[i], reduction="none")

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """The loss on what was held out."""
        loss = functional.cross_entropy(model.eval()(self.x[self.kept :]), self.y[self.kept :])
        return loss.item()


class Characters:
    """English text, and a small GPT for it."""

    name, steps = "characters", 1000
    judged = "train"  # each stretch is seen once

    def __init__(self) -> None:
        self.text = Text()

    def model(self) -> GPT:
        """Two layers."""
        return GPT(len(self.text.characters), Shape(layers=2, width=64, context=48))

    def batches(self) -> Iterator[Losses]:
        """What tells the losses of each batch."""
        generator = torch.Generator().manual_seed(SEED)
        while True:
            x, y = batch(self.text.train, 16, 48, generator)
            yield lambda model, x=x, y=y: self._losses(model, x, y)

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        """The loss on text that was held out."""
        generator = torch.Generator().manual_seed(SEED)
        x, y = batch(self.text.held_out, 128, 48, generator)
        return self._losses(model, x, y).mean().item()

    @staticmethod
    def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        losses = functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none")
        return losses.view(y.shape).mean(1)


def train(task: Any, rule: Rule, rate: float) -> dict[str, Any]:
    """One run: its training losses, and the loss on what was held out."""
    torch.manual_seed(SEED)
    model = task.model()
    optimizer = rule.build(model, rate)
    curve = []
    for t, losses_of in zip(range(task.steps), task.batches(), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (t + 1) / 30) * 0.5 * (1 + math.cos(math.pi * t / task.steps))
        if isinstance(optimizer, fusedopt.KoalaM):
            optimizer.predict()
        losses = losses_of(model)
        curve.append(losses.mean().item())
        if not math.isfinite(curve[-1]):
            return {"rate": rate, "curve": curve, "train": math.inf, "held out": math.inf}
        optimizer.zero_grad()
        losses.mean().backward()
        measures = isinstance(optimizer, (fusedopt.KoalaV, fusedopt.KoalaM))
        optimizer.step(**({"per_sample_loss": losses} if measures else {}))
    found = {"rate": rate, "curve": curve, "train": sum(curve[-20:]) / 20, "held out": task.held_out(model)}
    if isinstance(optimizer, fusedopt.SWATS):
        found["phase"] = optimizer.phase_of(0)
    return found


def draw(path: Path, runs: dict[str, dict[str, dict[str, Any]]]) -> None:
    """The training losses of the best rates, smoothed: the baselines grey."""
    figure, axes = plt.subplots(1, len(runs), figsize=(12, 5), layout="constrained")
    for ax, (task, of_task) in zip(axes, runs.items(), strict=True):
        ax.set_prop_cycle(color=COLORS)
        for rule, run in of_task.items():
            curve = torch.tensor(run["curve"])
            smooth = torch.nn.functional.avg_pool1d(curve[None, None], 15, 5).flatten()
            style = {"color": BASELINES[rule], "linewidth": 2.5} if rule in BASELINES else {"linewidth": 1}
            ax.plot(torch.arange(len(smooth)) * 5 + 7, smooth, label=rule, **style)
        ax.set(title=task, xlabel="step", ylabel="training loss", yscale="log")
    axes[-1].legend(ncols=2, fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, choose the rates, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("research_rules.png"))
    output = parser.parse_args().output
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for task in (Digits(), Characters()):
        tried = [(rule, rate) for rule in RULES for rate in rule.rates]
        of_task = runs.setdefault(task.name, {})
        for rule, rate in track(tried, task.name):
            run = train(task, rule, rate)
            of_task[rule.name] = min(of_task.get(rule.name, run), run, key=lambda run: run[task.judged])
    table = Table("rule", *(f"{task}: {what}" for task in runs for what in ("rate", "train", "held out")))
    for rule in RULES:
        found = [runs[task][rule.name] for task in runs]
        cells = [[f"{run['rate']:g}", f"{run['train']:.3g}", f"{run['held out']:.3g}"] for run in found]
        table.add_row(rule.name, *(cell for row in cells for cell in row))
    Console(width=110).print(table)
    draw(output, runs)
    output.with_suffix(".json").write_text(json.dumps(runs))


if __name__ == "__main__":
    main()
