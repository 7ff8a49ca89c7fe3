"""Runs tests on a host and a CPU engine built with AddressSanitizer and UBSan; takes pytest's arguments.

The build lies in a folder of its own, so the one in place stays what it is.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from builds import toolchain

from fusedopt.engines import cpu

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "sanitize"
LIBRARY = FOLDER / "lib"
LEVEL = cpu.load()[2]  # the build that this machine's tests load
# The first takes too long; the others want levels that are not built.
LEFT_OUT = ["test_more_than_two_to_the_31_elements"]
LEFT_OUT += [f"test_every_isa_level_passes_the_gate[{level}]" for level in ("v2", "v3", "v4") if level != LEVEL]

# Loads what the tests load, then writes behind a buffer, which must not go unnoticed.
CANARY = """
import array, sys
from fusedopt.engines import cpu
host, engine, _ = cpu.load()
print(host.__file__, engine.__file__, sep="\\n", flush=True)
floats = array.array("f", bytes(4 * 1000))
address, _ = floats.buffer_info()
engine.stream([address, address], 0, 2000, 1)
"""


def build():
    shutil.rmtree(LIBRARY, ignore_errors=True)  # or modules that were removed would still be found
    places = ["--build-base", str(FOLDER), "--build-lib", str(LIBRARY)]
    env = {**os.environ, "FUSEDOPT_SANITIZE": "address,undefined", "FUSEDOPT_CPU_LEVELS": LEVEL}
    command = [sys.executable, "setup.py", "-q", "build", *places]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"the sanitized build failed: {run.stderr}")
    report = json.loads((LIBRARY / "fusedopt" / "_build_report.json").read_text())
    if report["cpu"]["failure"]:
        sys.exit(f"the sanitized build failed: {report['cpu']['failure']}")


def warm_up():
    """Compiles what tests import to bytecode, for which a Python under AddressSanitizer takes half a minute."""
    imports = "import hypothesis, pytest, torch._dynamo, xdist, fusedopt.verification.gate"
    subprocess.run([sys.executable, "-c", imports], cwd=ROOT, check=True)


def runtime(library):
    compiler = toolchain.compiler().split()
    found = subprocess.run([*compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
    path = found.stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"{' '.join(compiler)} has no {library}")
    return path


def environment():
    # Python is not instrumented, so the runtimes are preloaded; libstdc++ as well, or they would not find its throw.
    # An error aborts, so that pytest's fault handler says which test it was.
    return {
        **os.environ,
        "PYTHONPATH": str(LIBRARY),
        "PYTHONSAFEPATH": "1",  # nor is the checkout's own fusedopt/ found first, by the tests' subprocesses either
        "PYTHONMALLOC": "malloc",  # or freed Python objects would look alive
        "LD_PRELOAD": " ".join(runtime(f"lib{name}.so") for name in ("asan", "ubsan", "stdc++")),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:handle_segv=2",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "FUSEDOPT_TEST_ENGINES": "cpu",
    }


def check(env):
    """The tests will import this build, and it is watched."""
    run = subprocess.run([sys.executable, "-c", CANARY], cwd=ROOT, env=env, capture_output=True, text=True)
    files = [Path(line) for line in run.stdout.splitlines()]
    if len(files) != 2 or not all(path.is_relative_to(LIBRARY) for path in files):
        sys.exit(f"not the sanitized build: {run.stdout}{run.stderr}")
    for path in files:
        if not all(symbol in path.read_bytes() for symbol in (b"__asan_report", b"__ubsan_handle")):
            sys.exit(f"{path} is not instrumented")
    if not run.returncode or "AddressSanitizer: heap-buffer-overflow" not in run.stderr:
        sys.exit(f"a write behind a buffer went unnoticed: {run.stderr}")


if __name__ == "__main__":
    build()
    warm_up()
    env = environment()
    check(env)
    # Captured by file descriptor, a report would be lost with the process.
    command = [sys.executable, "-m", "pytest", "--capture=sys"]
    command += [f"--deselect=tests/test_host.py::{name}" for name in LEFT_OUT] + sys.argv[1:]
    # A worker that has died is not replaced: what is wrong is wrong.
    workers = ["-n", "auto", "--maxprocesses", "8", "--dist", "loadgroup", "--max-worker-restart", "0"]
    sys.exit(subprocess.run([*command, *workers], cwd=ROOT, env=env).returncode)
