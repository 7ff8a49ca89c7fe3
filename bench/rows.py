"""Results: rows, the facts that make them believable, and the file they are kept in."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from fusedopt.cli import machine

FORMAT = 1
OURS = "fusedopt-"  # and an engine: what our variants are called
LIMIT, COPY = "limit", "device-copy"
KEY = ("suite", "groups", "optimizer", "dtype", "device", "clip", "amp", "cache", "gradients", "variant")


@dataclass
class Row:
    """One line of a result; the keys of its JSON form.

    Attributes:
        suite, tensors, numel, groups: What was stepped: a suite's name, tensors, elements and param groups.
        optimizer, dtype, device, clip, amp, cache, gradients: How; see ``fusedopt.bench.workload.Workload``.
        variant: Who did the step: ``fusedopt-`` and an engine, a peer, ``limit``, or on GPUs ``device-copy``.
        version: Of its package; how a limit touches memory.
        storage: How it keeps its states: ``full``, ``8bit`` or ``4bit``.
        states: The type of most of their numbers, such as ``float32``; None without any.
        same_update: Whether it was seen to compute our update; None for a limit, False for another algorithm.
        note: Why it does not, or how its states are smaller than ours.
        median, q1, q3: Seconds of a step; for a limit, of as many bytes.
        rounds: How many steps were timed.
        bytes: What the step has to move at least: parameters, gradients, and its own states.
        gbps: ``bytes`` over ``median``, in 1e9 bytes per second.
        limit: ``gbps`` over the limit's, round by round.
        ratio, ratio_q1, ratio_q3: Its time over that of our first engine, round by round.
        launches: On a GPU, kernels that a step launched, by the profiler. On a CPU, torch operators that called no
            other, and kernels of extensions.
        device_time: On a GPU, seconds that kernels of a step ran on the device, one by one, by the profiler; None on a
            CPU. What ``median`` has beyond it, the device waited, for the host or between kernels, or copied.
        host: Microseconds of host work in a step: on a GPU, until the call returned; on a CPU, a step of as many
            tensors of one element each.
        peak_memory: Bytes that a step took for itself, at their peak.
        bytes_per_parameter: Of parameter, gradient and states.
        others: The share of the machine's processors that other processes used meanwhile.
        noisy: Times or ratios spread by more than 15%, or others used more than 5% of the machine.
        sweep: ``tensors``, ``size`` or ``groups``, if the row is a point of a sweep.
        command: What measures the row again.
    """

    suite: str
    tensors: int
    numel: int
    groups: int
    optimizer: str
    dtype: str
    device: str
    clip: float | None
    amp: bool
    cache: str
    variant: str
    version: str
    storage: str
    states: str | None
    same_update: bool | None
    note: str | None
    median: float
    q1: float
    q3: float
    rounds: int
    bytes: int
    gbps: float
    gradients: str = "kept"
    limit: float | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    launches: int | None = None
    device_time: float | None = None
    host: float | None = None
    peak_memory: int | None = None
    bytes_per_parameter: float | None = None
    others: float | None = None
    noisy: bool = False
    sweep: str | None = None
    command: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells rows of one result apart, and finds them in another one."""
        return tuple(getattr(self, name) for name in KEY)

    @property
    def workload(self) -> tuple[Any, ...]:
        """What rows have in common that were measured together."""
        return self.key[:-1]

    @property
    def ours(self) -> bool:
        """Whether it is a row of fusedopt."""
        return self.variant.startswith(OURS)

    @property
    def peer(self) -> bool:
        """Whether it is a row of another package."""
        return not self.ours and self.variant not in (LIMIT, COPY)


class ResultError(Exception):
    """A file that holds no results; the message names it and says why."""


@dataclass
class Result:
    """What one run measured.

    Attributes:
        rows: In the order in which they were measured.
        notes: What was left out, and why.
        facts: ``commit``, ``versions``, ``machine`` and ``device``.
    """

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the JSON file; replaced if it exists."""
        document = {"format": FORMAT, **self.facts, "notes": self.notes, "rows": [asdict(row) for row in self.rows]}
        whole = path.with_name(path.name + ".part")  # who ends the run meanwhile leaves the result of before
        whole.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
        os.replace(whole, path)

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a file that ``save`` wrote.

        Raises:
            ResultError: If it holds something else.
        """
        try:
            document = json.loads(path.read_text())
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ResultError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT or "rows" not in document:
            raise ResultError(f"{path} is no result of fusedopt bench")
        known = {f.name for f in fields(Row)}
        try:
            rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in document.pop("rows")]
        except (AttributeError, TypeError) as error:
            raise ResultError(f"{path} has a row that is none of fusedopt bench's: {error}") from error
        notes = document.pop("notes", [])
        return cls(rows, notes, document)


def facts(device: torch.device, packages: list[str]) -> dict[str, Any]:
    """Commit, versions, machine and device.

    Args:
        device: What was measured.
        packages: Whose versions matter.
    """
    versions = machine.versions()
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    here = machine.machine() | {"cores": os.cpu_count(), "memory_gib": _memory_gib()}
    on_cpu = device.type == "cpu"
    name = here["cpu"] if on_cpu else torch.get_device_module(device).get_device_name(device)
    return {
        "commit": _commit() or os.environ.get("FUSEDOPT_COMMIT"),
        "versions": versions,
        "machine": here,
        "device": name,
    }


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a checkout, or without git."""
    here = Path(__file__).resolve().parent
    watched = [str(here.parent / name) for name in ("csrc", "fusedopt", "triton_kernels", "bench", "setup.py")]
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True}
        top = Path(subprocess.run(["git", "rev-parse", "--show-toplevel"], **run).stdout.strip())
        if not (top / "csrc" / "rules").is_dir():  # an environment inside somebody else's checkout
            return None
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno", "--", *watched], **run).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    own = [line for line in changed.splitlines() if "bench/results" not in line]
    return commit + ("+" if own else "")
