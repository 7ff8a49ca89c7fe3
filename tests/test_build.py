"""Building without a compiler costs the engine, not the package, and says why."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from builds import setup

import fusedopt

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("build")  # one after the other, in one checkout


LONG = f"rules/adam.h:3:5: error: no member named 'x' in 'Hyper<{'float, ' * 400}int>'"
COMPILER = f"""#!/bin/sh
echo "In file included from adam.cpp:1:"
echo "adam.cpp:2:1: warning: unused"
echo "{LONG}"
echo "    3 | error: quoted"
echo "rules/adam.h:9:9: error: a later one"
exit 1
"""


def build(tmp_path, **env):
    """Where setup.py puts a package that it is to build in this environment, and what it said."""
    places = ["--build-base", str(tmp_path / "base"), "--build-lib", str(tmp_path / "lib")]
    asked = ("CC", "CXX", "MAX_JOBS")
    env = {k: v for k, v in os.environ.items() if k not in asked and not k.startswith(("FUSEDOPT_", "NVCC"))} | env
    command = [sys.executable, "setup.py", "-q", "build", *places]
    run = subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    return tmp_path / "lib" / "fusedopt", run.stderr


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"CXX": "no-such-compiler"}, "no C++ compiler: no-such-compiler not found"),
        ({"CC": "no-such-gcc-99"}, "no C++ compiler: no-such-g++-99 not found"),
        ({"CXX": "false"}, "this ended with an error and said nothing: false "),
        ({"CXX": "COMPILER"}, LONG),
    ],
    ids=["CXX", "CC", "silent", "error"],
)
def test_build_without_a_compiler(tmp_path, env, reason):
    (tmp_path / "cxx").write_text(COMPILER)
    (tmp_path / "cxx").chmod(0o755)
    env = {key: value.replace("COMPILER", str(tmp_path / "cxx")) for key, value in env.items()}
    package, said = build(tmp_path, NVCC="no-such-nvcc", **env)
    assert f"fusedopt: the cpu engine was not built: {reason}" in said
    for part in ("triton_kernels", "triton_kernels/rules", "bench", "bench/peers"):
        assert (package / part / "__init__.py").exists(), part
    assert not (package / "bench" / "results").exists()
    assert (package / "py.typed").exists() and not list(package.glob("*.so"))
    report = json.loads((package / "_build_report.json").read_text())
    assert report["cpu"]["failure"].startswith(reason) and "\n" not in report["cpu"]["failure"]
    assert "no CUDA compiler: no-such-nvcc not found" in report["cuda"]["failure"]
    if reason == LONG:
        check_that_it_steps(package, reason)


def check_that_it_steps(package, reason):
    """In plain torch, and once with a warning that says why."""
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
        "import torch, fusedopt; from fusedopt.engines import cpu; print(cpu.available());"
        "ps = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]; o = fusedopt.SGD(ps, lr=0.5)\n"
        "for p in ps: p.grad = torch.ones(3)\n"
        "o.step(); o.step(); fusedopt.Adam(ps).step(); fusedopt.SGD(ps, engine='eager').step()\n"
        "fusedopt.SGD(ps, engine='cpu')"
    )
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], cwd=package.parent, env=env, capture_output=True, text=True)
    assert "it was not built" in run.stdout and reason in run.stdout
    assert run.returncode and "engine 'cpu' is not available: it was not built" in run.stderr
    (warning,) = [line for line in run.stderr.splitlines() if "RuntimeWarning" in line]
    assert f"engine 'cpu' is not available: it was not built: {reason}" in warning and "engine='eager'" in warning


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="what is mapped is read from /proc")
def test_there_is_one_openmp_runtime():
    """torch's own: threads of two would fight for the cores."""
    program = (
        "import torch, fusedopt; p = torch.nn.Parameter(torch.ones(1 << 20)); p.grad = torch.ones_like(p);"
        "fusedopt.AdamW([p], engine='cpu').step(); (p @ p).item();"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line.rpartition('/')[2]})"
    )
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    (runtime,) = eval(run.stdout)
    assert "torch" in runtime


@pytest.mark.skipif(not shutil.which("objdump") or "v3" not in setup.LEVELS, reason="there is no objdump, or no x86-64")
def test_loops_of_all_rules_are_vectorised():
    """The compiler gives up without a word: of floats, each rule has more packed arithmetic than scalar.

    What is no loop is scalar, too: more than there is in the loop of the shortest.
    """
    (built,) = Path(fusedopt.__file__).parent.glob("_cpu_v3.*")
    code = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", built], check=True, capture_output=True, text=True)
    packed, scalar, rule = Counter(), Counter(), None
    for line in code.stdout.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.*)>:", line):
            found = re.search(r"<fusedopt::([A-Z]\w*)", match[1])
            rule = found and found[1]
        elif rule and (match := re.search(r"\bv(?:add|sub|mul|fn?m\w+\d)([ps])s\b", line)):
            (packed if match[1] == "p" and "%ymm" in line else scalar)[rule] += 1
    assert len(packed) == len(setup.RULES)
    packed["Interpolation"] *= 2
    assert not {rule: (packed[rule], scalar[rule]) for rule in packed if packed[rule] < scalar[rule]}


def test_no_machine_specific_flags():
    text = (ROOT / "setup.py").read_text() + (ROOT / "csrc" / "toolchain.py").read_text()
    assert "march=native" not in text and "-ffast-math" not in text.replace("never -ffast-math", "")
