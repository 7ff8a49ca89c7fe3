"""``fusedopt diagnose``."""

import argparse
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import fusedopt
from fusedopt.cli import main

PROGRAM = """
import torch
import fusedopt

def run(kind=fusedopt.AdamW, **options):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    x = torch.randn(8, 3)
    optimizer = kind(model.parameters(), **options)
    return model, optimizer, lambda model, batch: (model(batch) - 1).square().mean(), x

def clipped():
    return run(max_grad_norm=1.0)

def sgd():
    return run(torch.optim.SGD)

def failing():
    raise ZeroDivisionError("mine")

def failing_loss():
    model, optimizer, _, x = run()
    return model, optimizer, lambda model, batch: {}["k"], x

def failing_shapes():
    model, optimizer, _, x = run()
    return model, optimizer, lambda model, batch: model(batch.T).sum(), x

def wrong():
    return 3

def wrong_parts():
    return run()[::-1]
"""


def stepped(kind, steps=12, **options):
    model = nn.Linear(3, 1)
    optimizer = kind(model.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "trained_here.py").write_text(PROGRAM)
    return tmp_path


def diagnosed(state, *arguments):
    torch.save(state, "state.pt")
    assert main(["diagnose", "state.pt", "--json", "out.json", *arguments]) == 0
    with open("out.json") as file:
        return json.load(file)


@pytest.mark.parametrize("place", [None, "optimizer", "optimizer_state_dict", "optimizer_states"])
def test_settings_of_a_checkpoint(here, place, capsys):
    state = stepped(torch.optim.AdamW).state_dict()
    content = diagnosed(state if place is None else {place: [state] if place.endswith("s") else state, "epoch": 3})
    assert set(content) == {"optimizer", "steps", "groups", "correction", "curvature", "notes", "versions"}
    assert (content["optimizer"], content["steps"]) == ("AdamW", 12) and content["correction"] is None
    (group,) = content["groups"]
    assert group["memory_coefficient"] == pytest.approx(990)
    assert not group["generic_adam"]["holds"] and group["generic_adam"]["ratio"] == pytest.approx(math.sqrt(1e-3))
    printed = capsys.readouterr().out
    assert "no guarantee" in printed and "anti-regularises" in printed and "as constant" in printed


def test_the_first_place_that_is_a_state(here):
    state = stepped(torch.optim.AdamW).state_dict()
    assert diagnosed({"optimizer": "AdamW", "optimizer_state_dict": state})["optimizer"] == "AdamW"
    assert diagnosed({"optimizer": {"lr": 1.0}, "optimizer_states": [state]})["optimizer"] == "AdamW"


def test_what_is_not_finite(here):
    """A step counts nothing then, and JSON has null."""
    state = stepped(torch.optim.AdamW, lr=0.0).state_dict()
    for own in state["state"].values():
        own["step"] = torch.tensor(math.inf)
    content = diagnosed(state)  # R is infinite where lr is 0
    assert content["steps"] == 100_000 and content["groups"][0]["generic_adam"]["ratio"] is None
    assert "Infinity" not in (here / "out.json").read_text()


def test_the_condition_is_not_necessary(here, capsys):
    content = diagnosed(stepped(torch.optim.AdamW).state_dict())
    text = " ".join(capsys.readouterr().out.split())
    assert "sufficient and not necessary: constant betas never meet it, and train" in text
    assert any("never meet it" in note for note in content["groups"][0]["notes"])


@pytest.mark.parametrize(("name", "error"), [("loss", "KeyError: 'k'"), ("shapes", "RuntimeError: mat1 and mat2")])
def test_what_was_found_before_an_error_is_written(here, name, error, capsys):
    torch.save(stepped(fusedopt.AdamW).state_dict(), "state.pt")
    assert main(["diagnose", "state.pt", "--json", "out.json", "--with", f"trained_here:failing_{name}"]) == 2
    assert f"its loss_fn raised {error}" in capsys.readouterr().err
    assert json.loads((here / "out.json").read_text())["groups"][0]["memory_coefficient"] == pytest.approx(990)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Lion", "RMSprop", "AdEMAMix"])
def test_the_class_is_found_by_its_groups(here, name):
    options = {"betas": (0.9, 0.95)} if name in ("Adam", "AdamW", "Lion") else {}
    content = diagnosed(stepped(getattr(fusedopt, name), lr=1e-3, **options).state_dict())
    assert content["optimizer"] == name
    (group,) = content["groups"]
    expected = {"Adam": 10, "AdamW": 10, "SGD": 0, "Lion": 18}.get(name)
    assert group["memory_coefficient"] == (None if expected is None else pytest.approx(expected))
    assert any("memory of momentum" in note for note in group["notes"]) == (expected is None)
    assert (group["generic_adam"] is not None) == (name in ("Adam", "AdamW"))


