"""The device's own time of a step, beside what it takes on the clock."""

import re
from types import SimpleNamespace

import pytest
import torch

from fusedopt.bench import looks, markdown, suites, table, timing, workload
from fusedopt.bench.measure import Bench
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.rows import Result, Row
from fusedopt.bench.workload import Workload
from fusedopt.cli import report


def row(**values):
    what = {"suite": "gpt2", "tensors": 148, "numel": 124_439_808, "groups": 1, "optimizer": "AdamW", "dtype": "fp32"}
    how = {"device": "cuda", "clip": None, "amp": False, "cache": "cold", "rounds": 15, "bytes": 28 * 124_439_808}
    who = {"variant": "fusedopt-cuda", "version": "0.1.0", "storage": "full", "same_update": True, "note": None}
    figures = {"median": 9.123e-4, "q1": 9e-4, "q3": 9.2e-4, "gbps": 4000.5, "limit": 0.95, "ratio": 1.05}
    more = {"states": "float32", "launches": 1, "host": 123.4, "peak_memory": 2**26, "bytes_per_parameter": 16.0}
    return Row(**what | how | who | figures | more | values)


def shown(rows):
    with report.console.capture() as capture:
        report.console.print(table.workload_table(rows))
    return capture.get()


def test_it_is_a_column_where_a_row_has_it():
    rows = [row(device_time=8.765e-4), row(variant="transformer-engine", version="2.11.0", launches=1234)]
    text = shown(rows)
    assert max(map(len, text.splitlines())) <= 80
    numbers = r"0.9123 2 4000 0.95 1.05 1 87[67] 123 64"  # each in one piece
    assert re.search(r"fusedopt-cuda +" + numbers.replace(" ", r" +"), text), text
    assert "1234" in text and table.GPU in text
    page = markdown.page(Result(rows), "r.json", [])
    heading, _, first, *_ = page[page.index("| by |") :].splitlines()
    cells = dict(zip(heading.split("|"), first.split("|"), strict=True))
    assert cells[" GPU us "].strip() in ("876", "877") and cells[" host us "].strip() == "123"
    without = [row(), row(variant="torch-fused")]
    assert table.GPU not in shown(without)
    assert table.GPU not in markdown.page(Result(without), "r.json", []).split("## All rows")[1]


def test_it_is_of_the_kernels_of_a_step_that_was_prepared(monkeypatch):
    done = []

    class Profile:
        def __init__(self, activities):
            done.append("profile")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        @property
        def profiler(self):
            def event(name, nanoseconds, kind):
                kind = getattr(torch.autograd.DeviceType, kind)
                return SimpleNamespace(name=lambda: name, duration_ns=lambda: nanoseconds, device_type=lambda: kind)

            events = [event("norm", 2000, "CUDA"), event("step", 3000, "CUDA"), event("Memcpy HtoD", 9000, "CUDA")]
            events += [event("cudaLaunchKernel", 7000, "CPU")]
            return SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: events))

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(looks, "_synchronize", lambda device: done.append("wait"))
    watch = SimpleNamespace(prepare=lambda step: done.append("prepare"))
    one = SimpleNamespace(contender=SimpleNamespace(peer=None), step=lambda: done.append("step"))
    assert looks.profiled(one, torch.device("cuda"), watch) == (2, pytest.approx(5e-6))
    assert done == ["prepare", "wait", "profile", "step", "wait"]


@pytest.mark.parametrize("found", [(3, 2e-4), (None, None)])
def test_a_row_keeps_it(monkeypatch, found):
    monkeypatch.setattr(workload, "POOL", 2**12 + 1)
    monkeypatch.setattr(timing, "FLUSHED", {"cpu": 2**12, "cuda": 2**12})
    case = Workload(suites.find("3x100"), CASES["AdamW"])
    ours, limit = Bench(("eager",), (), repeats=1).run(case)
    assert ours.launches > 0 and ours.device_time is None and limit.device_time is None
    monkeypatch.setattr(looks, "profiled", lambda *_: found)
    ours, limit = Bench(("eager",), (), repeats=1).run(case)
    assert (ours.launches, ours.device_time) == found and limit.device_time is None
