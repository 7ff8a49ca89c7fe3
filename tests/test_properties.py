"""Random programs: whatever happens to an optimizer, it steps as torch's does. `make fuzz` runs many more."""

import json
from pathlib import Path

import properties
import pytest
from conftest import AVAILABLE
from helpers import programs_of
from hypothesis import given

FOUND = json.loads((Path(__file__).parent / "properties" / "found.json").read_text())
SCANS = [("cpu", "c++", 100), ("cuda", "c++", 40), ("cuda", "python", 40), ("eager", "c++", 40)]


@pytest.fixture(params=[s for s in SCANS if s[0] in AVAILABLE], ids=lambda s: " ".join(s[:2]))
def scan(request, monkeypatch):
    engine, host, examples = request.param
    if host == "python":
        monkeypatch.setenv("FUSEDOPT_HOST", "python")
    return engine, examples


def check(engine, examples, many=0):
    @programs_of(examples)  # the failure names its program, and fuzz.py shrinks that
    @given(properties.programs(many))
    def programs(program):
        properties.run(program, engine)

    programs()


@pytest.mark.parametrize("program", FOUND.values(), ids=FOUND.keys())
def test_what_was_found_before(scan, program):
    properties.run(program, scan[0])


def test_programs(scan):
    check(*scan)


def test_programs_of_many_tensors(scan):
    check(scan[0], 2, many=520)
