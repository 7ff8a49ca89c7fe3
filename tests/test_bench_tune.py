"""What `fusedopt bench tune` compares, and that it says which wins."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AVAILABLE

from fusedopt.bench import suites, timing, tune, variants, workload
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.variants import VARIANTS
from fusedopt.cli import main
from fusedopt.engines import cuda

POLICY = Path(__file__).parent.parent / "csrc" / "cuda" / "policy.h"
by_name = {str(v): v for v in VARIANTS}


def test_every_choice_has_a_variant_that_makes_it_otherwise():
    made = dict(re.findall(r"#define FUSEDOPT_(\w+) (\d+)", POLICY.read_text()))
    varied = {name for v in VARIANTS for name in v.defines}
    assert varied == made.keys() and len(by_name) == len(VARIANTS)
    assert all(str(value) != made[name] for v in VARIANTS for name, value in v.defines.items())
    assert all(getattr(module, name) != value for v in VARIANTS for module, name, value in v.settings)


def test_a_choice_is_made_for_plans_made_meanwhile_alone(monkeypatch):
    monkeypatch.setattr(variants, "imported", lambda folder: folder)
    before = cuda.WAVES, cuda.load
    with pytest.raises(ZeroDivisionError), by_name["cuda waves-4"].applied():
        assert cuda.WAVES == 4 and cuda.load().name == "default"
        with by_name["cuda threads-256"].applied():
            assert cuda.load().name == "threads-256"
        1 / 0  # noqa: B018
    assert (cuda.WAVES, cuda.load) == before


def test_without_a_gpu_it_says_what_is_possible(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "tune"]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_a_variant_that_does_not_compile_is_told(monkeypatch, tmp_path, capsys):
    def compiled(chosen, arch):
        yield from ((str(v), "too many registers" if v.name == "threads-512" else None) for v in chosen)

    monkeypatch.setattr(tune, "compiled", compiled)
    path = tmp_path / "tune.json"
    assert main(["bench", "tune", "--dry-run", "--engine", "cuda", "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    failed = [v for v in document["variants"] if not v["compiled"]]
    assert failed == [{"name": "threads-512", "engine": "cuda", "compiled": False, "reason": "too many registers"}]
    assert "gpt2 norm only" in document["workloads"] and document["rows"] == []
    assert "too many registers" in " ".join(capsys.readouterr().out.split())


def test_an_interrupt_leaves_what_there_is(monkeypatch, tmp_path, capsys):
    def compiled(chosen, arch):
        yield "triton default", None
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "compiled", compiled)
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    (tmp_path / "threads-64").mkdir()
    (tmp_path / "threads-64" / variants.EXTENSION).touch()
    path = tmp_path / "tune.json"
    assert main(["bench", "tune", "--dry-run", "--json", str(path)]) == 130
    document = json.loads(path.read_text())
    states = {f"{v['engine']} {v['name']}": v["compiled"] for v in document["variants"]}
    assert states.keys() == by_name.keys() and {n for n, c in states.items() if c} == {
        "triton default",
        "cuda threads-64",
    }
    assert set(states.values()) == {True, None} and "gpt2" in document["workloads"]
    assert "interrupted" in document["notes"][0] and "not compiled yet" in capsys.readouterr().out


def test_a_workload_that_fails_is_told_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    def raced(case, chosen, rounds):
        if case.name == "gpt2":
            raise MemoryError("no room")
        figures = {"median": 8e-4, "q1": 8e-4, "q3": 8e-4, "of_copy": 0.9, "ratio": 1, "ratio_q1": 1, "ratio_q3": 1}
        return [{"variant": v.name, "engine": v.engine, "workload": case.name} | figures for v in chosen]

    monkeypatch.setattr(tune, "compiled", lambda chosen, arch: ((str(v), None) for v in chosen))
    monkeypatch.setattr(tune, "raced", raced)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(tune, "facts", lambda *_: {"device": "one"})
    path = tmp_path / "tune.json"
    assert main(["bench", "tune", "--json", str(path)]) == 1
    document = json.loads(path.read_text())
    assert document["notes"] == ["gpt2: FAILED: MemoryError: no room"]
    assert {row["workload"] for row in document["rows"]} == set(document["workloads"]) - {"gpt2"}
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80 or "Wrote" in out
    assert "Not timed: gpt2\n" in out and out.count("800 (0.90)") == len(document["rows"])


interpreted = pytest.mark.skipif("triton" not in AVAILABLE or torch.cuda.is_available(), reason="needs the interpreter")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(workload, "POOL", 2**8 + 1)
    monkeypatch.setattr(timing, "FLUSHED", {"cpu": 2**8, "cuda": 2**8})


@interpreted
@pytest.mark.parametrize("only", ["", "norm", "update"])
def test_variants_take_turns_on_a_workload(monkeypatch, small, only):
    monkeypatch.setattr(suites, "find", lambda name, find=suites.find: find("2x50"))
    case = tune.Case("tiny", "gpt2", {"clip": 1.0}, only)
    rows = tune.raced(case, [by_name["triton default"], by_name["triton programs-4"]], 3, "cpu")
    assert [row["variant"] for row in rows] == ["default", "programs-4"]
    assert rows[0]["ratio"] == 1 and all(row["q1"] <= row["median"] <= row["q3"] and row["of_copy"] > 0 for row in rows)


@interpreted
def test_what_is_done_alone(small):
    """With the same gradients a step is the norm and then the update."""
    what = workload.Workload(suites.find("2x50"), CASES["AdamW"], clip=1e-3)

    def params(only):
        tensors = workload.Tensors(what)
        step = tune._step(by_name["triton default"], what, tensors, only)
        before = torch.cat(tensors.params).detach()
        step()
        return before, torch.cat(tensors.params).detach()

    before, whole = params("")
    assert all(torch.equal(one, before) for one in params("norm"))
    assert torch.equal(params("update")[1], whole) and not torch.equal(whole, before)


def test_bytes_of_what_is_done_alone():
    def bytes_of(only):
        case = tune.Case("", "2x50", {"clip": 1.0}, only)
        return case.nbytes(case.workload("cpu"))

    assert [bytes_of(only) / 100 for only in ("", "norm", "update")] == [32, 4, 28]


@interpreted
def test_a_variant_is_tried_on_all_kinds_of_steps(small, monkeypatch):
    seen = []
    monkeypatch.setattr(tune, "_step", lambda v, what, tensors, only: lambda: seen.append((what.dtype, what.clip)))
    tune._stepped(by_name["triton default"], "cpu")
    assert {dtype for dtype, _ in seen} == {"fp32", "bf16"} and {clip for _, clip in seen} == {1.0, None}


def test_the_default_stays_unless_it_is_beaten_most_of_the_time():
    def row(variant, ratio, q3):
        return {"workload": "gpt2", "engine": "cuda", "variant": variant, "ratio": ratio, "ratio_q3": q3}

    rows = [row("default", 1, 1), row("often", 0.97, 0.99), row("once", 0.9, 1.05)]
    assert [w["variant"] for w in tune.winners(rows)] == ["default"]
    assert [w["variant"] for w in tune.winners(rows[:2])] == ["often"]


@pytest.mark.nightly
@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_all_variants_compile(tmp_path):
    path = tmp_path / "tune.json"
    command = [sys.executable, "-m", "fusedopt", "bench", "tune", "--dry-run", "--json", str(path)]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, capture_output=True, text=True, env=compiling)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sum(v["compiled"] for v in json.loads(path.read_text())["variants"]) >= 20
