"""How much memory a step takes for itself, as the kernel counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

MIB = 2**20
# Writing 5 sets the peak of resident memory back to what is resident now.
_CLEAR, _RESET_PEAK = Path("/proc/self/clear_refs"), "5"
_STATUS = Path("/proc/self/status")


def _kib(key: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1])


def available() -> str | None:
    """Why peaks cannot be measured here; None if they can."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
        _kib("VmHWM")
    except (OSError, StopIteration) as error:
        return f"the kernel's peak of resident memory cannot be read and reset: {error}"
    return None


def peak_growth(step: Callable[[], object]) -> float:
    """MiB by which resident memory exceeds, at its peak during a step, what it was before."""
    gc.collect()
    # Freed memory that malloc keeps would hide what a step takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = _kib("VmRSS")
    _CLEAR.write_text(_RESET_PEAK)
    step()
    return (_kib("VmHWM") - before) * 1024 / MIB
