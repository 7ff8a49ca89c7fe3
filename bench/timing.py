"""Interleaved timing: variants take turns, so that all of them see the same machine."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fusedopt.bench.workload import Step

# Spread (interquartile range / median) above which a figure is called noisy.
NOISY = 0.15
# Share of the machine that others may use before a run is called noisy, whatever its spread.
DISTURBED = 0.05

WARM_STEPS = 3
# What is touched between steps: more than any processor's cache. A GPU is busy with it for about half a millisecond at
# 4 TB/s, in which the host prepares the step, as it does while a backward pass is still running.
FLUSHED = {"cpu": 2**28, "cuda": 2**30}  # bytes


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


class Beside(Protocol):
    """What a GPU does beside a step that is timed."""

    def start(self) -> None:
        """Start it, behind what the device was given so far."""

    def wait(self) -> None:
        """Wait until it is over."""


class Stopwatch:
    """Times one step on a device, after what has to precede it.

    On a GPU: device events around the step, behind a flush that keeps the device busy meanwhile. Elsewhere: a wall
    clock.

    Args:
        device: Where the step does its work.
        cache: ``cold`` or ``warm``; see ``fusedopt.bench.workload.Workload``.
        renew: Makes anew what each step needs so.
        hold: Cycles for which a GPU is kept from starting a step, so that no host work is in its time.
        beside: On a GPU, what else it does meanwhile: begun before the step is held, so that it is under way.
    """

    def __init__(
        self,
        device: torch.device,
        cache: str,
        renew: Step = lambda: None,
        hold: int = 0,
        beside: Beside | None = None,
    ) -> None:
        self._warm, self._renew, self._hold, self._beside = cache == "warm", renew, hold, beside
        self._gpu = None if device.type == "cpu" else torch.get_device_module(device)
        self._flushed: Tensor | None = None
        if self._gpu or not self._warm:
            nbytes = FLUSHED.get(device.type, FLUSHED["cuda"])
            self._flushed = torch.ones(nbytes // 4, device=device)

    def prepare(self, step: Step) -> None:
        """Do what precedes a step."""
        if not self._warm:
            self._renew()
        if self._flushed is not None:
            self._flushed.mul_(1)
            self._flushed.sum()  # a flush that ends with a read: what it wrote is not the step's to write back
        if self._warm:
            for _ in range(WARM_STEPS):
                step()
            self._renew()

    def __call__(self, step: Step) -> float:
        """Seconds of a step."""
        self.prepare(step)
        if self._gpu is None:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        first, last = (self._gpu.Event(enable_timing=True) for _ in range(2))
        if self._beside:
            self._beside.start()
        if self._hold:
            torch.cuda._sleep(self._hold)
        first.record()
        step()
        last.record()
        last.synchronize()
        if self._beside:
            self._beside.wait()
        return first.elapsed_time(last) / 1e3


class Timings:
    """Seconds of every variant in every round of an interleaved run.

    Attributes:
        others: The share of the machine that other processes used meanwhile.
        rounds: How many there were.
        failed: What variants raised that did not get through; they have no figures.
    """

    def __init__(
        self, seconds: Mapping[str, list[float]], others: float | None, failed: Mapping[str, Exception] | None = None
    ) -> None:
        self.others, self.failed = others, dict(failed or {})
        self._seconds = {name: np.asarray(values) for name, values in seconds.items() if name not in self.failed}
        self.rounds = max(map(len, self._seconds.values()), default=0)

    def seconds(self, name: str) -> Spread:
        """How long a variant took."""
        return Spread.of(self._seconds[name])

    def ratio(self, name: str, base: str) -> Spread:
        """How many times as long as ``base`` a variant took, round by round.

        Neighbours in one round share the machine's mood, so this is steadier than a ratio of medians.
        """
        return Spread.of(self._seconds[name] / self._seconds[base])


def interleave(
    variants: Mapping[str, Step], watch: Stopwatch, rounds: int, warmup: int, tick: Callable[[], object]
) -> Timings:
    """Time variants in turn, A B C A B C; one that raises is left out from then on.

    Args:
        variants: By name.
        watch: What times them.
        rounds: Timed rounds.
        warmup: Rounds before those.
        tick: Called after every round, for a progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    failed: dict[str, Exception] = {}
    gc.collect()
    gc.disable()
    neighbours = Neighbours()
    try:
        for r in range(warmup + rounds):
            for name, step in variants.items():
                if name in failed:
                    continue
                try:
                    taken = watch(step)
                except Exception as error:  # whatever a package raises
                    failed[name] = error
                    continue
                if r >= warmup:
                    seconds[name].append(taken)
            tick()
    finally:
        gc.enable()
    return Timings(seconds, neighbours.share(), failed)
