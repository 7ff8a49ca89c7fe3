"""`make gpu`: builds in place, tries, tunes, tests, measures and profiles the GPU engines, and packs what came of it.

Needs no network. Runs with the machine's own Python, torch and compilers; only the standard library is used here,
because nothing of fusedopt can be imported before it is built. No command that fails or hangs stops another. After
each of them `results.tgz` has all that there is; SUMMARY.md is its one page, which also says what could not be run.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "stage"
BUILD_REPORT = ROOT / "fusedopt" / "_build_report.json"
MAPPED = ("triton_kernels", "bench")  # installed inside fusedopt, as package_dir in setup.py says
SOURCES = ("csrc", "fusedopt", "triton_kernels", "bench", "tests")
PARTS, DEFAULT = ("build", "smoke", "tune", "test", "bench", "ncu", "sanitize", "gate"), 6  # the first six
ALL_SECONDS, IDLE_SECONDS = 520, 300  # of a visit of any parts, with a GPU and without
STAGE_SECONDS = 20  # that the commands of a part leave at least to each stage behind them
GRACE_SECONDS = 15  # from an interrupt, at which the benchmark writes what it has, to the end
SUMMARY = "Ours, and the fastest other one"  # the title of the benchmark's last table
ARCHIVE, PAGE, RECORD = "results.tgz", "SUMMARY.md", "summary.json"
ENGINES, NO_GPU = ("cuda", "triton"), "torch sees no GPU"


@dataclass
class Command:
    """One process of the visit.

    Attributes:
        name: Of its log; like the other files it writes, it begins with its part's.
        command: What is run.
        seconds: How long it may take, if its part has so much left.
        does: What for, where the command itself does not say it.
        skip: Why it cannot be run here; empty if it can.
        optional: Counts as skipped if it cannot be run or finished.
        environment: Variables of its own.
    """

    name: str
    command: list[str]
    seconds: float
    does: str = ""
    skip: str = ""
    optional: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def about(self) -> str:
        """What it does, on one line."""
        return self.does or shlex.join(self.command).replace(f"{sys.executable} ", "python ").removeprefix("python -m ")


@dataclass
class Part:
    """Stages, one after another, of commands that run at the same time; what earlier parts left of theirs is added."""

    name: str
    stages: list[list[Command]]
    seconds: float


@dataclass
class Outcome:
    """What came of a command: "ok", "failed", "stopped" or "skipped" in detail, and what it would do if skipped."""

    status: str
    detail: str
    seconds: float
    last_line: str


STEPS = """
import sys, torch, fusedopt
from fusedopt.bench import suites
name, suite, clip = sys.argv[1:]
device, results = fusedopt.engines.ENGINES[name].home(), []
for engine in (name, "eager"):
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in suites.find(suite).shapes]
    optimizer = fusedopt.AdamW(ps, lr=0.01, max_grad_norm=float(clip) or None, engine=engine)
    for _ in range(3):
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer.step()
    results.append(torch.cat([p.detach().flatten() for p in ps]))
