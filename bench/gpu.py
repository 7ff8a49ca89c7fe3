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
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also where PYTHONSAFEPATH is set
from visit_parts import DEFAULT, DRY, NO_GPU, PARTS, ROOT, Command, Part, parts  # noqa: E402

STAGE = ROOT / "build" / "stage"
BUILD_REPORT = "_build_report.json"
MAPPED = ("triton_kernels", "bench")  # installed inside fusedopt, as package_dir in setup.py says
SOURCES = ("csrc", "fusedopt", "triton_kernels", "bench", "tests")
ALL_SECONDS, IDLE_SECONDS = 520, 290  # of a visit of any parts, with a GPU and without
STAGE_SECONDS = 20  # that the commands of a part leave at least to each stage behind them
GRACE_SECONDS = 15  # from an interrupt, at which the benchmark writes what it has, to the end
SUMMARY = "Ours, and the fastest other one"  # the title of the benchmark's last table
ARCHIVE, PAGE, RECORD = "results.tgz", "SUMMARY.md", "summary.json"
LOG_BYTES, FILE_BYTES, ALL_BYTES = 2**20, 2**23, 15 * 2**20  # of the archive; a longer log loses its middle


@dataclass
class Outcome:
    """What came of a command: "ok", "failed", "stopped" or "skipped" in detail, and what it would do if skipped."""

    status: str
    detail: str
    seconds: float
    last_line: str


def stage(folder: Path, built: Path) -> Path:
    """A folder for PYTHONPATH in which the sources, and what was built, lie as the installed package would."""
    package = folder / "fusedopt"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    linked = [ROOT / name for name in MAPPED]
    for place, of_builds in ((ROOT, False), (built, True)):
        found = (place / "fusedopt").glob("*")
        linked += [path for path in found if (path.suffix == ".so" or path.name == BUILD_REPORT) == of_builds]
    for path in linked:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return folder


def surroundings(out: Path, built: Path) -> dict[str, str]:
    """Variables with which Python finds what was built, and a command in the results' folder that sets them."""
    places = [str(stage(STAGE, built)), *filter(None, [os.environ.get("PYTHONPATH")])]
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
    if told := os.environ.get("FUSEDOPT_COMMIT"):
        return told
    with suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():
            command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    digest = hashlib.sha256()
    for path in sorted(path for name in SOURCES for path in (ROOT / name).rglob("*")):
        if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh"):
            digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return f"sources-{digest.hexdigest()[:16]}"


def fitting(out: Path) -> tuple[list[Path], list[str]]:
    """The folder's files for the archive, the small ones first, and which are left out for their size."""
    sizes: dict[Path, int] = {}
    for path in out.rglob("*"):
        with suppress(FileNotFoundError):  # a command may be writing beside, and renaming
            if path.is_file() and not path.name.startswith(ARCHIVE):
                sizes[path] = min(path.stat().st_size, LOG_BYTES if path.suffix == ".log" else sys.maxsize)
    kept, left, total = [], [], 0
    for path in sorted(sizes, key=lambda path: (sizes[path], path)):
        total += sizes[path]
        if sizes[path] <= FILE_BYTES and total <= ALL_BYTES:
            kept.append(path)
        else:
            left.append(f"{path.relative_to(out)} ({sizes[path] / 2**20:.0f} MiB)")
    return kept, left


def pack(out: Path) -> None:
    """Replace the archive by one of the files in the folder; it is whole at any moment."""
    whole = out / f"{ARCHIVE}.part"
    with tarfile.open(whole, "w:gz", compresslevel=6) as archive:
        for path in fitting(out)[0]:
            with suppress(FileNotFoundError):
                entry, content = archive.gettarinfo(path, f"results/{path.relative_to(out)}"), path.read_bytes()
                if path.suffix == ".log" and len(content) > LOG_BYTES:
                    content = content[: LOG_BYTES // 2] + b"\n[...]\n" + content[-LOG_BYTES // 2 :]
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    os.replace(whole, out / ARCHIVE)


def last_line(log: Path, build_report: Path) -> str:
    """What a log comes to; of a build what was left out, and why."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    if log.name.startswith("build"):
        with suppress(OSError, ValueError):
            made = json.loads(build_report.read_text())
            reasons = {name: engine["failure"] for name, engine in made.items() if engine["failure"]}
            if log.stem == "build":  # the next command builds the rest
                reasons.pop("cuda", None)
                lines = [line for line in lines if "the cuda engine was not built" not in line]
            lines += [f"without {'; '.join(f'{name}: {why}' for name, why in reasons.items())}"] if reasons else []
    lines += ["no permission to read the GPU's counters" for line in lines if "ERR_NVGPUCTRPERM" in line]
    return lines[-1][:400] if lines else ""


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
    """A visit under way, of a machine as ``machine`` describes it."""

    def __init__(self, out: Path, here: dict[str, Any]) -> None:
        self.out, self.here, self.commit, self.began = out, here, commit(), time.monotonic()
        self.built = ROOT if here["arch"] else DRY
        self.outcomes: dict[str, Outcome] = {}
        self.written = ""  # the page, as it was last
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
        return Outcome(
            status, detail, round(time.monotonic() - start, 1), last_line(log, self.built / "fusedopt" / BUILD_REPORT)
        )

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
        self.written = self.page()
        (self.out / PAGE).write_text(self.written)
        pack(self.out)

    def page(self) -> str:
        """What ran, for how long, what came of it, and the tables that matter, as Markdown."""
        known = "No commit known, hash over the sources" if self.commit.startswith("sources-") else "Commit"
        versions = ", ".join(f"{name} {version}" for name, version in self.here["versions"].items())
        lines = [
            f"# GPU visit: {self.here['device'] or NO_GPU}\n",
            f"{known} `{self.commit}`; {versions}; {self.here['platform']}; {time.strftime('%F %T %z')}, after "
            f"{time.monotonic() - self.began:.0f} s. All files: `{ARCHIVE}`.\n",
            *([f"Too large for it: {', '.join(left)}.\n"] if (left := fitting(self.out)[1]) else []),
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
                visit.environment |= surroundings(out, visit.built)
    except KeyboardInterrupt:
        status = 130
    print(f"\n{visit.written or visit.page()}", end="")
    return status or int(any(outcome.status in ("failed", "stopped") for outcome in visit.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
