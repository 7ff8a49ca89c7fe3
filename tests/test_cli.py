import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import fusedopt
from fusedopt import engines, host
from fusedopt.cli import demo, gpt, main, plot, race
from fusedopt.verification import gate

VERSIONS = {"fusedopt", "torch", "python", "numpy"}
SMALL = gpt.Shape(layers=1, width=16, heads=2, context=8)


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more to help, and more suffer from busy neighbours."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def written(path):
    return json.loads(path.read_text())


def test_info_tells_engines_and_optimizers(tmp_path, capsys):
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0
    content = written(tmp_path / "info.json")
    assert set(content) == {"versions", "machine", "reading", "engines", "optimizers", "bytes", "build"}
    assert content["build"] == host.build_report() and content["build"]["cpu"]["failure"] is None
    held = {(row["dtype"], row["state_dtype"], row["master"]): (row["adamw"], row["lion"]) for row in content["bytes"]}
    assert held["fp32", None, None] == (12, 8) and held["bf16", "bfloat16", "split"] == (8, 6)
    assert held["bf16", "8bit", "split"] == (6.031, 5.016) and ("fp64", "8bit", None) not in held
    assert content["versions"].keys() >= VERSIONS
    assert content["machine"].keys() == {"platform", "cpu", "isa", "threads", "gpus"}
    assert content["reading"] in ("torch's C ABI", "DLPack", "Python")
    assert content["engines"].keys() >= {"cpu", "eager", "triton", "cuda"}
    for entry in content["engines"].values():
        assert entry["available"] == (entry["reason"] is None)
    assert set(content["optimizers"]) == set(fusedopt.optimizers.__all__)
    assert all("eager" in names for names in content["optimizers"].values())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    last = " ".join(printed[printed.rindex("Built: cpu for ") :].split())
    assert content["build"]["cpu"]["compiler"] in last and " s; cuda " in last


def test_info_tells_the_real_reason(tmp_path, monkeypatch, capsys):
    reason = "it was not built: no C++ compiler in [/usr] [with T = float]"
    monkeypatch.setattr(engines.cpu, "available", lambda: reason)
    assert main(["info", "--json", str(tmp_path / "info.json")]) == 0
    content = written(tmp_path / "info.json")
    assert content["engines"]["cpu"] == {"available": False, "reason": reason}
    assert all("cpu" not in names for names in content["optimizers"].values())
    assert "no C++ compiler" in capsys.readouterr().out


def test_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "fusedopt", "info", "--json", str(tmp_path / "info.json")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert fusedopt.__version__ in result.stdout
    assert written(tmp_path / "info.json")["engines"]["eager"]["available"]


