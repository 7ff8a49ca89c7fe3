"""The benchmark on tensors so small that flushing and drawing values would take longest."""

import pytest

from fusedopt.bench import arena, looks, measure, timing, workload
from fusedopt.engines import cpu

ENGINE = "eager" if cpu.available() else "cpu"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(workload, "POOL", 2**12 + 1)
    monkeypatch.setattr(timing, "FLUSHED", {"cpu": 2**12, "cuda": 2**12})
    monkeypatch.setattr(measure, "FLUSHED", timing.FLUSHED)
    monkeypatch.setattr(arena, "MOST_TIMES", 1)
    monkeypatch.setattr(looks, "HOST_ROUNDS", 1)
