"""How much memory there is, and how much a step takes for itself."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Writing 5 sets the peak of resident memory back to what is resident now.
_CLEAR, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"
_STATUS, _MEMINFO = Path("/proc/self/status"), Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")  # of a container with a limit of its own


def _kib(path: Path, key: str) -> int:
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def _trim() -> None:
    """Give back freed memory that malloc keeps."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def room(device: torch.device) -> int | None:
    """Bytes that can still be had; None where that is not known."""
    if device.type == "cpu":
        _trim()
        return min(filter(None, (_available(), _left_to_container())), default=None)
    gc.collect()
    module = torch.get_device_module(device)
    module.empty_cache()
    return module.mem_get_info(device)[0]


def _available() -> int | None:
    return _kib(_MEMINFO, "MemAvailable") * 1024 if _MEMINFO.exists() else None


def _left_to_container() -> int | None:
    try:
        most, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return None
    return int(most) - int(used) if most != "max" else None


def peak(step: Callable[[], object], device: torch.device) -> int | None:
    """Bytes by which memory in use exceeds, at its peak during a step, what it was before; None where not known."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        module.synchronize(device)
        before = module.memory_allocated(device)
        module.reset_peak_memory_stats(device)
        step()
        module.synchronize(device)
        return module.max_memory_allocated(device) - before
    try:
        _trim()
        before = _kib(_STATUS, "VmRSS")
        _CLEAR.write_text(_RESET_PEAK)
        step()
        return max(0, _kib(_STATUS, "VmHWM") - before) * 1024
    except (OSError, StopIteration):
        return None


def states(optimizer: torch.optim.Optimizer) -> tuple[int, str]:
    """Bytes of an optimizer's states, counted once where they share memory, and the type of most of their numbers.

    Counters, which are a number for each tensor, are not counted. The type is such as ``float32`` and ``uint8``.
    """
    seen: dict[int, tuple[int, torch.dtype]] = {}

    def visit(value: object, smallest: int) -> None:
        if isinstance(value, Tensor) and hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                visit(getattr(value, name), smallest)
        elif isinstance(value, Tensor):
            if value.numel() > smallest:
                seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes(), value.dtype
        elif isinstance(value, dict):
            for item in value.values():
                visit(item, smallest)
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item, smallest)
        elif hasattr(value, "__dict__"):
            visit(vars(value), smallest)

    for p, state in optimizer.state.items():
        visit(state, 1 if p.numel() > 1 else 0)
    largest = max(seen.values(), default=(0, torch.float32), key=lambda kept: kept[0])
    return sum(nbytes for nbytes, _ in seen.values()), str(largest[1]).removeprefix("torch.")
