"""`make gpu`: builds in place, tests every GPU engine, and leaves a folder of results. Needs no network.

Runs with the machine's own Python, torch and compilers; only the standard library is used here, because nothing
of fusedopt can be imported before it is built. A part that fails does not stop the next. Without a GPU, what
needs one is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"triton_kernels": "triton_kernels", "bench": "bench"}  # as package_dir in setup.py


@dataclass
class Part:
    """One command of the visit.

    Attributes:
        name: Of its log.
        command: What is run.
        seconds: How long it may take.
        needs_gpu: Left out without one.
    """

    name: str
    command: list[str]
    seconds: int
    needs_gpu: bool = True


def parts(out: Path) -> list[Part]:
    """What a visit consists of, in order."""
    python, module = sys.executable, [sys.executable, "-m", "fusedopt"]
    return [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 400, needs_gpu=False),
        Part("info", [*module, "info", "--json", str(out / "info.json")], 60, needs_gpu=False),
        Part("tests", [python, "-m", "pytest", "-q", "-rs", "--durations=10", "tests/test_gpu.py"], 300),
        *(Part(tool, [*sanitizer(tool), python, *SANITIZED], 60) for tool in ("memcheck", "racecheck", "initcheck")),
    ]


SANITIZED = ["-m", "pytest", "-q", "tests/test_gpu.py", "-k", "cuda and engines_agree and (AdamW or SGD or NAdam)"]


def sanitizer(tool: str) -> list[str]:
    """The command that runs another under one of compute-sanitizer's tools; a find is exit status 1."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return [program, "--tool", tool, "--error-exitcode", "1"]


def stage(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the sources lie as the installed package would."""
    package = folder / "fusedopt"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for path in (ROOT / "fusedopt").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    for name, place in MAPPED.items():
        (package / name).symlink_to(ROOT / place)
    return folder


def has_gpu() -> bool:
    """Whether torch sees a GPU."""
    probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", probe], capture_output=True).returncode == 0


def run(part: Part, out: Path, environment: dict[str, str]) -> dict[str, object]:
    """Run a part; its output goes to a log, whatever comes of it."""
    start = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        try:
            status: object = subprocess.run(
                part.command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=part.seconds
            ).returncode
        except FileNotFoundError as error:
            status = f"{error.filename} is not there"
        except subprocess.TimeoutExpired:
            status = f"stopped after {part.seconds} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "last_line": last}


def main() -> int:
    """Run all parts, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of results; made if missing")
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    gpu = has_gpu()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    results: dict[str, dict[str, object]] = {}
    for part in parts(out):
        if part.needs_gpu and not gpu:
            results[part.name] = {"status": "skipped: torch sees no GPU", "seconds": 0.0, "last_line": ""}
        else:
            print(f"{part.name}: {' '.join(part.command)}", flush=True)
            results[part.name] = run(part, out, environment)
        if part.name == "build":
            environment["PYTHONSAFEPATH"] = "1"  # else the sources in the current folder come first
            environment["PYTHONPATH"] = os.pathsep.join(
                [str(stage(ROOT / "build" / "stage")), *filter(None, [environment.get("PYTHONPATH")])]
            )
    (out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{'part':<12}{'seconds':>9}  result")
    for name, result in results.items():
        told = "ok" if result["status"] == 0 else f"FAILED ({result['status']})"
        told = str(result["status"]) if str(result["status"]).startswith("skipped") else told
        print(f"{name:<12}{result['seconds']:>9}  {told} {result['last_line']}"[:160])
    print(f"Results in {out}")
    return int(any(r["status"] != 0 and not str(r["status"]).startswith("skipped") for r in results.values()))


if __name__ == "__main__":
    sys.exit(main())
