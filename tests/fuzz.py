"""Runs the properties of test_properties.py with new random programs until time is up.

Programs run in a process of their own, so that a crash is a failure like any other. Each failure is shrunk and printed
with the command that replays it; the exit status is 1 if there was any.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from properties.shrinking import shrink

BATCH = 200  # programs of one seed
MANY = 520  # parameters in every tenth batch, which is a tenth as long: the scan shares them among threads
SHRINKING = 120  # seconds at most, for one failure
FAILED = 10  # of a worker: a property failed


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--engine", default="cpu", choices=["cpu", "cuda", "eager"])
    parser.add_argument("--scan", default="c++", choices=["c++", "python"], help="what reads tensors before a step")
    parser.add_argument("--seed", type=int, help="of the first batch; random if not given")
    parser.add_argument("--replay", help="run one program, given as JSON or as a file of it, and nothing else")
    parser.add_argument("--journal", help=argparse.SUPPRESS)
    return parser.parse_args()


class TimeIsUp(BaseException):
    pass


class Worker:
    """Runs batches until time is up or something fails. The journal tells the program that runs, if it crashes."""

    def __init__(self, options):
        import conftest  # noqa: F401  builds the CUDA engine for threads

        self.engine, self.number, self.done = options.engine, options.seed, 0
        self.end = time.monotonic() + 60 * options.minutes
        self.journal = open(options.journal, "w")

    def record(self, program=None, **more):
        self.journal.seek(0)
        self.journal.truncate()
        json.dump({"done": self.done, "seed": self.number, "program": program, **more}, self.journal)
        self.journal.flush()

    def one(self, program):
        from properties import run

        if time.monotonic() > self.end:
            raise TimeIsUp
        self.record(program)
        try:
            run(program, self.engine)
        except Exception as error:
            kind = symptom(error)
            program = shrink(program, lambda candidate: self.outcome(candidate)[0] == kind, SHRINKING)
            _, text = self.outcome(program)
            self.record(program, kind=kind, text=text)
            raise
        self.done += 1

    def outcome(self, program):
        from properties import run

        self.record(program)
        try:
            run(program, self.engine)
        except Exception as error:
            return symptom(error), "".join(traceback.format_exception(error, chain=False))
        return None, None

    def work(self):
        from hypothesis import HealthCheck, Phase, given, seed, settings
        from properties import programs

        while time.monotonic() < self.end:
            many = self.number % 10 == 9
            rules = settings(
                max_examples=BATCH // 10 if many else BATCH,
                deadline=None,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            batch = seed(self.number)(rules(given(programs(MANY if many else 0))(lambda program: self.one(program))))
            try:
                batch()
            except TimeIsUp:
                break
            except Exception:
                return FAILED
            self.number += 1
        self.record()
        return 0


def symptom(error):
    """What tells failures apart: the error's kind, the line that raised it, and its first words."""
    at = traceback.extract_tb(error.__traceback__)[-1]
    words = "".join(c for c in str(error)[:30] if not c.isdigit())
    return f"{type(error).__name__} in {Path(at.filename).name}:{at.lineno}: {words}"


def replay(options):
    import conftest  # noqa: F401
    from properties import run

    text = options.replay if options.replay.startswith("{") else Path(options.replay).read_text()
    run(json.loads(text), options.engine)


def child(options, *more):
    flags = ("--engine", options.engine, "--scan", options.scan)
    command = [sys.executable, "-X", "faulthandler", __file__, *flags, *more]
    return subprocess.run(command, capture_output=True, text=True)


def failure(options, result, last):
    """Kind, text and smallest program of a worker's failure."""
    if result.returncode == FAILED and "kind" in last:
        return last["kind"], last["text"], last["program"]
    if last["program"] is None:
        sys.exit(f"the worker failed outside of programs:\n{result.stderr}")

    def crashes(program):
        return child(options, "--replay", json.dumps(program)).returncode == result.returncode

    program = last["program"]
    if crashes(program):
        program = shrink(program, crashes, SHRINKING)
    return f"exit status {result.returncode}", result.stderr[-3000:], program


def main():
    options = arguments()
    if options.scan == "python":
        os.environ["FUSEDOPT_HOST"] = "python"
    if options.journal:
        sys.exit(Worker(options).work())
    if options.replay:
        return replay(options)
    end, done, kinds = time.monotonic() + 60 * options.minutes, 0, set()
    number = random.randrange(10**9) if options.seed is None else options.seed
    print(f"engine {options.engine}, scan {options.scan}, seed {number}", flush=True)
    while (left := end - time.monotonic()) > 0:
        with tempfile.NamedTemporaryFile() as journal:
            result = child(options, "--seed", f"{number}", "--minutes", f"{left / 60}", "--journal", journal.name)
            last = json.loads(Path(journal.name).read_text() or '{"done": 0, "seed": 0, "program": null}')
        done, number = done + last["done"], last["seed"] + 1
        if result.returncode:
            kind, text, program = failure(options, result, last)
            if kind not in kinds:
                flags = f"--engine {options.engine} --scan {options.scan}"
                print(f"after {done} programs: {text}", f"python tests/fuzz.py {flags} --replay", sep="\n", end=" ")
                print(f"'{json.dumps(program)}'", flush=True)
            kinds.add(kind)
    print(f"{done} programs, {len(kinds)} failures")
    sys.exit(bool(kinds))


if __name__ == "__main__":
    main()
