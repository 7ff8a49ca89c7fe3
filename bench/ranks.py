"""``fusedopt bench ranks``: a step of parameters that FSDP2 has sharded, beside torch's own.

Processes of this machine are the ranks; they talk through gloo. Their parameters are those of GPT-2's blocks, at widths
at which a rank has few elements and many. Ranks wait for one another before every step, and time it each; the figures
are the first rank's.

JSON::

    {"commit", "versions", "machine", "device", "ranks": how many, "threads": of each,
     "rows": [{"optimizer", "tensors", "local_elements": of a rank, "clip": norm or null, "cache", "variant",
               "median", "q1", "q3" (seconds), "rounds", "ratio", "ratio_q1", "ratio_q3": time over ours}]}
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import fusedopt
from fusedopt.bench import suites, timing
from fusedopt.bench.rows import OURS, facts
from fusedopt.bench.workload import Step
from fusedopt.cli import report

RANKS, ROUNDS, WARMUP = 2, 15, 3
WIDTHS = (16, 128, 256)  # of 12 blocks: 0.02, 1.2 and 4.7 million elements for each of two ranks
BLOCKS = 12
CLIPS = (None, 1.0)
LR, WEIGHT_DECAY = 1e-3, 0.1


def run(args: argparse.Namespace) -> int:
    """Start the ranks, print what they measured."""
    reader, writer = mp.get_context("spawn").Pipe(duplex=False)
    widths = tuple(args.width or WIDTHS)
    total = len(widths) * len(CLIPS) * (WARMUP + args.rounds)
    with tempfile.TemporaryDirectory() as folder, report.progress_bar() as bar:
        task = bar.add_task("ranks", total=total)
        arguments = args.ranks, str(Path(folder) / "store"), widths, args.rounds, args.cache or "cold", writer
        context = mp.spawn(_rank, arguments, nprocs=args.ranks, join=False)
        assert context
        rows: list[dict[str, Any]] = []
        while not context.join(timeout=0.2):
            while reader.poll():
                told = reader.recv()
                bar.advance(task) if told is None else rows.append(told)
        while reader.poll():
            rows += [told for told in [reader.recv()] if told]
    document = facts(torch.device("cpu"), []) | {"ranks": args.ranks, "threads": _threads(args.ranks), "rows": rows}
    _show(document)
    report.write_json(args.json, document)
    return 0


def _threads(ranks: int) -> int:
    return max(1, (os.cpu_count() or 1) // ranks)


def _rank(
    rank: int, ranks: int, store: str, widths: tuple[int, ...], rounds: int, cache: str, told: Connection
) -> None:
    """One rank's process."""
    torch.set_num_threads(_threads(ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    tell = told.send if rank == 0 else lambda what: None
    for width in widths:
        for clip in CLIPS:
            for row in _raced(width, clip, rounds, cache, tell):
                tell(row)
    dist.destroy_process_group()


class Block(nn.Module):
    """The parameters of a block of GPT-2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        shapes = suites.gpt2_block(width)
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)


def _sharded(width: int) -> list[Tensor]:
    """Parameters as FSDP2 shards them, with gradients."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, init_device_mesh

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = nn.ModuleList(Block(width) for _ in range(BLOCKS))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    params = list(blocks.parameters())
    for p in params:
        assert isinstance(p, DTensor)
        p.grad = DTensor.from_local(
            torch.randn_like(p.to_local()) * 0.01, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
        )
    return params


def _variants(params: list[Tensor], clip: float | None) -> Iterator[tuple[str, Step]]:
    def torchs(**how: bool) -> Step:
        optimizer = torch.optim.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, **how)

        def step() -> None:
            if clip:
                nn.utils.clip_grad_norm_(params, clip)
            optimizer.step()

        return step

    yield (
        f"{OURS}cpu",
        fusedopt.AdamW(params, lr=LR, weight_decay=WEIGHT_DECAY, max_grad_norm=clip, engine="cpu").step,
    )
    yield "torch-fused", torchs(fused=True)
    yield "torch-foreach", torchs(foreach=True)
    yield "torch-for-loop", torchs(foreach=False)


class _Watch:
    """Times a step that all ranks begin at once, behind a flush of the caches, or behind steps like it."""

    def __init__(self, cache: str) -> None:
        self._flushed = torch.ones(timing.FLUSHED["cpu"] // 4) if cache == "cold" else None

    def __call__(self, step: Step) -> float:
        if self._flushed is None:
            for _ in range(timing.WARM_STEPS):
                step()
        else:
            self._flushed.mul_(1)
            self._flushed.sum()
        dist.barrier()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start


def _raced(width: int, clip: float | None, rounds: int, cache: str, tell: Any) -> list[dict[str, Any]]:
    params = _sharded(width)
    steps = dict(_variants(params, clip))
    timings = timing.interleave(steps, _Watch(cache), rounds, WARMUP, lambda: tell(None))
    if timings.failed:
        raise RuntimeError(f"a variant failed: {timings.failed}")
    rows = []
    for name in steps:
        seconds, ratio = timings.seconds(name), timings.ratio(name, f"{OURS}cpu")
        rows.append(
            {"optimizer": "AdamW", "tensors": len(params), "clip": clip, "cache": cache, "variant": name}
            | {"local_elements": sum(p._local_tensor.numel() for p in params)}  # pyright: ignore
            | {"median": seconds.median, "q1": seconds.q1, "q3": seconds.q3, "rounds": timings.rounds}
            | {"ratio": ratio.median, "ratio_q1": ratio.q1, "ratio_q3": ratio.q3}
        )
    gc.collect()
    return rows


def _show(document: dict[str, Any]) -> None:
    """A table: one row for each workload and variant."""
    title = f"AdamW on FSDP2's shards, {document['ranks']} ranks of {document['threads']} threads"
    made = report.table(title, "elements of a rank", "clip", "variant", "ms", "x ours (quartiles)")
    for row in document["rows"]:
        ratio = f"{row['ratio']:.2f} ({row['ratio_q1']:.2f} to {row['ratio_q3']:.2f})"
        size, clip = f"{row['local_elements'] / 1e6:.3g}M", f"{row['clip']:g}" if row["clip"] else ""
        made.add_row(size, clip, row["variant"], f"{row['median'] * 1e3:.3f}", ratio)
    report.console.print(made)
