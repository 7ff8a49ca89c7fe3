"""Training copies of one model, each with an optimizer of its own, step by step in turn."""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import fusedopt
from fusedopt.aliases import Arguments
from fusedopt.cli import report
from fusedopt.cli.gpt import GPT, Shape, Text, batch
from fusedopt.engines import cpu

SEED = 0
BATCH = 16
MAX_GRAD_NORM = 1.0
# Measured with AdamW: here the curves stay within 1e-5; at 2e-3 any two implementations' rounding grows to 0.04.
LEARNING_RATE = 1e-3
# What those are given that learn nothing at that rate.
OPTIONS: dict[str, dict[str, float]] = {
    "ASGD": {"lr": 0.5},
    "Adadelta": {"lr": 1.0},
    "Adagrad": {"lr": 2e-2},
    "SGD": {"lr": 0.2, "momentum": 0.9},
}


@dataclass
class Run:
    """A model, its optimizer, and what training them gave."""

    label: str
    model: GPT
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    clips_itself: bool
    measures: bool = False  # its steps are told the loss
    losses: list[float] = field(default_factory=list[float])  # nats per character
    step_ms: list[float] = field(default_factory=list[float])  # clipping and the optimizer's step
    seconds: float = 0.0

    def train(self, x: Tensor, y: Tensor) -> None:
        """One step of training."""
        step = cast("Callable[..., object]", self.optimizer.step)
        predict = getattr(self.optimizer, "predict", None)
        start = time.perf_counter()
        if predict:
            predict()
        predicted = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.model.loss(x, y)
        loss.backward()
        before = time.perf_counter()
        if not self.clips_itself:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        step(**({"loss": loss.detach()} if self.measures else {}))
        end = time.perf_counter()
        self.schedule.step()
        self.losses.append(loss.item())
        self.step_ms.append(1e3 * (predicted - start + end - before))
        self.seconds += end - start

    def train_loss(self) -> float:
        """Mean loss of the last twentieth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 20) :])

    def median_ms(self) -> float:
        """Median milliseconds of clipping and the optimizer's step."""
        return statistics.median(self.step_ms)

    @torch.no_grad()
    def held_out_loss(self, numbers: Tensor, batches: int = 8) -> float:
        """Mean loss on text that was not trained on."""
        generator = torch.Generator().manual_seed(SEED)
        pairs = (batch(numbers, BATCH, self.model.context, generator) for _ in range(batches))
        to_evaluate, to_train = (getattr(self.optimizer, name, None) for name in ("eval", "train"))
        if to_evaluate:  # what it trains is not what is evaluated
            to_evaluate()
        loss = statistics.fmean(self.model.loss(x, y).item() for x, y in pairs)
        if to_train:
            to_train()
        return loss


def new_run(
    kind: type[torch.optim.Optimizer],
    label: str,
    arguments: Arguments,
    steps: int,
    characters: int,
    shape: Shape,
    seed: int = SEED,
) -> Run:
    """A run of an optimizer; all have the same start, gradients clipped to the same norm, and the same schedule.

    Args:
        kind: The optimizer's class.
        label: What the run is called.
        arguments: The optimizer's.
        steps: How many steps the learning rate's schedule has.
        characters: How many characters the text has.
        shape: Sizes of the model.
        seed: Of the model's start.
    """
    torch.manual_seed(seed)
    model = GPT(characters, shape)
    is_ours = issubclass(kind, fusedopt.FusedOptimizer)
    clips = {"max_grad_norm": MAX_GRAD_NORM} if is_ours else {}
    make = cast("Callable[..., torch.optim.Optimizer]", kind)
    optimizer = make(_parameters(kind, model), **clips, **arguments)
    schedule = LambdaLR(optimizer, lambda step: _warmup_cosine(step / steps))
    measures = "loss" in inspect.signature(optimizer.step).parameters
    return Run(label, model, optimizer, schedule, is_ours, measures)


def _parameters(kind: type[torch.optim.Optimizer], model: GPT) -> object:
    """What an optimizer is given of a model."""
    if kind is fusedopt.Muon:
        return fusedopt.muon_groups(model)
    return model if kind is fusedopt.NSGD else model.parameters()


def new_runs(optimizer: str, steps: int, characters: int, shape: Shape) -> dict[str, Run]:
    """Two runs that differ in the optimizer's implementation only.

    Args:
        optimizer: A name that torch.optim and fusedopt share.
        steps: How many steps the learning rate's schedule has.
        characters: How many characters the text has.
        shape: Sizes of the model.

    Returns:
        The runs "torch" and "fusedopt".
    """
    arguments: Arguments = OPTIONS.get(optimizer, {"lr": LEARNING_RATE})
    theirs, ours = getattr(torch.optim, optimizer), getattr(fusedopt, optimizer)
    # torch's fastest; where it has no fused implementation, what it chooses by itself.
    fused = {"fused": True} if "fused" in inspect.signature(theirs).parameters else {}
    rest = steps, characters, shape
    return {
        "torch": new_run(theirs, f"torch.optim.{optimizer}", arguments | fused, *rest),
        "fusedopt": new_run(ours, f"fusedopt.{optimizer}", arguments, *rest),
    }


def engine(optimizer: torch.optim.Optimizer) -> str:
    """What runs the step of one of our optimizers that has done one: ``cpu (v4)``."""
    names = dict.fromkeys(stepping.name for stepping in cast("fusedopt.FusedOptimizer", optimizer).engines)
    return ", ".join(f"cpu ({cpu.load()[2]})" if name == "cpu" else name for name in names)


def show(runs: dict[str, Run], text: Text, steps: int) -> None:
    """Train all runs, with a progress bar and the least and the largest of their losses."""
    with report.progress_bar() as bar:
        task = bar.add_task("", total=steps)
        for _ in train(runs, text, steps):
            losses = [(one.losses[-1], key) for key, one in runs.items()]
            shown = losses if len(losses) == 2 else (min(losses), max(losses))
            bar.update(task, advance=1, description="loss " + ", ".join(f"{key} {loss:.3f}" for loss, key in shown))


def train(runs: dict[str, Run], text: Text, steps: int, seed: int = SEED) -> Iterator[None]:
    """Train all runs on the same batches, in turn: what else the machine does strikes both alike.

    Args:
        runs: Which.
        text: On what.
        steps: How many.
        seed: Of what is drawn from it.

    Yields:
        Nothing, after every step.
    """
    generator = torch.Generator().manual_seed(seed)
    order = list(runs.values())
    context = order[0].model.context
    for _ in range(steps):
        x, y = batch(text.train, BATCH, context, generator)
        for run in order:
            run.train(x, y)
        order.reverse()
        yield


def _warmup_cosine(done: float) -> float:
    """Factor of the learning rate: up over a tenth of the steps, then down to a tenth."""
    return (done + 0.01) / 0.11 if done < 0.1 else 0.1 + 0.45 * (1 + math.cos(math.pi * (done - 0.1) / 0.9))
