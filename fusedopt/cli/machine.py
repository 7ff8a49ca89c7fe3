"""What the results depend on: versions, CPU, GPUs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fusedopt
from fusedopt.aliases import Json
from fusedopt.engines import cpu


def versions() -> dict[str, str]:
    """Versions of fusedopt and of what it runs on; triton's only if it is installed."""
    result = {"fusedopt": fusedopt.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("numpy", "triton"):
        try:
            result[package] = version(package)
        except PackageNotFoundError:
            continue
    return result


def machine() -> Json:
    """The platform, CPU, ISA level of the CPU engine (None without it), threads that torch uses, and GPUs."""
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "isa": None if cpu.available() else cpu.load()[2],
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _cpu_model() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
