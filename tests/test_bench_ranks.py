"""`fusedopt bench ranks`."""

import json
import subprocess
import sys

import pytest
from conftest import AVAILABLE


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
def test_shards_are_stepped_by_all_in_turn(tmp_path):
    path = tmp_path / "ranks.json"
    command = [sys.executable, "-m", "fusedopt", "bench", "ranks", "--width", "2", "--rounds", "2", "--cache", "warm"]
    run = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads(path.read_text())
    assert document["ranks"] == 2 and document["commit"]
    assert [(row["variant"], row["clip"]) for row in document["rows"]] == [
        (variant, clip)
        for clip in (None, 1.0)
        for variant in ("fusedopt-cpu", "torch-fused", "torch-foreach", "torch-for-loop")
    ]
    for row in document["rows"]:
        assert row["tensors"] == 144 and row["local_elements"] == 12 * (12 * 4 + 13 * 2) // 2
        assert 0 < row["q1"] <= row["median"] <= row["q3"] and row["ratio"] > 0 and row["rounds"] == 2
    assert "elements of a rank" in run.stdout
