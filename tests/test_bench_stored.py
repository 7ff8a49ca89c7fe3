"""The benchmark's rows of ours with fewer bits: on tensors of their own, raced in the same rounds."""

import shlex

import pytest
import small_bench

from fusedopt.bench import measure, suites, workload
from fusedopt.bench.measure import Bench
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.stored import STORED
from fusedopt.bench.workload import Workload

quick, ENGINE = small_bench.quick, small_bench.ENGINE
SCALE = 4 / 256  # bytes of an element's share of its block's

# Bytes of an element: of its parameter and gradient, and of what else is held.
BYTES = {
    "silent": (8, 8),
    "8bit": (8, 2 + 2 * SCALE),
    "bf16": (4, 8),
    "bf16-masters": (4, 4 + 8),
    "split": (4, 2 + 8),
    "split-bf16": (4, 2 + 4),
    "split-8bit": (4, 2 + 2 + 2 * SCALE),
    "stochastic-bf16": (4, 4),
}


def test_rows_of_fewer_bits():
    renewed = []
    made = Workload(suites.find("3x8192"), CASES["AdamW"], gradients="fresh", clip=1.0)
    renew = workload.Tensors.renew
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload.Tensors, "renew", lambda self: renewed.append(self.params[0].dtype) or renew(self))
        found = Bench((ENGINE,), (), repeats=2, stored=tuple(STORED)).run(made)
    rows = {row.variant: row for row in found}
    full = rows.pop(f"fusedopt-{ENGINE}")
    assert full.storage == "full" and full.same_update and full.ratio is None
    assert set(rows) == {f"fusedopt-{ENGINE}-{name}" for name in STORED} | {"limit"}
    assert {workload.DTYPES["fp32"], workload.DTYPES["bf16"]} <= set(renewed)
    for name, stored in STORED.items():
        row = rows[f"fusedopt-{ENGINE}-{name}"]
        tensors, held = BYTES[name]
        assert row.ours and row.storage == name and row.note == stored.about and row.same_update is (name == "silent")
        assert row.bytes_per_parameter == tensors + held
        # Read and written; of the gradient, read for its norm and for the step.
        assert row.bytes == 3 * 8192 * (2 * tensors + 2 * held)
        assert row.ratio is not None and row.dtype == "fp32"
        again = shlex.split(row.command)
        assert again[again.index("--stored") + 1] == name


def test_nothing_of_fewer_bits_without_memory(monkeypatch):
    tensors, states = 2 * 4 * 30_000, 2 * 4 * 30_000
    streams = measure.limits.resident_bytes("cpu", 7 * 4 * 30_000, 2)
    room = 2**12 + 3 * tensors + streams + states + 1
    monkeypatch.setattr(measure.memory, "room", lambda device: room / measure.USABLE)
    bench = Bench((ENGINE,), (), repeats=2, stored=("split-8bit",))
    rows = bench.run(Workload(suites.find("30x1000"), CASES["AdamW"]))
    assert {row.variant for row in rows} == {f"fusedopt-{ENGINE}", "limit"}
    assert "split-8bit" in bench.notes[0] and "no memory" in bench.notes[0]
