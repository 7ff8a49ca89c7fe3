"""Building without a compiler costs the engine, not the package, and says why."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.xdist_group("build")  # each of them may write the stub


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no C++ compiler: no-such-compiler not found"), ("false", "FAILED")],
)
def test_build_without_a_compiler(tmp_path, compiler, reason):
    env = {**os.environ, "CXX": compiler, "NVCC": "no-such-nvcc"}
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path / "base"),
        "--build-lib",
        str(tmp_path / "lib"),
    ]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    package = tmp_path / "lib" / "fusedopt"
    for part in ("triton_kernels", "triton_kernels/rules", "bench", "bench/peers"):
        assert (package / part / "__init__.py").exists(), part
    assert not (package / "bench" / "results").exists()
    assert (package / "py.typed").exists() and not list(package.glob("*.so"))
    report = json.loads((package / "_build_report.json").read_text())
    assert reason in report["cpu"] and "no CUDA compiler: no-such-nvcc not found" in report["cuda"]
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')];"
        "import torch, fusedopt; from fusedopt.engines import cpu; print(cpu.available());"
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3); o = fusedopt.SGD([p], lr=0.5); o.step();"
        "assert p.tolist() == [0.5] * 3; fusedopt.SGD([p], engine='cpu')"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "lib", capture_output=True, text=True)
    assert "it was not built" in run.stdout and reason in run.stdout
    assert run.returncode and "engine 'cpu' is not available: it was not built" in run.stderr


def test_no_machine_specific_flags():
    text = (ROOT / "setup.py").read_text()
    assert "march=native" not in text and "-ffast-math" not in text.replace("never -ffast-math", "")
