"""`make gpu`: parts that fail, hang or cannot run, and what is left of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def visit(monkeypatch, tmp_path):
    """bench/gpu.py, which runs before anything of fusedopt can be imported."""
    path = Path(__file__).parents[1] / "bench" / "gpu.py"
    spec = importlib.util.spec_from_file_location("visit", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "visit", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", ["gpu.py", str(tmp_path / "out")])
    monkeypatch.setattr(module, "STAGE", tmp_path / "stage")
    monkeypatch.setattr(module, "GRACE_SECONDS", 10)
    return module


@pytest.mark.parametrize("arch", [None, "90"])
def test_one_part_of_a_visit_does_not_stop_the_others(visit, arch, monkeypatch, tmp_path, capsys):
    late = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what there is')"
    said = f"print('{visit.SUMMARY}'); print('the fastest')"
    made = [
        visit.Part("fails", [sys.executable, "-c", "raise SystemExit(3)"], 60, needs_gpu=False),
        visit.Part("absent", ["/no/such/program"], 60, needs_gpu=False),
        visit.Part("extra", ["/no/such/program"], 60, needs_gpu=False, optional=True),
        visit.Part("late", [sys.executable, "-c", late], 1, needs_gpu=False),
        visit.Part("bench", [sys.executable, "-c", said], 60, needs_gpu=False),
        visit.Part("staged", [sys.executable, "-m", "fusedopt", "bench", "--help"], 60, needs_gpu=False),
        visit.Part("tests", [sys.executable, "-c", "print('tested')"], 60),
    ]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bench.json").write_text("of the visit before")
    monkeypatch.setattr(visit, "parts", lambda out, gpu: made)
    monkeypatch.setattr(visit, "architecture", lambda: arch)
    assert visit.main() == 1
    assert not (tmp_path / "out" / "bench.json").exists()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["fails"]["status"] == 3 and "No such file" in summary["absent"]["status"]
    assert summary["extra"]["status"].startswith("skipped: /no/such/program")
    assert summary["late"]["status"] == "stopped after 1 s" and summary["late"]["last_line"] == "what there is"
    assert summary["bench"]["status"] == summary["staged"]["status"] == 0, (tmp_path / "out" / "staged.log").read_text()
    assert summary["tests"]["status"] == (0 if arch else "skipped: torch sees no GPU")
    assert capsys.readouterr().out.rstrip().endswith("the fastest")
    wrapper = subprocess.run([tmp_path / "out" / "fusedopt", "bench", "--help"], capture_output=True, text=True)
    assert wrapper.returncode == 0 and "--suite" in wrapper.stdout


def test_what_a_visit_consists_of(visit, tmp_path):
    made = {part.name: part for part in visit.parts(tmp_path, True)}
    for name in ("build", "build-cuda", "info", "tests", "bench", "report", "memcheck", "racecheck", "initcheck"):
        assert made[name].command, name
    assert sum(part.seconds for part in made.values() if not part.optional) <= visit.ALL_SECONDS < 540
    assert "--device" not in made["bench"].command
    without = {part.name: part for part in visit.parts(tmp_path, False)}
    assert "cpu" in without["bench"].command and not without["bench"].needs_gpu
