"""`make torch-versions`: one wheel of ours, built here, tested beside several versions of torch, and a table of it.

Each version gets an environment of its own, which is deleted afterwards. The tests run from a copy outside the
checkout, so that what is tested is what is installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import packages
from packages import ROOT

from fusedopt.cli import report

VERSIONS = ("2.11.0", "2.13.0", "2.15.*")  # the oldest that is allowed, that of constraints.txt, the newest
TESTS = [f"tests/test_{name}.py" for name in ("host", "state", "step")]
# Those that a wheel without CUDA has to have on a CPU. Not Triton: the interpreter of its 3.6, which torch 2.11 brings,
# fails with NumPy 2.4.
ENGINES = ("cpu", "eager")
ASK = """
import json, platform, torch, fusedopt
from fusedopt import engines, host
for name in {engines}:
    engines.require(name)
print(json.dumps({{
    "torch": torch.__version__,
    "python": platform.python_version(),
    "reading": getattr(host, "reading_path", lambda: "unknown")(),
    "place": fusedopt.__file__,
}}))
"""
COLUMNS = ("torch", "Python", "how tensors are read", "tests", "verify", "seconds")
PAGE = """# Versions of torch

    make torch-versions

{what}

{table}
{failures}"""
WHAT = """One wheel, built without CUDA beside the torch of `constraints.txt`, in an environment for each version:
{tests} from outside the checkout,
and `fusedopt verify`, of the engines `cpu` and `eager`. The seconds are those of the tests and of `verify`."""


def examine(python, folder):
    """What the tests and ``fusedopt verify`` say there."""
    copytree(ROOT / "tests", folder / "tests", ignore=ignore_patterns("__pycache__"))
    copy(ROOT / "pyproject.toml", folder)  # for pytest's options
    found = json.loads(packages.call(python, "-c", ASK.format(engines=ENGINES), cwd=folder))
    if Path(found.pop("place")).is_relative_to(ROOT):
        raise RuntimeError("the checkout was imported, not the wheel")
    start = time.perf_counter()
    tests = [python, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml", "tests.xml", *TESTS]
    ended = subprocess.run(tests, cwd=folder, env=packages.surroundings(FUSEDOPT_TEST_ENGINES=" ".join(ENGINES)))
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with status {ended.returncode}")
    suite = ElementTree.parse(folder / "tests.xml").getroot().find("testsuite")
    failures = [
        f"{case.get('classname')}::{case.get('name')}: {(mark.get('message') or '?').splitlines()[0]}"
        for case in suite.iter("testcase")
        for mark in (*case.findall("failure"), *case.findall("error"))
    ]
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    found |= {"tests_passed": total - skipped - len(failures), "tests_skipped": skipped, "failures": failures}
    found["tests_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    chosen = [word for name in ENGINES for word in ("--engine", name)]
    verify = [python, "-m", "fusedopt", "verify", *chosen, "--json", "verify.json"]
    ended = subprocess.run(verify, cwd=folder, env=packages.surroundings(), stdout=subprocess.DEVNULL)
    if ended.returncode not in (0, 1):
        raise RuntimeError(f"fusedopt verify ended with status {ended.returncode}")
    results = json.loads((folder / "verify.json").read_text())["results"]
    found["misses"] = [f"{r['optimizer']} on {r['engine']}, {r['dtype']}" for r in results if not r["passed"]]
    found["verify_passed"] = len(results) - len(found["misses"])
    return found | {"verify_seconds": time.perf_counter() - start}


def cells(row):
    """A row of the table, of text."""
    if "error" in row:
        return [row["torch"], "", "", "see below", "", ""]
    tests = f"{row['tests_passed']} passed, {len(row['failures'])} failed, {row['tests_skipped']} skipped"
    verify = f"{row['verify_passed']} passed, {len(row['misses'])} failed"
    seconds = f"{row['tests_seconds']:.0f} + {row['verify_seconds']:.0f}"
    return [row["torch"], row["python"], row["reading"], tests, verify, seconds]


def complaints(row):
    return [row["error"].replace("\n", " ")] if "error" in row else [*row["failures"], *row["misses"]]


def markdown(rows):
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells, rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    failures = "".join(f"\n{row['torch']}: `{line}`\n" for row in rows for line in complaints(row))
    what = WHAT.format(tests=", ".join(f"`{name}`" for name in TESTS))
    return PAGE.format(what=what, table=table, failures=failures)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", action="append", metavar="VERSION", help=f"repeatable; default: {VERSIONS}")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where environments are, and stay")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        built = packages.wheel(packages.source(Path(made)), Path(made), FUSEDOPT_CUDA="0")
        print(f"built {built.name}", flush=True)
        for version in args.torch or VERSIONS:
            with tempfile.TemporaryDirectory() as scratch:
                folder = (args.keep or Path(scratch)).resolve() / version.removesuffix(".*")
                try:
                    python = packages.environment(folder, built, version)
                    print(f"torch {version}:", flush=True)
                    rows.append(examine(python, Path(scratch)))
                except Exception as error:  # the other versions are worth knowing all the same
                    rows.append({"torch": version, "error": f"{type(error).__name__}: {error}"})
                    print(f"torch {version}: {rows[-1]['error']}", flush=True)
    table = report.table("One wheel with several versions of torch", *COLUMNS)
    for row in rows:
        table.add_row(*cells(row))
    report.console.print(table)
    for row in rows:
        for line in complaints(row):
            print(f"{row['torch']}: {line}")
    report.write_json(args.json, {"rows": rows})
    if args.markdown:
        args.markdown.write_text(markdown(rows))
    return 1 if any(map(complaints, rows)) else 0


if __name__ == "__main__":
    sys.exit(main())
