"""The standard set: what is measured when nothing in particular is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fusedopt.bench import peers, suites
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.workload import CACHES, DTYPES, Workload

SWEEPS = ("tensors", "size", "groups")
SWEPT_ELEMENTS = 2**22  # of all tensors of a point of sweep "tensors"
COUNTS = (1, 10, 100, 1000, 10_000, 30_000)
MEGABYTES = (1, 8, 64, 512, 2048, 8192)  # of parameters
SIZED_TENSORS = 100
GROUPS = (1, 10, 100, 1000)
GROUPED = "1000x1000"

STORAGES = ("full", "8bit", "4bit")
NARROW = ("split-bf16", "split-8bit")

ALL = tuple(peers.known())
QUICK = tuple(name for name in ALL if name != "torch-compile")  # which takes half a minute for 150 tensors
MULTI_TENSOR = ("torch-foreach", "torch-fused", "apex", "transformer-engine", "deepspeed-fused")
UNFUSED = ("torch-for-loop", "torch-foreach", "timm-for-loop", "timm-foreach", "optimi-foreach")
SELECTED = ("torch-fused", *UNFUSED, "pytorch-optimizer", "lion-pytorch", "adabound")
FUSED = ("torch-fused",)


@dataclass(frozen=True)
class Entry:
    """One workload of a run.

    Attributes:
        workload: What is stepped.
        peers: Who takes part.
        storages: Of their states.
        stored: Ours with fewer bits that take part too.
        sweep: What it is a point of.
    """

    workload: Workload
    peers: tuple[str, ...]
    storages: tuple[str, ...] = ("full",)
    stored: tuple[str, ...] = ()
    sweep: str | None = None


def _entry(device: str, suite: str, case: str, wanted: tuple[str, ...], **more: Any) -> Entry:
    how = {name: more.pop(name) for name in ("storages", "stored", "sweep") if name in more}
    return Entry(Workload(suites.find(suite), CASES[case], device=device, **more), wanted, **how)


def standard(device: str) -> list[Entry]:
    """The standard set; what matters most comes first, in case that the run is ended early.

    Args:
        device: What it is run on; a CPU gets fewer peers, because its steps take longer.
    """
    on_cpu = torch.device(device).type == "cpu"
    few, layers = (FUSED, 1) if on_cpu else (QUICK, 4)
    rules = sorted(CASES, key=lambda name: name != "AdamW")
    if on_cpu:
        entries = [_entry(device, "resnet50", case, SELECTED) for case in rules]
        entries.append(_entry(device, "gpt2", "AdamW", (*MULTI_TENSOR, "deepspeed-cpu"), stored=NARROW))
    else:
        entries = [_entry(device, "gpt2", case, QUICK, stored=NARROW if case == "AdamW" else ()) for case in rules]
    entries += [
        _entry(device, "gpt2", "AdamW", few, clip=1.0),
        _entry(device, "gpt2", "AdamW", few, clip=1.0, amp=True),
        _entry(device, "gpt2", "AdamW", few, dtype="bf16"),
        *(_entry(device, "1000x1000", "AdamW", MULTI_TENSOR, cache=cache) for cache in CACHES),
        *(_entry(device, "10000x64", "AdamW", MULTI_TENSOR, cache=cache) for cache in CACHES),
        *(_entry(device, suite, "AdamW", FUSED, gradients="fresh") for suite in ("1000x1000", "10000x64")),
    ]
    for sweep in SWEEPS:
        entries += swept(sweep, device)
    entries += [
        _entry(device, "16x1048576", "AdamW", ALL, storages=STORAGES, stored=NARROW),
        _entry(device, "moe", "AdamW", few),
        _entry(device, f"llama3-8b:{layers}", "AdamW", few),
        _entry(device, "vit-b16", "AdamW", few),
    ]
    if not on_cpu:
        entries.append(_entry(device, "resnet50", "SGD", QUICK))
        entries.append(_entry(device, "gpt2", "AdamW", FUSED, gradients="misaligned"))
        entries.append(_entry(device, "1x1", "AdamW", FUSED))  # what a step costs at least
    return entries


def swept(
    sweep: str, device: str, case: str = "AdamW", dtype: str = "fp32", wanted: tuple[str, ...] | None = None
) -> Iterator[Entry]:
    """The points of a sweep.

    Args:
        sweep: ``tensors``: their number grows, all elements together stay the same; ``size``: their size grows;
            ``groups``: their param groups grow in number.
        device: Where.
        case: The optimizer.
        dtype: Of parameters.
        wanted: Names of peers; None for torch's.
    """
    if sweep == "tensors":
        points = [suites.find(f"{count}x{SWEPT_ELEMENTS // count}") for count in COUNTS]
    elif sweep == "size":
        elements = [2**20 * size // DTYPES[dtype].itemsize // SIZED_TENSORS for size in MEGABYTES]
        points = [suites.find(f"{SIZED_TENSORS}x{numel}") for numel in elements]
    else:
        points = [suites.find(GROUPED).regrouped(count) for count in GROUPS]
    for suite in points:
        yield Entry(
            Workload(suite, CASES[case], dtype=dtype, device=device),
            FUSED if wanted is None else wanted,
            sweep=sweep,
        )
