"""What the support page shows of a run of the tests: `make support` writes docs/support.json."""

import json
import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

FILE = os.environ.get("FUSEDOPT_SUPPORT")
# Tests whose parameters are a place in a matrix, and what they tell of it.
MATRICES = {
    "test_gate": lambda case, engine, dtype: ("gate", case.optimizer, engine, str(dtype).removeprefix("torch.")),
    "test_every_optimizer_takes_every_storage": lambda name, engine: ("storage", name, engine),
}
CLIENTS = ("accelerate", "deepspeed", "lightning", "timm", "torch", "torchtitan", "transformers")
# Of which client the tests of a file are.
FILES = {
    "test_accelerate_ranks": "accelerate",
    "test_compiling": "torch",
    "test_lightning": "lightning",
    "test_sharding_clients": "torch",
    "test_timm": "timm",
    "test_torchtitan": "torchtitan",
    "test_transformers": "transformers",
}
PAGES = {"torch_compile": "torch"}  # the others are called as their client


def mark(item):
    """What a test tells goes with its report, from whichever process it runs in; False if it tells nothing."""
    params = dict(item.callspec.params) if hasattr(item, "callspec") else {}
    name = item.name.split("[")[0]
    if name in MATRICES:
        item.user_properties.append(("support", list(MATRICES[name](**params))))
    elif name == "test_pages_run" and item.path.stem == "test_client_pages":
        page = params["page"].stem
        if PAGES.get(page, page) in CLIENTS:
            item.user_properties.append(("support", ["clients", PAGES.get(page, page), f"programs of {page}.md"]))
    elif item.path.stem in FILES:
        words = re.sub("torchs", "torch's", name.removeprefix("test_").replace("_", " "))
        item.user_properties.append(("support", ["clients", FILES[item.path.stem], words]))
    return bool(item.user_properties)


class Recorder:
    """Collects what tests tell, and writes the file at the end of the run."""

    def __init__(self, file):
        self.file = Path(file)
        self.passed = {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and not (report.failed or report.skipped):
            return
        for place in (tuple(value) for name, value in report.user_properties if name == "support"):
            if report.failed or (report.passed and self.passed.get(place) is not False):
                self.passed[place] = report.passed

    def pytest_sessionfinish(self, exitstatus):
        if exitstatus not in (0, 1):  # it was interrupted
            return
        tree = {}
        for place, passed in sorted(self.passed.items()):
            within = tree
            for word in place[:-1]:
                within = within.setdefault(word, {})
            within[place[-1]] = passed
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        content = {"commit": commit, "versions": dict(filter(None, map(_version, CLIENTS))), **tree}
        self.file.write_text(json.dumps(content, indent=1) + "\n")


def _version(package):
    if package == "torch":
        return package, torch.__version__.partition("+")[0]
    try:
        return package, version(package)
    except PackageNotFoundError:
        return None
