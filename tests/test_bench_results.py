"""What the benchmark writes: results that are compared, and files that hold none."""

import json

import pytest

from fusedopt.bench import table
from fusedopt.bench.rows import Result, Row
from fusedopt.cli import main


def result(**values):
    options = {"dtype": "fp32", "device": "cpu", "clip": None, "amp": False, "cache": "cold"}
    who = {
        "variant": "fusedopt-cpu",
        "version": "0",
        "storage": "full",
        "same_update": True,
        "note": None,
        "states": None,
    }
    what = {"suite": "gpt2", "tensors": 1, "numel": 1, "groups": 1, "optimizer": "AdamW", "rounds": 5, "bytes": 1}
    figures = {"median": 1.0, "q1": 0.9, "q3": 1.1, "gbps": 1.0, "limit": 0.9, "launches": 1} | values
    peer = {"variant": "torch-fused", "median": 2.0, "ratio": 2.0, "ratio_q1": 1.9, "ratio_q3": 2.1}
    return Result([Row(**what, **options, **row) for row in (who | figures, who | figures | peer)])


def test_compare(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    result().save(a)
    result(median=1.25, q1=1.0, q3=1.5, limit=0.72).save(b)
    compare = ["bench", "compare", str(a), str(b)]
    assert main([*compare, "--only", "fusedopt"]) == 0
    assert "0.800" in capsys.readouterr().out
    assert main([*compare, "--only", "fusedopt", "--bound", "0.79"]) == 0
    assert main([*compare, "--only", "fusedopt", "--bound", "0.81", "--json", str(tmp_path / "c.json")]) == 1
    assert main([*compare, "--only", "torch-fused", "--bound", "0.99"]) == 0
    Result(result().rows[:1]).save(b)
    assert main([*compare, "--bound", "0.5"]) == 1
    assert "torch-fused: missing" in capsys.readouterr().out.replace("\n", " ")
    result(median=1.25, q1=1.0, q3=1.5, limit=0.72).save(b)
    assert main([*compare, "--measure", "limit", "--only", "fusedopt", "--bound", "0.81"]) == 1
    assert main([*compare, "--measure", "ratio", "--bound", "0.99"]) == 0
    written = json.loads((tmp_path / "c.json").read_text())
    (row,) = written["rows"]
    assert row["ratio"] == pytest.approx(0.8) and row["under"] and row["variant"] == "fusedopt-cpu"
    assert row["low"] == pytest.approx(0.9 / 1.5) and row["high"] == pytest.approx(1.1)


def test_a_noisy_run_says_so():
    rows = result(noisy=True).rows
    assert "2 of 2 rows" in table.noise(rows) and table.noise(result().rows) is None
    assert table.spread(rows[0]).startswith("~")


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"format": 0}', '{"format": 1, "rows": [{"suite": "x"}]}', '{"format": 1, "rows": [3]}']
)
def test_files_that_hold_no_results(text, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main(["bench", "compare", str(path), str(path)]) == 2
    assert str(path) in capsys.readouterr().err
