"""`make gpu`: builds in place, tests every GPU engine, runs the benchmark, and leaves a folder of results.

Needs no network, and stays under nine minutes. Runs with the machine's own Python, torch and compilers; only the
standard library is used here, because nothing of fusedopt can be imported before it is built. A part that fails does
not stop the next. Without a GPU, what needs one is left out, which is said, and the benchmark is a short one on the
CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "stage"
BUILD_REPORT = ROOT / "fusedopt" / "_build_report.json"
MAPPED = ("triton_kernels", "bench")  # installed inside fusedopt, as package_dir in setup.py says
ALL_SECONDS = 520
GRACE_SECONDS = 15  # from an interrupt, at which the benchmark writes what it has, to the end
SUMMARY = "Ours, and the fastest other one"  # the title of the benchmark's last table


@dataclass
class Part:
    """One command of the visit.

    Attributes:
        name: Of its log.
        command: What is run.
        seconds: How long it may take, if the whole has so much left.
        needs_gpu: Left out without one.
        optional: Takes what time is left, and is skipped, not failed, if it cannot be run or finished.
        environment: Variables of its own.
    """

    name: str
    command: list[str]
    seconds: int
    needs_gpu: bool = True
    optional: bool = False
    environment: dict[str, str] = field(default_factory=dict)


SANITIZED = ["-m", "pytest", "-q", "tests/test_gpu.py", "-k", "cuda and engines_agree and (AdamW or SGD or NAdam)"]
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the sanitizer sees where a tensor ends
ON_CPU = ["--device", "cpu", "--suite", "10x10000", "--optimizer", "AdamW", "--optimizer", "Lion", "--repeats", "3"]


def parts(out: Path, gpu: bool) -> list[Part]:
    """What a visit consists of, in order."""
    python, module = sys.executable, [sys.executable, "-m", "fusedopt"]
    build, tools = [python, "setup.py", "build_ext", "--inplace"], ("memcheck", "racecheck", "initcheck")
    bench = [*module, "bench", "--json", str(out / "bench.json"), *([] if gpu else ON_CPU)]
    return [
        Part("build", build, 60, needs_gpu=False, environment={"NVCC": "none"}),
        Part("build-cuda", build, 100, needs_gpu=False),
        Part("driver", ["nvidia-smi"], 10, optional=True),
        Part("info", [*module, "info", "--json", str(out / "info.json")], 30, needs_gpu=False),
        Part("tests", [python, "-m", "pytest", "-q", "-rs", "--durations=10", "tests/test_gpu.py"], 90),
        Part("bench", bench, 210, needs_gpu=False),
        Part("report", [*module, "bench", "report", str(out)], 30, needs_gpu=False),
        *(Part(t, [*sanitizer(t), python, *SANITIZED], 90, optional=True, environment=UNPOOLED) for t in tools),
    ]


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
    for name in MAPPED:
        (package / name).symlink_to(ROOT / name)
    return folder


def architecture() -> str | None:
    """The compute capability of the first GPU, such as "90"; None without a GPU that torch sees."""
    probe = "import torch; print(*torch.cuda.get_device_capability(), sep='') if torch.cuda.is_available() else None"
    found = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True).stdout.strip()
    return found or None


def run(part: Part, out: Path, environment: dict[str, str], seconds: float) -> dict[str, object]:
    """Run a part; its output goes to a log, whatever comes of it."""
    start = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w") as file:
        try:
            # A session of its own, so that what it started can be ended with it.
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment | part.environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            status: object = finish(process, seconds)
        except OSError as error:
            status = f"{part.command[0]}: {error.strerror}"
    if part.optional and isinstance(status, str):
        status = f"skipped: {status}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if part.name.startswith("build") and (reasons := unbuilt()):
        last = f"without {reasons}"
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "last_line": last}


def unbuilt() -> str:
    """What the build left out, and why."""
    try:
        report = json.loads(BUILD_REPORT.read_text())
    except (OSError, json.JSONDecodeError):
        return "a report of the build"
    return "; ".join(f"{name}: {reason}" for name, reason in report.items() if isinstance(reason, str))


def finish(process: subprocess.Popen[bytes], seconds: float) -> object:
    """The exit status of a process, or that it and what it started had to be ended."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return f"stopped after {seconds:.0f} s"


def main() -> int:
    """Run all parts, and print what came of them, the benchmark's summary last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the folder of results; made if missing")
    out = parser.parse_args().out.resolve()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it, and so do theirs
    out.mkdir(parents=True, exist_ok=True)
    for old in ("bench.json", "bench.log", "report.md", "summary.json", "info.json"):
        (out / old).unlink(missing_ok=True)
    end, arch = time.monotonic() + ALL_SECONDS, architecture()
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("FUSEDOPT_CUDA_ARCHS", arch or "90")
    results: dict[str, dict[str, object]] = {}
    staged = False
    for part in parts(out, arch is not None):
        if not part.name.startswith("build") and not staged:
            environment |= surroundings(out)
            staged = True
        left = end - time.monotonic() - GRACE_SECONDS
        if part.needs_gpu and arch is None:
            results[part.name] = {"status": "skipped: torch sees no GPU", "seconds": 0.0, "last_line": ""}
        elif left < 1:
            results[part.name] = {"status": "skipped: no time was left", "seconds": 0.0, "last_line": ""}
        else:
            print(f"{part.name}: {' '.join(part.command)}", flush=True)
            results[part.name] = run(part, out, environment, min(part.seconds, left))
        (out / "summary.json").write_text(json.dumps(results, indent=1) + "\n")
    show(results, out)
    return int(any(r["status"] != 0 and not str(r["status"]).startswith("skipped") for r in results.values()))


def surroundings(out: Path) -> dict[str, str]:
    """Variables with which Python finds what was built, and a command in the results' folder that sets them."""
    places = [str(stage(STAGE)), *filter(None, [os.environ.get("PYTHONPATH")])]
    # The sources in the current folder would come first.
    found = {"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = out / "fusedopt"
    settings = " ".join(f"{name}='{value}'" for name, value in found.items())
    command.write_text(f"#!/bin/sh\nexec env {settings} '{sys.executable}' -m fusedopt \"$@\"\n")
    command.chmod(0o755)
    return found


def show(results: dict[str, dict[str, object]], out: Path) -> None:
    """Print what came of each part, and the end of the benchmark's log."""
    print(f"\n{'part':<12}{'seconds':>9}  result")
    for name, result in results.items():
        told = "ok" if result["status"] == 0 else f"FAILED ({result['status']})"
        told = str(result["status"]) if str(result["status"]).startswith("skipped") else told
        print(f"{name:<12}{result['seconds']:>9}  {told} {result['last_line']}"[:120].rstrip())
    log = out / "bench.log"
    text = log.read_text(errors="replace") if log.exists() else ""
    print(f"Results in {out}; {out / 'fusedopt'} runs the commands that report.md names\n")
    if SUMMARY in text:
        print(text[text.rindex(SUMMARY) :].rstrip())


if __name__ == "__main__":
    sys.exit(main())