def test_every_group_is_diagnosed_and_drawn(here):
    groups = [{"params": [nn.Parameter(torch.ones(2))], "betas": (0.9, b)} for b in (0.95, 0.999)]
    content = diagnosed(fusedopt.AdamW(groups).state_dict(), "--steps", "100", "--plot", ".")
    assert [group["memory_coefficient"] for group in content["groups"]] == pytest.approx([10, 990])
    assert content["steps"] == 100
    for name in ("generic_adam_0", "memory_0", "generic_adam_1", "memory_1"):
        assert (here / f"{name}.png").exists()


def test_without_a_count_the_run_is_long(here):
    assert diagnosed(stepped(torch.optim.SGD, momentum=0.9).state_dict())["steps"] == 100_000


def test_with_a_batch(here, capsys):
    state = stepped(fusedopt.AdamW, lr=0.01, betas=(0.9, 0.95)).state_dict()
    content = diagnosed(state, "--with", "trained_here:run", "--plot", ".")
    assert content["groups"][0]["memory_coefficient"] == pytest.approx(10)  # the file's betas, not the function's
    assert content["correction"]["term"] < 0 < content["correction"]["force_norm"]
    assert len(content["curvature"]["values"]) == 4 and content["curvature"]["lr"] > 0 and not content["notes"]
    assert (here / "correction.png").exists() and (here / "curvature.png").exists()
    assert "Memory of momentum on this batch" in capsys.readouterr().out


def test_what_is_not_derived_is_said(here, capsys):
    content = diagnosed(stepped(fusedopt.AdamW).state_dict(), "--with", "trained_here:clipped")
    assert content["correction"] is None and content["curvature"] is not None
    assert "max_grad_norm is 1.0" in content["notes"][0] and "max_grad_norm" in capsys.readouterr().out
    content = diagnosed(stepped(fusedopt.Adam, amsgrad=True).state_dict())
    assert content["groups"][0]["generic_adam"] is None and "amsgrad" in content["groups"][0]["notes"][1]


@pytest.mark.parametrize(
    ("saved", "arguments", "message"),
    [
        ("adamw", ["--optimizer", "adamw2"], "no optimizer is called 'adamw2'"),
        ("adamw", ["--optimizer", "sgd"], "group 0 of the file is not SGD's: it has no dampening, momentum, nesterov"),
        ("adamw", ["--plot", "nowhere"], "there is no such folder"),
        ("adamw", ["--with", "trained_here"], "it must be MODULE:FUNCTION"),
        ("adamw", ["--with", "nothing_here:run"], "No module named 'nothing_here'"),
        ("adamw", ["--with", "trained_here:nothing"], "has no attribute 'nothing'"),
        ("adamw", ["--with", "trained_here:torch"], "it is module, not a function"),
        ("adamw", ["--with", "trained_here:failing"], "it raised ZeroDivisionError: mine"),
        ("adamw", ["--with", "syntax:run"], "importing it raised SyntaxError"),
        ("adamw", ["--with", "trained_here:wrong"], "it must return a tuple"),
        ("adamw", ["--with", "trained_here:wrong_parts"], "it returned (Tensor, function, AdamW, Linear)"),
        ("adamw", ["--with", "trained_here:run", "--optimizer", "AdamW"], "--optimizer is not needed"),
        ("adamw", ["--with", "trained_here:sgd"], "group 0 of the file is not SGD's"),
        ("adam_like", [], "say --optimizer NAME"),
        ({"weights": 1}, [], "has no optimizer's state_dict"),
        ({"param_groups": []}, [], "has no optimizer's state_dict"),
        (3, [], "has no optimizer's state_dict"),
        ({"optimizer": argparse.Namespace()}, [], "holds argparse.Namespace, which weights_only does not load; save"),
        ({"optimizer": np.float64(1)}, [], "holds numpy._core.multiarray.scalar, which weights_only"),
        ("text", [], "state.pt is no file of torch.save"),
        (bytes(range(256)), [], "state.pt is no file of torch.save"),
        (b"", [], "state.pt is no file of torch.save"),
        ("nothing", [], "cannot read state.pt"),
    ],
)
def test_what_the_user_can_mend_is_one_line(here, saved, arguments, message, capsys):
    (here / "syntax.py").write_text("def")
    if saved == "text" or isinstance(saved, bytes):
        (here / "state.pt").write_bytes(b"hello" if saved == "text" else saved)
    elif saved != "nothing":
        state = stepped(fusedopt.AdamW).state_dict() if isinstance(saved, str) else saved
        if saved == "adam_like":
            del state["param_groups"][0]["decoupled_weight_decay"]
        torch.save(state, "state.pt")
    assert main(["diagnose", "state.pt", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "\x1b" not in error
