"""What a visit builds with a GPU and without, and that what it runs is there to be run."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusedopt.bench import variants
from fusedopt.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]


def test_without_a_gpu_the_builds_of_the_checkout_stay(visit, monkeypatch, tmp_path):
    root, dry = tmp_path / "checkout", tmp_path / "dry"
    for place, files in ((root, ("rule.py", "_cuda.so", "no_build_report.json")), (dry, ("_cuda.so", "_cpu_v2.so"))):
        (place / "fusedopt").mkdir(parents=True)
        for name in files:
            (place / "fusedopt" / name).write_text(str(place))
    monkeypatch.setattr(visit, "ROOT", root)
    built = {}
    for where in (root, dry):
        visit.stage(tmp_path / "stage", where)
        found = (tmp_path / "stage" / "fusedopt").iterdir()
        built[where] = {path.name: path.read_text() for path in found if path.name not in visit.MAPPED}
    assert built[root] == dict.fromkeys(("rule.py", "_cuda.so", "no_build_report.json"), str(root))
    assert built[dry] == {"rule.py": str(root), "_cuda.so": str(dry), "_cpu_v2.so": str(dry)}
    for gpu in (True, False):
        for command in visit.lists.builds(gpu):
            assert ("--inplace" in command.command) == gpu and (str(visit.DRY) in " ".join(command.command)) != gpu


def test_without_a_gpu_one_rule_is_compiled_as_the_default_variant(visit, monkeypatch, tmp_path):
    fake = """
from pathlib import Path
REPORT, RULES = "report.json", [Path("adam.h"), Path("lion.h")]
def find_nvcc():
    return "nvcc"
def cuda_archs(nvcc):
    return [90] if nvcc == "nvcc" else []
class Ninja:
    def run(self):
        print("ran")
def cuda_ninja(folder):
    print(folder.relative_to(Path.cwd()))
    return Ninja()
def add_cuda_engine(ninja, target, rules, archs, *choices):
    print(target.name, [str(rule) for rule in rules], archs, *choices)
"""
    (tmp_path / "setup.py").write_text(fake)
    (tmp_path / "report.json").write_text('{"cpu": {"failure": null}, "cuda": {"failure": "no GPU"}}')
    command = [sys.executable, "-c", visit.lists.ONE_RULE, str(tmp_path)]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    what = "build/tune\n_cuda.so ['adam.h'] [90] default_ -DFUSEDOPT_FIRST_VARIANT=1\nran\n"
    assert ran.stdout == f"{what}_cuda.so for 90: adam\n", ran.stderr
    assert variants.FOLDER == variants.ROOT / "build" / "tune"
    setup, added = variants._setup(), []
    monkeypatch.setattr(variants, "_setup", lambda: setup)
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    monkeypatch.setattr(setup, "cuda_ninja", lambda folder: SimpleNamespace(run=lambda keep_going: None))
    monkeypatch.setattr(setup, "add_cuda_engine", lambda ninja, target, *rest: added.append(rest))
    variants.build([v for v in variants.VARIANTS if str(v) == "cuda default"], "90")
    (([rule], *rest),) = added
    assert (rule.name, *rest) == ("adam.h", [90], "default_", "-DFUSEDOPT_FIRST_VARIANT=1")
    assert json.loads((tmp_path / "report.json").read_text()) == {
        "cpu": {"failure": None},
        "cuda": {"failure": None, "compiler": "nvcc", "targets": ["sm_90"], "seconds": 0.0},
    }
    assert {"adam"} < {rule.stem for rule in setup.RULES} and setup.REPORT == "_build_report.json"
    assert {*visit.lists.ONE_LEVEL.values()} <= {*setup.LEVELS}


@pytest.mark.parametrize("safe", ["", "1"])
def test_it_runs_before_anything_is_installed(safe):
    """As a script, by a Python that has nothing but its own library."""
    command = [sys.executable, "-S", str(ROOT / "bench" / "gpu.py"), "--help"]
    ran = subprocess.run(command, cwd="/", capture_output=True, text=True, env={"PYTHONSAFEPATH": safe})
    assert ran.returncode == 0 and "results" in ran.stdout, ran.stderr


@pytest.mark.parametrize("gpu", [True, False])
def test_commands_of_fusedopt_are_understood(visit, monkeypatch, tmp_path, gpu):
    understood = []
    for name, module in COMMANDS.items():
        monkeypatch.setattr(module, "run", lambda args, name=name: understood.append(name) or 0)
    commands = [c.command for part in visit.parts(tmp_path, gpu) for commands in part.stages for c in commands]
    own = [command[3:] for command in commands if command[1:3] == ["-m", "fusedopt"]]
    assert {main(words) for words in own} == {0} and understood == [words[0] for words in own]
    assert {*understood} == {"info", "bench"} and len(own) >= 9


def test_a_build_says_what_it_left_out(visit, tmp_path):
    report = tmp_path / "report.json"
    report.write_text('{"cpu": {"failure": null}, "cuda": {"failure": "no CUDA compiler"}}')
    for name, line in (("build-cuda", "without cuda: no CUDA compiler"), ("build", "made"), ("tune", "made")):
        log = tmp_path / f"{name}.log"
        log.write_text("made\n" + ("fusedopt: the cuda engine was not built: none\n" if name == "build" else ""))
        assert visit.last_line(log, report) == line
    report.write_text('{"cpu": {"failure": "no C++ compiler"}, "cuda": {"failure": "no CUDA compiler"}}')
    assert visit.last_line(tmp_path / "build.log", report) == "without cpu: no C++ compiler"
