"""``fusedopt bench trainer``: what transformers' Trainer takes to measure, clip and step, beside torch's own optimizer.

Each variant is a Trainer with a GPT-2 of its own; they take turns in one process. Timed is what Trainer calls between
the backward pass and the schedule: its clipping, or its measuring alone, and the optimizer's step.

JSON::

    {"commit", "versions", "machine", "device",
     "rows": [{"parameters", "max_grad_norm", "variant", "median", "q1", "q3" (seconds), "rounds",
               "ratio", "ratio_q1", "ratio_q3": time over that of ours with FusedClipping}]}
"""

from __future__ import annotations

import argparse
import gc
import logging
import time
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fusedopt
from fusedopt.bench import timing
from fusedopt.bench.limits import limits
from fusedopt.bench.rows import LIMIT, facts
from fusedopt.cli import report
from fusedopt.integrations.transformers import FusedClipping

ROUNDS, WARMUP = 15, 2
TOKENS = 8  # of a batch: what is timed does not depend on them
CLIPS = (1.0, 0.0)
OURS = "fusedopt, FusedClipping"
LR, WEIGHT_DECAY = 1e-3, 0.1
STREAMS = (
    8  # of AdamW, when the gradient is measured: that once more; parameter, gradient and two states; three written
)


def run(args: argparse.Namespace) -> int:
    """Time every variant, print the table."""
    try:
        import transformers
    except ImportError as error:
        raise report.CommandError(f"{error}; pip install 'fusedopt[clients]'") from error
    transformers.utils.logging.set_verbosity_error()
    rows = []
    with report.progress_bar() as bar, TemporaryDirectory() as folder:
        task = bar.add_task("trainer", total=len(CLIPS) * (WARMUP + args.rounds))
        for clip in CLIPS:
            rows += _raced(folder, clip, args, lambda: bar.advance(task))
            gc.collect()
    document = facts(_device(), []) | {"rows": rows}
    document["versions"] |= {name: version(name) for name in ("transformers", "accelerate")}
    _show(document)
    report.write_json(args.json, document)
    return 0


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _Turn:
    """A Trainer, as its loop leaves it between two steps."""

    def __init__(self, cls: type[Any], make: Any, folder: str, clip: float, layers: int, width: int) -> None:
        import transformers

        torch.manual_seed(0)
        shape = transformers.GPT2Config(n_layer=layers, n_embd=width, n_head=max(1, width // 64))
        model = transformers.GPT2LMHeadModel(shape)
        row = torch.arange(TOKENS)
        arguments = transformers.TrainingArguments(
            folder, max_steps=1, max_grad_norm=clip, use_cpu=_device().type == "cpu", report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", per_device_train_batch_size=1,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row}]
        self._trainer = cls(model, arguments, train_dataset=data, optimizers=(make(model.parameters()), None))
        self._trainer.remove_callback(transformers.PrinterCallback)
        self._trainer.train()  # prepares everything
        self._model, self._inputs = self._trainer.model_wrapped, {"input_ids": row[None], "labels": row[None]}
        self._clips = clip > 0

    def prepare(self) -> None:
        """Make gradients."""
        self._model.zero_grad()
        self._model.train()
        self._trainer.training_step(self._model, dict(self._inputs))

    def __call__(self) -> None:
        """What comes next in Trainer's loop."""
        norm = self._trainer._clip_grad_norm(self._model) if self._clips else None
        self._trainer._get_grad_norm(self._model, grad_norm=norm)
        self._trainer.optimizer.step()


def _watch(step: Any) -> float:
    if prepare := getattr(step, "prepare", None):
        prepare()
    wait = torch.cuda.synchronize if _device().type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def _raced(folder: str, clip: float, args: argparse.Namespace, advance: Any) -> list[dict[str, Any]]:
    import transformers

    class Fused(FusedClipping, transformers.Trainer):
        pass

    def ours(params: Any) -> torch.optim.Optimizer:
        return fusedopt.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY)

    def torchs(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)

    made = {
        OURS: (Fused, ours),
        "fusedopt": (transformers.Trainer, ours),
        "torch fused": (transformers.Trainer, torchs),
    }
    steps: dict[str, Any] = {
        name: _Turn(cls, make, folder, clip, args.layers, args.width) for name, (cls, make) in made.items()
    }
    numel = sum(p.numel() for p in steps[OURS]._model.parameters())
    steps[LIMIT] = limits(_device().type, STREAMS * 4 * numel, states=2, measured=1)[LIMIT].step
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    timings = timing.interleave(steps, _watch, args.rounds, WARMUP, advance)
    logging.disable(level)
    if timings.failed:
        raise report.CommandError(f"a variant failed: {timings.failed}")
    rows = []
    for name in steps:
        seconds, ratio = timings.seconds(name), timings.ratio(name, OURS)
        rows.append(
            {"parameters": numel, "max_grad_norm": clip, "variant": name, "rounds": timings.rounds}
            | {"median": seconds.median, "q1": seconds.q1, "q3": seconds.q3}
            | {"ratio": ratio.median, "ratio_q1": ratio.q1, "ratio_q3": ratio.q3}
        )
    return rows


def _show(document: dict[str, Any]) -> None:
    """A table: one row for each way to clip and each variant."""
    made = report.table("Norm, clipping and step in Trainer", "max_grad_norm", "variant", "ms", "x ours (quartiles)")
    for row in document["rows"]:
        ratio = f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
        made.add_row(f"{row['max_grad_norm']:g}", row["variant"], f"{row['median'] * 1e3:.2f}", ratio)
    report.console.print(made)