def test_demo_compares_and_plots(tmp_path, capsys):
    png, output = tmp_path / "plot.png", tmp_path / "demo.json"
    assert main(["demo", "--steps", "3", "--output", str(png), "--json", str(output)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    content = written(output)
    assert content.keys() >= {"optimizer", "steps", "parameters", "runs", "max_loss_difference", "versions"}
    assert (content["optimizer"], content["steps"], set(content["runs"])) == ("AdamW", 3, {"torch", "fusedopt"})
    for run in content["runs"].values():
        assert run.keys() == {"train_loss", "held_out_loss", "optimizer_ms", "seconds", "losses"}
        assert len(run["losses"]) == 3
    assert content["max_loss_difference"] < 1e-4
    printed = capsys.readouterr().out
    assert "torch.optim.AdamW" in printed and str(png) in printed.replace("\n", "")


def test_demo_takes_every_shared_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(gpt, "Shape", lambda **_: SMALL)
    monkeypatch.setattr(plot, "draw", lambda *arguments: None)
    monkeypatch.setattr(demo, "SAMPLE_LENGTH", 1)
    theirs = {name for name in fusedopt.optimizers.__all__ if hasattr(torch.optim, name)}
    shared = sorted(theirs - {"Muon"})  # torch's steps matrices alone
    assert len(shared) >= 7
    for name in shared:
        assert main(["demo", "--steps", "2", "--optimizer", name, "--json", str(tmp_path / "demo.json")]) == 0
        assert written(tmp_path / "demo.json")["max_loss_difference"] < 1e-4


def test_demo_races_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "Shape", lambda **_: SMALL)
    png, output = tmp_path / "race.png", tmp_path / "race.json"
    assert main(["demo", "--optimizer", "all", "--steps", "3", "--output", str(png), "--json", str(output)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    content = written(output)
    assert content["steps"] == 3 and {*content["runs"]} == {*race.ARGUMENTS} == {*fusedopt.optimizers.__all__}
    held_out = [run["held_out_loss"] for run in content["runs"].values()]
    assert held_out == sorted(held_out) and all(0 < loss < 6 for loss in held_out)
    assert all(len(run["losses"]) == 3 and run["engine"] for run in content["runs"].values())
    assert len({run["losses"][0] for run in content["runs"].values()}) == 1
    printed = capsys.readouterr().out
    assert all(name in printed for name in fusedopt.optimizers.__all__)


def test_demo_says_what_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpt, "Shape", lambda **_: SMALL)
    monkeypatch.setattr(plot, "draw", lambda *arguments: None)
    assert main(["demo", "--steps", "2", "--json", str(tmp_path / "demo.json")]) == 0
    (engine,) = {name for name, module in engines.ENGINES.items() if module.available() is None and name == "cpu"}
    assert written(tmp_path / "demo.json")["engine"].startswith(f"{engine} (")
    assert f"stepped by engine {engine} (" in capsys.readouterr().out


def test_demo_asks_for_matplotlib_before_training(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    assert main(["demo"]) == 2
    captured = capsys.readouterr()
    assert "pip install 'fusedopt[demo]'" in captured.err and not captured.out


def test_demo_says_something_before_it_reads_the_text(monkeypatch, capsys):
    class Stop(Exception):
        pass

    def text():
        assert fusedopt.__version__ in capsys.readouterr().out
        raise Stop

    monkeypatch.setattr(gpt, "Text", text)
    for name in ("AdamW", "all"):
        with pytest.raises(Stop):
            main(["demo", "--optimizer", name])


@pytest.mark.parametrize("passed", [True, False])
def test_verify_reports_the_gate(passed, tmp_path, monkeypatch, capsys):
    asked = []

    def verify(names, optimizers, progress):
        asked.append((names, optimizers))
        progress("AdamW on eager, float32")
        outcomes = [("float32", True), ("bfloat16", passed)]
        return [gate.Result("AdamW", "eager", dtype, "torch 2", 1e-7, 2e-7, "ulp", ok) for dtype, ok in outcomes]

    monkeypatch.setattr(gate, "verify", verify)
    command = ["verify", "--engine", "eager", "--optimizer", "AdamW", "--json", str(tmp_path / "verify.json")]
    assert main(command) == (0 if passed else 1)
    assert asked == [(["eager"], ["AdamW"])]
    content = written(tmp_path / "verify.json")
    assert content["passed"] is passed and content["versions"].keys() >= VERSIONS
    assert content["results"][1] == {
        "optimizer": "AdamW",
        "engine": "eager",
        "dtype": "bfloat16",
        "oracle": "torch 2",
        "error": 1e-7,
        "limit": 2e-7,
        "unit": "ulp",
        "passed": passed,
        "note": "",
    }
    assert f"{1 + passed} passed, {1 - passed} failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--optimizer", "Adamw2"], "no optimizer is called 'Adamw2'"),
        (["verify", "--engine", "cpu"], "engine 'cpu' is not available: broken"),
        (["info", "--json", "missing/folder/x.json"], "cannot write missing/folder/x.json"),
        (["info", "--json", "."], "it is a folder"),
        (["demo", "--output", "missing/plot.png"], "cannot write missing/plot.png"),
    ],
)
def test_what_the_user_can_mend_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(engines.cpu, "available", lambda: "broken")
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["demo", "--steps", "0"],
        ["demo", "--steps", "many"],
        ["demo", "--optimizer", "Lion"],
        ["verify", "--engine", "nothing"],
    ],
)
def test_bad_arguments_end_with_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err
