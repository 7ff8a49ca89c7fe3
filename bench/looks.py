"""What is found out of a contender's step besides its time: launches, memory, and the host's work."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from fusedopt.bench import memory, quiet
from fusedopt.bench.contenders import FAILURES, Course, Running, summary
from fusedopt.bench.rows import Row
from fusedopt.bench.timing import Stopwatch
from fusedopt.bench.workload import Tensors, Workload, step_of

HOST_SECONDS, HOST_ROUNDS = 0.3, 7
T = TypeVar("T")


def look(row: Row, one: Running, workload: Workload, watch: Stopwatch, course: Course) -> None:
    """Put what is found into a row.

    Args:
        row: The contender's.
        one: The contender.
        workload: What it steps, of its own types.
        watch: What its steps are timed with.
        course: Is told what cannot be had.
    """
    device = torch.device(workload.device)

    def found(what: str, find: Callable[[], T]) -> T | None:
        try:
            return find()
        except FAILURES as error:
            course.note(f"{one.contender.variant}: {what} is not known here: {summary(error)}")
            return None

    row.peak_memory = found("memory", lambda: memory.peak(one.step, device))
    row.launches, row.device_time = found("launches", lambda: profiled(one, device, watch)) or (None, None)
    row.host = found("host", lambda: host_work(one, workload))


def kernels(events: Iterable[Any]) -> list[tuple[str, float]]:
    """Names and seconds of kernels among a profiler's events, without copies and what the host says of itself."""
    on_device = [event for event in events if event.device_type() != torch.autograd.DeviceType.CPU]
    own = [e for e in on_device if not e.name().lower().startswith(("memcpy", "memset", "optimizer."))]
    return [(event.name(), event.duration_ns() / 1e9) for event in own]


def operators(events: Iterable[Any]) -> int:
    """Operators among a profiler's events that called no other: those that end before the next one starts."""
    spans = sorted((e.start_ns(), -e.duration_ns()) for e in events if "::" in e.name())
    following = [start for start, _ in spans[1:]] + [math.inf]
    return sum(later >= start - length for (start, length), later in zip(spans, following, strict=False))


def profiled(one: Running, device: torch.device, watch: Stopwatch) -> tuple[int | None, float | None]:
    """Launches of a step; on a GPU also how long its kernels ran, in the state of caches that is timed."""
    on_cpu, peer = device.type == "cpu", one.contender.peer
    if on_cpu and peer and peer.compiles:
        return None, None  # the profiler does not see what was compiled
    kinds = torch.profiler.ProfilerActivity
    if not on_cpu:
        watch.prepare(one.step)
        _synchronize(device)
    with quiet.quiet(), torch.profiler.profile(activities=[kinds.CPU if on_cpu else kinds.CUDA]) as profile:
        one.step()
        _synchronize(device)
    events = profile.profiler.kineto_results.events()  # profile.events() takes 40 times as long
    if not on_cpu:
        found = kernels(events)
        return (len(found), sum(seconds for _, seconds in found)) if found else (None, None)
    if peer is not None:
        return operators(events) + peer.calls * len(one.tensors.params), None
    return operators(events) + sum(stepping.name != "eager" for stepping in one.optimizer.engines), None


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def host_work(one: Running, workload: Workload) -> float | None:
    """Microseconds of host work in a step.

    On a GPU, until the call returns. On a CPU, those of a step that has next to nothing to move; None for what is
    compiled, which would have to be compiled again for such tensors.
    """
    step, tensors, device = one.step, one.tensors, torch.device(workload.device)
    if device.type == "cpu":
        if one.contender.peer and one.contender.peer.compiles:
            return None
        tensors = Tensors(workload, single=True)
        step = step_of(one.contender.build(tensors.groups()), tensors.params, workload)
    for _ in range(2):
        step()
    taken: list[float] = []
    end = time.perf_counter() + HOST_SECONDS
    while len(taken) < HOST_ROUNDS and (not taken or time.perf_counter() < end):
        tensors.renew()
        _synchronize(device)
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e6
