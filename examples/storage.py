"""Trains a small character GPT with every way to store AdamW's states and masters, and compares what it learns.

Run ``python examples/storage.py``; it writes ``storage.png`` and prints a table. An hour on two cores.

Models are evaluated on text that they have not seen, in float32, by what their parameters stand for: masters where
there are any.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.progress import Progress
from torch.func import functional_call
from torch.nn import functional

import fusedopt
from fusedopt.cli.gpt import GPT, Shape, Text, batch

BATCH, LEARNING_RATE = 16, 1e-3

# By what they are called: the parameters' dtype, and how they are stored.
STORAGES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "float32": (torch.float32, {}),
    "float32, 8-bit states": (torch.float32, {"state_dtype": "8bit"}),
    "bfloat16, fp32 masters": (torch.bfloat16, {"master": "fp32"}),
    "bfloat16, split": (torch.bfloat16, {"master": "split"}),
    "bfloat16, split, bfloat16 states": (torch.bfloat16, {"master": "split", "state_dtype": torch.bfloat16}),
    "bfloat16, split, 8-bit states": (torch.bfloat16, {"master": "split", "state_dtype": "8bit"}),
    "bfloat16, stochastic, bfloat16 states": (
        torch.bfloat16,
        {"master": "stochastic", "state_dtype": torch.bfloat16},
    ),
    "bfloat16, no masters": (torch.bfloat16, {}),
}


def loss_of(model: GPT, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats per character, in float32 whatever the model is."""
    return functional.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


@torch.no_grad()
def held_out_loss(model: GPT, optimizer: fusedopt.AdamW, text: Text, batches: int = 16) -> float:
    """That on unseen text, always of the same batches, of a float32 model."""
    masters = fusedopt.master_weights(optimizer)
    wide = GPT(len(text.characters), Shape())
    weights = {name: masters[p] for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(batches):
        x, y = batch(text.held_out, BATCH, model.context, generator)
        logits = functional_call(wide, weights, (x,))
        total += functional.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
    return total / batches


def train(text: Text, name: str, seed: int, steps: int, every: int) -> dict[str, Any]:
    """Held-out losses every few steps, and how many bytes are held for each parameter."""
    dtype, storage = STORAGES[name]
    torch.manual_seed(seed)
    model = GPT(len(text.characters), Shape()).bfloat16().to(dtype)  # all begin with what bfloat16 holds
    optimizer = fusedopt.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1, max_grad_norm=1.0, **storage)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(1, steps + 1):
        done = step / steps
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(step / 100, 0.51 + 0.49 * math.cos(math.pi * done))
        x, y = batch(text.train, BATCH, model.context, generator)
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        if step % every == 0:
            losses.append(held_out_loss(model, optimizer, text))
    held = sum(
        t.untyped_storage().nbytes() for p in model.parameters() for t in (p, *optimizer.state[p].values()) if t.dim()
    )
    return {"losses": losses, "bytes": held / sum(p.numel() for p in model.parameters())}


def draw(path: Path, runs: dict[str, list[dict[str, Any]]], every: int) -> None:
    """The curves' means over seeds, and the losses at the end of every seed."""
    figure, (curves, ends) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for k, (name, of_seeds) in enumerate(runs.items()):
        mean = [statistics.fmean(losses) for losses in zip(*(run["losses"] for run in of_seeds), strict=True)]
        curves.plot([every * (i + 1) for i in range(len(mean))], mean, label=name, lw=1.2)
        ends.plot([run["losses"][-1] for run in of_seeds], [k] * len(of_seeds), "o", ms=4, alpha=0.7)
    curves.set(xlabel="step", ylabel="held-out loss, nats per character", ylim=(None, 2.4))
    curves.legend(frameon=False, fontsize=8)
    ends.set(yticks=range(len(runs)), yticklabels=list(runs), xlabel="at the end, by seed")
    ends.invert_yaxis()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--every", type=int, default=50, help="steps from one evaluation to the next")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="each of one thread")
    parser.add_argument("--output", type=Path, default=Path("storage.png"))
    parser.add_argument("--json", type=Path, help="where to write all losses, and to go on from those that are there")
    args = parser.parse_args()
    done = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    text = Text()
    with (
        ProcessPoolExecutor(args.processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool,
        Progress() as progress,
    ):
        jobs = {
            pool.submit(train, text, name, seed, args.steps, args.every): f"{name}, seed {seed}"
            for seed in range(args.seeds)
            for name in STORAGES
            if f"{name}, seed {seed}" not in done
        }
        task = progress.add_task("training", total=len(jobs))
        for job in as_completed(jobs):
            done[jobs[job]] = job.result()
            progress.advance(task)
            print(f"{jobs[job]}: {done[jobs[job]]['losses'][-1]:.4f}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(done))
    runs = {name: [done[f"{name}, seed {seed}"] for seed in range(args.seeds)] for name in STORAGES}
    print("\n| storage | bytes per parameter | held-out loss: mean | seeds |\n|---|---|---|---|")
    for name, of_seeds in runs.items():
        ends = [run["losses"][-1] for run in of_seeds]
        seeds = " ".join(f"{end:.4f}" for end in ends)
        print(f"| {name} | {of_seeds[0]['bytes']:.2f} | {statistics.fmean(ends):.4f} | {seeds} |")
    twins = zip(runs["bfloat16, fp32 masters"], runs["bfloat16, split"], strict=True)
    print("\nsplit is its fp32-master twin bit for bit:", all(a["losses"] == b["losses"] for a, b in twins))
    draw(args.output, runs, args.every)


if __name__ == "__main__":
    main()