difference = (results[0] - results[1]).abs().max().item()
print(f"{name} on {device}: at most {difference:.1e} from eager after 3 steps")
sys.exit(not difference < 1e-5)
"""
PROFILES = {"gpt2": "gpt2 0", "gpt2-clip": "gpt2 1", "10000x64": "10000x64 0"}
# Of the third launch; the clocks are the machine's.
NCU = "--clock-control none --set full --kernel-name regex:^step --launch-skip 2 --launch-count 1 --page details"
DECISIVE = ("gpt2", "gpt2 --clip 1", "gpt2 --dtype bf16", "1000x1000", "10000x64")
RIVALS = "--optimizer AdamW --peer torch-foreach --peer torch-fused --peer apex --peer transformer-engine"
ON_CPU = "--device cpu --suite 10x10000 --optimizer AdamW --optimizer Lion --repeats 3"
# The log names the test that was under way, and soon before the limit its lines.
TESTS = "-m pytest tests/test_gpu.py tests/test_tiles.py tests/test_layouts.py -vv -rs -p no:cacheprovider"
TESTS += " --durations=5 -o faulthandler_timeout=60"
# Expressions of pytest's -k. A fault on the device is the end of its process, so what is apart fails apart.
APART = {"tiles": "test_tiles and not mixed_states", "mixed": "mixed_states", "layouts": "test_layouts"}
APART |= {
    "launches": "launches_per_step or nothing_waits",
    "graphs": "graph or capture",
    "streams": "side_stream or other_current",
    "sizes": "beyond_two or twenty_thousand",
}
BETWEEN, GATE = "agree_with_one_another", "test_gate"
REST = f"not ({' or '.join([*APART.values(), BETWEEN, GATE])})"
DTYPES = {dtype: dtype for dtype in ("float32", "float64", "bfloat16")} | {"float16": "float16 and not bfloat16"}
SANITIZED = "cuda and engines_agree and (AdamW or SGD or NAdam)"
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the sanitizer sees where a tensor ends
BESIDE = {"OMP_NUM_THREADS": "2"}  # for one of many processes


def parts(out: Path, gpu: bool) -> list[Part]:
    """All parts of a visit, in order, with a GPU or without."""
    python, need = sys.executable, "" if gpu else NO_GPU
    build, pytest = [python, "setup.py", "build_ext", "--inplace"], [python, *TESTS.split()]
    fusedopt, dry = [python, "-m", "fusedopt"], [] if gpu else ["--dry-run"]
    bench = [*fusedopt, "bench"]
    ncu, without_ncu = tool("ncu")
    sanitizer, without_sanitizer = tool("compute-sanitizer")

    def test(name: str, select: str, seconds: float = 85) -> Command:
        return Command(name, [*pytest, "-k", select], seconds, f"pytest -k '{select}'", need, environment=BESIDE)

    def step(engine: str, skip: str = need) -> Command:
        command = [python, "-c", STEPS, engine, "10x1000", "1"]
        return Command(f"smoke-{engine}", command, 20, f"3 steps of AdamW by {engine} and by eager", skip)

    def decisive(suite: str) -> Command:
        name = f"bench-{suite.replace(' --', '-').replace(' ', '-')}"
        command = [*bench, "--suite", *suite.split(), *RIVALS.split(), "--json", str(out / f"{name}.json")]
        return Command(name, command, 25, skip=need)

    def profile(name: str, arguments: str) -> Command:
        exported = ["--force-overwrite", "--export", str(out / f"ncu-{name}")]
        command = [ncu, *NCU.split(), *exported, python, "-c", STEPS, "cuda", *arguments.split()]
        return Command(f"ncu-{name}", command, 20, f"ncu on AdamW, {name}", need or without_ncu, optional=True)

    def sanitize(kind: str) -> Command:
        command = [sanitizer, "--tool", kind, "--error-exitcode", "1", *pytest, "-k", SANITIZED]
        return Command(f"sanitize-{kind}", command, 240, "", need or without_sanitizer, environment=UNPOOLED | BESIDE)

    tests = [test(f"test-{e}-{name}", f"{e} and ({select})") for name, select in APART.items() for e in ENGINES]
    tests += [*(test(f"test-{e}-rest", f"{e} and {REST}") for e in ENGINES), test("test-between", BETWEEN)]
    collect = Command("test-collect", [*pytest, "--collect-only"], 20, environment={"FUSEDOPT_TEST_ENGINES": "eager"})
    # It may take too long, where Triton compiles for each of its cells.
    info = Command("smoke-info", [*fusedopt, "info", "--json", str(out / "smoke-info.json")], 20, optional=gpu)
    driver = Command("smoke-driver", ["nvidia-smi"], 10, skip=need, optional=True)
    standard = [*bench, "--json", str(out / "bench.json"), *([] if gpu else ON_CPU.split())]
    report = Command("bench-report", [*bench, "report", str(out)], 30)
    stages = {
        "build": [[Command("build", build, 110, environment={"NVCC": "none"})], [Command("build-cuda", build, 150)]],
        "smoke": [[driver, info, step("cpu", ""), *map(step, ENGINES)]],
        "tune": [[Command("tune", [*bench, "tune", "--json", str(out / "tune.json"), *dry], 120, optional=not gpu)]],
        "test": [tests if gpu else [collect, *tests]],
        "bench": [*([decisive(suite)] for suite in DECISIVE), [Command("bench", standard, 210)], [report]],
        "ncu": [[profile(*row)] for row in PROFILES.items()],
        "sanitize": [[sanitize(kind) for kind in ("memcheck", "racecheck", "initcheck", "synccheck")]],
        "gate": [[test(f"gate-{e}-{d}", f"{GATE} and {e} and {w}", 150) for e in ENGINES for d, w in DTYPES.items()]],
    }
    # Without a GPU there are two cores to build with, and little else is done.
    limits = (110, 30, 90, 90, 140, 60, 240, 150) if gpu else (165, 20, 30, 20, 45, 1, 1, 1)
    return [Part(name, stages[name], seconds) for name, seconds in zip(PARTS, limits, strict=True)]


def tool(name: str) -> tuple[str, str]:
    """A program of CUDA, and why it cannot be run; empty if it can."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    return found or name, "" if found else f"no {name} in PATH or /usr/local/cuda/bin"


