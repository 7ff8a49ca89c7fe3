"""Interleaved timing, and what a result must carry to be believed: spread, versions, commit, machine."""

from __future__ import annotations

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Spread (interquartile range / median) above which a figure is called noisy.
NOISY = 0.15
# Share of the machine that others may use before a run is called noisy, whatever its spread.
DISTURBED = 0.05

PACKAGES = ("fusedopt", "torch", "numpy", "adabound", "lion-pytorch", "timm")


@dataclass(frozen=True)
class Variant:
    """One way to do a step.

    Attributes:
        step: What is timed.
        before: Done before each step, and not timed.
    """

    step: Callable[[], object]
    before: Callable[[], object] | None = None


@dataclass(frozen=True)
class Spread:
    """A median with its quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, samples: np.ndarray) -> Spread:
        """The spread of samples."""
        q1, median, q3 = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        return cls(median, q1, q3)

    @property
    def noise(self) -> float:
        """Interquartile range over median."""
        return (self.q3 - self.q1) / self.median


class Neighbours:
    """How much of the machine other processes use, from construction on."""

    def __init__(self) -> None:
        self._busy, self._since = self._others(), time.monotonic()

    @staticmethod
    def _others() -> float | None:
        """Processor seconds that others have used since boot, or that the hypervisor took."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return None
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - time.process_time()

    def share(self) -> float | None:
        """Their share of all cores; None where the system doesn't tell."""
        others, wall = self._others(), time.monotonic() - self._since
        if others is None or self._busy is None:
            return None
        return max(0.0, others - self._busy) / (wall * (os.cpu_count() or 1))


class Timings:
    """Seconds of every variant in every round of an interleaved run.

    Attributes:
        others: The share of the machine that other processes used meanwhile.
    """

    def __init__(self, seconds: Mapping[str, list[float]], others: float | None) -> None:
        self.others = others
        self._seconds = {name: np.asarray(values) for name, values in seconds.items()}

    def seconds(self, name: str) -> Spread:
        """How long a variant took."""
        return Spread.of(self._seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """How many times as long as ``base`` a variant took, round by round.

        Neighbours in one round share the machine's mood, so this is steadier than a ratio of medians.
        """
        return Spread.of(self._seconds[name] / self._seconds[base])


def interleave(
    variants: Mapping[str, Variant], repeats: int, warmup: int = 2, tick: Callable[[], object] = lambda: None
) -> Timings:
    """Time variants in turn, A B C A B C, so that all of them see the same machine.

    Args:
        variants: By name.
        repeats: Timed rounds.
        warmup: Rounds before those.
        tick: Called after every round, for a progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    neighbours = Neighbours()
    try:
        for r in range(warmup + repeats):
            for name, variant in variants.items():
                if variant.before is not None:
                    variant.before()
                start = time.perf_counter()
                variant.step()
                elapsed = time.perf_counter() - start
                if r >= warmup:
                    seconds[name].append(elapsed)
            tick()
    finally:
        gc.enable()
    return Timings(seconds, neighbours.share())


@dataclass
class Row:
    """One line of a result; the keys of its JSON form.

    Attributes:
        section: The question that the row belongs to.
        name: The optimizer or suite.
        variant: Who did the step.
        median, q1, q3: Seconds of a step.
        bytes: What a step has to move at least, whoever does it.
        gbps: ``bytes`` over ``median``, in 1e9 bytes per second.
        limit: Time of the same-stream limit over this variant's, round by round.
        ratio, ratio_q1, ratio_q3: This variant's time over fusedopt's, round by round.
        others: The share of the machine that other processes used meanwhile.
        noisy: The times or the ratios spread by more than ``NOISY``, or others used more than ``DISTURBED``.
        measure, value, target, met: What is judged in this row, if anything is, and how it went.
    """

    section: str
    name: str
    variant: str
    median: float | None = None
    q1: float | None = None
    q3: float | None = None
    bytes: int | None = None
    gbps: float | None = None
    limit: float | None = None
    ratio: float | None = None
    ratio_q1: float | None = None
    ratio_q3: float | None = None
    others: float | None = None
    noisy: bool = False
    measure: str | None = None
    value: float | None = None
    target: float | None = None
    met: bool | None = None

    def judge(self, measure: str, value: float, target: float, *, at_most: bool = False) -> None:
        """Hold a value against its target."""
        self.measure, self.value, self.target = measure, value, target
        self.met = value <= target if at_most else value >= target


def timed_row(
    section: str, name: str, variant: str, timings: Timings, nbytes: int, base: str, limit: str | None = None
) -> Row:
    """A row of an interleaved run.

    Args:
        section: The question that the row belongs to.
        name: The optimizer or suite.
        variant: Who did the step, as the run calls it.
        timings: The run.
        nbytes: What a step has to move.
        base: The variant that others are compared with.
        limit: The variant that is the limit, if it was measured.
    """
    t, ratio = timings.seconds(variant), timings.ratio(variant, base)
    row = Row(section, name, variant, t.median, t.q1, t.q3, nbytes, nbytes / t.median / 1e9)
    row.others = timings.others
    row.noisy = t.noise > NOISY or ratio.noise > NOISY or (timings.others or 0) > DISTURBED
    if variant != base:
        row.ratio, row.ratio_q1, row.ratio_q3 = ratio.median, ratio.q1, ratio.q3
    if limit is not None:
        row.limit = timings.ratio(limit, variant).median
    return row


def facts() -> dict[str, Any]:
    """Commit, versions and machine."""
    return {"commit": _commit(), "versions": _versions(), "machine": _machine()}


def _commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        run = {"cwd": here, "capture_output": True, "text": True, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno", "../csrc", "../fusedopt", "."], **run).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _machine() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }


def write_json(path: str | Path, rows: list[Row], **extra: Any) -> None:
    """Write rows and facts.

    Args:
        path: Of the file; replaced if it exists.
        rows: See :class:`Row`.
        extra: More keys of the document.
    """
    document = facts() | extra | {"rows": [asdict(row) for row in rows]}
    Path(path).write_text(json.dumps(document, indent=1) + "\n")
