"""`fusedopt bench trainer`."""

import json

import pytest
from conftest import AVAILABLE

from fusedopt import cli

pytestmark = [
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
def test_trainers_take_turns(tmp_path, capsys):
    pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fusedopt[clients]'")
    path = tmp_path / "trainer.json"
    command = ["bench", "trainer", "--layers", "1", "--width", "64", "--rounds", "2", "--json", str(path)]
    assert cli.main(command) == 0
    document = json.loads(path.read_text())
    assert document["commit"] and {"torch", "transformers", "accelerate"} <= document["versions"].keys()
    variants = ("fusedopt, FusedClipping", "fusedopt", "torch fused", "limit")
    assert [(row["max_grad_norm"], row["variant"]) for row in document["rows"]] == [
        (clip, variant) for clip in (1.0, 0.0) for variant in variants
    ]
    for row in document["rows"]:
        assert 0 < row["q1"] <= row["median"] <= row["q3"] and row["ratio"] > 0 and row["rounds"] == 2
    assert "max_grad_norm" in capsys.readouterr().out