def stage(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the sources lie as the installed package would."""
    package = folder / "fusedopt"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    own = [path for path in (ROOT / "fusedopt").iterdir() if path.name != "__pycache__"]
    for path in [*own, *(ROOT / name for name in MAPPED)]:
        (package / path.name).symlink_to(path)
    return folder


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


def machine() -> dict[str, Any]:
    """The "device" and its "arch", such as "90", both empty where torch sees no GPU, "versions" and "platform"."""
    seen = "c.is_available() and print(c.get_device_name(), *c.get_device_capability(), sep='\\n')"
    ran = subprocess.run([sys.executable, "-c", f"import torch.cuda as c; {seen}"], capture_output=True, text=True)
    device, *capability = ran.stdout.splitlines() or [""]
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {"device": device, "arch": "".join(capability), "versions": versions, "platform": platform.platform()}


def commit() -> str:
    """FUSEDOPT_COMMIT, or git's with "+" where files differ from it, or a hash over the sources."""
    if given := os.environ.get("FUSEDOPT_COMMIT"):
        return given
    with suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():
            command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in (ROOT / name).rglob("*")):
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"sources-{digest.hexdigest()[:16]}"


def pack(out: Path) -> None:
    """Replace the archive by one of all files in the folder; it is whole at any moment."""
    whole = out / f"{ARCHIVE}.part"
    with tarfile.open(whole, "w:gz", compresslevel=6) as archive:
        for path in sorted(out.rglob("*")):
            if path.is_file() and not path.name.startswith(ARCHIVE):
                with suppress(FileNotFoundError):  # a command may be writing beside, and renaming
                    entry, content = archive.gettarinfo(path, f"results/{path.relative_to(out)}"), path.read_bytes()
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    os.replace(whole, out / ARCHIVE)


def last_line(log: Path) -> str:
    """What a log comes to; of a build what was left out, and why."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if log.name.startswith("build"):
        with suppress(OSError, ValueError):
            reasons = {name: why for name, why in json.loads(BUILD_REPORT.read_text()).items() if isinstance(why, str)}
            lines += [f"without {'; '.join(f'{name}: {why}' for name, why in reasons.items())}"] if reasons else []
    lines += ["no permission to read the GPU's counters" for line in lines if "ERR_NVGPUCTRPERM" in line]
    return lines[-1] if lines else ""


def table(log: Path) -> str:
    """The end of a log from the last mention of SUMMARY on, or its last table; empty if there is none."""
    text = log.read_text(errors="replace") if log.exists() else ""
    if SUMMARY in text:
        return text[text.rindex(SUMMARY) :].rstrip()
    return next((block.strip("\n") for block in reversed(text.split("\n\n")) if "───" in block or "|--" in block), "")


def end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a process and what it started, and kill what is left after a while."""
    for kind in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, kind)
            process.wait(GRACE_SECONDS)


