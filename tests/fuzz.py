"""Runs the properties of test_properties.py with new random programs until time is up.

Programs run in a process of their own, so that a crash is a failure like any other. Each failure is shrunk and printed
with the command that replays it; the exit status is 1 if there was any.
"""

import argparse
import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH = 200  # programs of one seed
MANY = 520  # parameters in every tenth batch: the scan shares them among threads
SHRINKING = 300  # seconds at most, for one failure
PLAIN = [0, 1, 0, 0]
FAILED = 10  # of a worker: a property failed


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--engine", default="cpu", choices=["cpu", "cuda", "eager"])
    parser.add_argument("--scan", default="c++", choices=["c++", "python"], help="what reads tensors before a step")
    parser.add_argument("--seed", type=int, default=None, help="of the first batch; random if not given")
    parser.add_argument("--replay", help="run one program, given as JSON or a file of it, and nothing else")
    parser.add_argument("--journal", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------------- in a worker


def work(options):
    """Run batches until time is up or something fails; the journal has the program that runs."""
    import conftest  # noqa: F401  builds the CUDA engine for threads
    from hypothesis import HealthCheck, Phase, given, seed, settings
    from properties import programs, run

    end = time.monotonic() + 60 * options.minutes
    done = 0

    def record(program=None):
        text = json.dumps({"done": done, "program": program, "seed": number})
        os.pwrite(journal, text.encode().ljust(1 << 20), 0)

    class TimeIsUp(BaseException):
        pass

    journal = os.open(options.journal, os.O_WRONLY | os.O_CREAT)
    number = options.seed
    while time.monotonic() < end:

        @seed(number)
        @settings(
            max_examples=BATCH,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
            print_blob=False,
        )
        @given(programs(MANY if number % 10 == 9 else 0))
        def batch(program):
            nonlocal done
            if time.monotonic() > end:
                raise TimeIsUp
            record(program)
            run(program, options.engine)
            done += 1

        try:
            batch()
        except TimeIsUp:
            break
        except Exception:
            sys.exit(FAILED)
        number += 1
    record()


def replay(options):
    import conftest  # noqa: F401
    from properties import run

    text = options.replay if options.replay.startswith("{") else Path(options.replay).read_text()
    try:
        run(json.loads(text), options.engine)
    except Exception as error:
        error.__notes__ = []
        raise


# ---------------------------------------------------------------------- in the parent


def child(options, *more, timeout=None):
    command = [sys.executable, "-X", "faulthandler", __file__, "--engine", options.engine, "--scan", options.scan, *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def smaller(program):
    """Programs with something left out, the largest cuts first."""
    ops, groups = program["ops"], program["groups"]
    for size in (8, 4, 2, 1):
        for k in range(0, len(ops), size):
            yield {**program, "ops": ops[:k] + ops[k + size :]}
    if program["many"] > 1:
        yield {**program, "many": 0}
        yield {**program, "many": program["many"] // 2}
    for g in range(len(groups)) if len(groups) > 1 else ():
        yield {**program, "groups": groups[:g] + groups[g + 1 :]}
    for g, group in enumerate(groups):
        params = group["params"]
        for k in range(len(params)) if len(params) > 1 else ():
            yield changed(program, lambda new, g=g, k=k: new["groups"][g]["params"].pop(k))
        for k, p in enumerate(params):
            for key, value in (("layout", PLAIN), ("shape", [3]), ("dtype", "float64")):
                if p[key] != value:
                    yield changed(program, lambda new, g=g, k=k, e=(key, value): new["groups"][g]["params"][k].update([e]))
        if group["options"]:
            yield changed(program, lambda new, g=g: new["groups"][g]["options"].clear())
    if program["clip"] is not None:
        yield {**program, "clip": None}
    if program["skip"]:
        yield {**program, "skip": False}


def changed(program, change):
    new = copy.deepcopy(program)
    change(new)
    return new


def symptom(result):
    """What tells two failures apart: a signal, or the error's kind, where it was raised, and its first words."""
    if result.returncode < 0:
        return f"signal {-result.returncode}"
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith(" ")]
    return "".join(c for c in (lines or [""])[-1][:40] if not c.isdigit())


def shrink(options, program):
    """The smallest program found that fails in the same way, and how it fails."""
    end = time.monotonic() + SHRINKING
    result = child(options, "--replay", json.dumps(program))
    if not result.returncode:
        return program, None
    wanted, searching = symptom(result), True
    while searching:
        searching = False
        for candidate in smaller(program):
            if time.monotonic() > end:
                break
            now = child(options, "--replay", json.dumps(candidate))
            if now.returncode and symptom(now) == wanted:
                program, result, searching = candidate, now, True
                break
    return program, result


def main():
    options = arguments()
    if options.scan == "python":
        os.environ["FUSEDOPT_HOST"] = "python"
    if options.journal:
        return work(options)
    if options.replay:
        return replay(options)
    end, done, failures = time.monotonic() + 60 * options.minutes, 0, {}
    number = random.randrange(10**9) if options.seed is None else options.seed
    print(f"engine {options.engine}, scan {options.scan}, seed {number}", flush=True)
    while (left := end - time.monotonic()) > 0:
        with tempfile.NamedTemporaryFile() as journal:
            result = child(options, "--seed", f"{number}", "--minutes", f"{left / 60}", "--journal", journal.name)
            last = json.loads(Path(journal.name).read_text() or '{"done": 0, "program": null, "seed": 0}')
        done, number = done + last["done"], last["seed"] + 1
        if not result.returncode:
            continue
        if last["program"] is None:
            sys.exit(f"the worker failed before its first program:\n{result.stderr}")
        print(f"failed after {done} programs, shrinking", flush=True)
        program, shrunk = shrink(options, last["program"])
        shrunk = shrunk or result
        if symptom(shrunk) not in failures:
            failures[symptom(shrunk)] = program
            flags = f"--engine {options.engine} --scan {options.scan}"
            print(f"exit status {shrunk.returncode}:\n{shrunk.stderr[-3000:]}")
            print(f"python tests/fuzz.py {flags} --replay '{json.dumps(program)}'", flush=True)
    print(f"{done} programs, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