class Visit:
    """A visit under way, of a machine as :func:`machine` describes it."""

    def __init__(self, out: Path, here: dict[str, Any]) -> None:
        self.out, self.here, self.commit, self.began = out, here, commit(), time.monotonic()
        self.outcomes: dict[str, Outcome] = {}
        self.started: list[subprocess.Popen[bytes]] = []
        self.environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        self.environment |= {"FUSEDOPT_COMMIT": self.commit, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
        self.environment.setdefault("FUSEDOPT_CUDA_ARCHS", here["arch"] or "90")

    def run_part(self, part: Part, until: float) -> None:
        """Run the commands of a part, none of them for longer than until a time of the monotonic clock."""
        for k, commands in enumerate(part.stages):
            limit = until - STAGE_SECONDS * (len(part.stages) - k - 1)
            with ThreadPoolExecutor(len(commands)) as pool:
                started = {pool.submit(self.run, command, limit): command.name for command in commands}
                try:
                    for future in as_completed(started):
                        self.record(started[future], future.result())
                except KeyboardInterrupt:
                    for process in [process for process in self.started if process.poll() is None]:
                        end(process)
                    raise

    def run(self, command: Command, until: float) -> Outcome:
        """Run a command; its output goes to a log, whatever comes of it."""
        start = time.monotonic()
        seconds = min(command.seconds, until - start)
        for old in self.out.glob(f"{command.name}.*"):
            old.unlink()
        if reason := command.skip or ("" if seconds >= 1 else "no time was left"):
            return Outcome("skipped", reason, 0.0, f"would run: {command.about()}")
        print(f"{command.name}: {command.about()}", flush=True)
        log = self.out / f"{command.name}.log"
        with log.open("w") as file:
            try:
                status, detail = self.wait(command, file, seconds)
            except OSError as error:
                status, detail = "failed", f"{command.command[0]}: {error.strerror}"
        if command.optional and status != "ok":
            status, detail = "skipped", f"{status} {detail}"
        return Outcome(status, detail, round(time.monotonic() - start, 1), last_line(log))

    def wait(self, command: Command, log: IO[str], seconds: float) -> tuple[str, str]:
        """Start a command and wait for it, but not longer than some seconds."""
        environment = self.environment | command.environment
        # A session of its own, so that what it started can be ended with it.
        process = subprocess.Popen(
            command.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        self.started.append(process)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            end(process)
            return "stopped", f"after {seconds:.0f} s"
        return ("failed", f"exit status {code}") if code else ("ok", "")

    def record(self, name: str, outcome: Outcome) -> None:
        """Add what came of a command to the folder, and to its archive."""
        self.outcomes[name] = outcome
        print(f"{name}: {outcome.status} {outcome.detail}".rstrip(), flush=True)
        commands = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        (self.out / RECORD).write_text(json.dumps({"commit": self.commit, **self.here, "commands": commands}, indent=1))
        (self.out / PAGE).write_text(self.page())
        pack(self.out)

    def page(self) -> str:
        """What ran, for how long, what came of it, and the tables that matter, as Markdown."""
        known = "No commit known, hash over the sources" if self.commit.startswith("sources-") else "Commit"
        versions = ", ".join(f"{name} {version}" for name, version in self.here["versions"].items())
        lines = [
            f"# GPU visit: {self.here['device'] or NO_GPU}\n",
            f"{known} `{self.commit}`; {versions}; {self.here['platform']}; {time.strftime('%F %T %z')}, after "
            f"{time.monotonic() - self.began:.0f} s. All files: `{ARCHIVE}`.\n",
            "| command | seconds | result | last line |\n|---|--:|---|---|",
        ]
        for name, outcome in self.outcomes.items():
            result, told = f"{outcome.status}: {outcome.detail}".strip(": "), outcome.last_line[:120]
            lines.append(f"| {name} | {outcome.seconds:.1f} | {result} | {told.replace('|', '/')} |")
        for name in self.outcomes:
            if name.startswith(("bench", "tune")) and (text := table(self.out / f"{name}.log")):
                lines.append(f"\n## {name}\n\n```\n{text}\n```")
        return "\n".join(lines) + "\n"


def main() -> int:
    """Run the parts, and print the page of results last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path, help="the folder of results; made if missing")
    help_part = f"repeatable, or with commas: {', '.join(PARTS)} (default: the first six); build comes with any"
    parser.add_argument("--part", action="append", default=[], metavar="NAME", help=help_part)
    args = parser.parse_args()
    asked = [name for names in args.part for name in names.replace(",", " ").split()] or PARTS[:DEFAULT]
    if unknown := set(asked) - set(PARTS):
        parser.error(f"--part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for kind in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs ignore interrupts, and so do theirs
        signal.signal(kind, signal.default_int_handler)
    began, here = time.monotonic(), machine()
    picked = [part for part in parts(out, bool(here["arch"])) if part.name in ("build", *asked)]
    visit, status = Visit(out, here), 0
    last = began + (ALL_SECONDS if here["arch"] else IDLE_SECONDS) - GRACE_SECONDS
    try:
        for k, part in enumerate(picked):
            now, later = time.monotonic(), sum(other.seconds for other in picked[k + 1 :])
            visit.run_part(part, min(last, max(now + part.seconds, last - later)))
            if part.name == "build":
                visit.environment |= surroundings(out)
    except KeyboardInterrupt:
        status = 130
    print(f"\n{visit.page()}", end="")
    return status or int(any(outcome.status in ("failed", "stopped") for outcome in visit.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
