"""`fusedopt bench muon`, and others' Muon beside ours."""

import json

import pytest
import torch
from conftest import AVAILABLE

import fusedopt
from fusedopt import cli
from fusedopt.bench import suites
from fusedopt.bench.optimizers import CASES
from fusedopt.bench.peers import offered
from fusedopt.bench.workload import Tensors, Workload

needs_cpu = pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")


@needs_cpu
def test_parts_take_turns(tmp_path, capsys):
    path = tmp_path / "muon.json"
    command = ["bench", "muon", "--layers", "1", "--width", "32", "--rounds", "2", "--json", str(path)]
    assert cli.main(command) == 0
    document = json.loads(path.read_text())
    rows = {row["variant"]: row for row in document["rows"]}
    assert list(rows) == ["fusedopt", "fusedopt, launches alone", "torch Muon and fused AdamW", "limit"]
    assert document["matrices"] == 12 * 32 * 32 < document["parameters"]
    for row in rows.values():
        assert 0 < row["q1"] <= row["median"] <= row["q3"] and row["rounds"] == 2
    alone = rows["fusedopt, launches alone"]
    assert 0 < alone["limit"] < alone["limit_reads"] < alone["limit"] * 8 / 7
    assert "launches alone" in capsys.readouterr().out


def test_groups_say_which_are_matrices_of_hidden_layers():
    workload = Workload(suites.find("gpt2"), CASES["Muon"])
    groups = Tensors(workload, single=True).groups()
    assert [group["algorithm"] for group in groups] == ["muon", "adamw"]
    assert len(groups[0]["params"]) == 48 and len(groups[1]["params"]) == 100


@pytest.mark.parametrize("name", ["torch-pair", "timm-muon", "pytorch-optimizer-muon"])
def test_peers_step_as_ours(name):
    """Where singular values are near 1, so that their bfloat16 hardly shows; vectors to rounding."""
    case = CASES["Muon"]
    (peer,) = (peer for peer in offered(case, "cpu") if peer.name == name)
    if peer.version() is None:
        pytest.skip(f"{peer.package} is not installed")

    def stepped(make):
        torch.manual_seed(0)
        ps = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (8, 4), (5,))]
        for p in ps:
            p.grad = torch.eye(*p.shape) if p.dim() > 1 else torch.randn(p.shape)
        said = {"lr": 0.02, "weight_decay": 0.1}
        groups = [{"params": ps[:2], "algorithm": "muon", **said}, {"params": ps[2:], "algorithm": "adamw", **said}]
        optimizer = make(groups)
        for _ in range(3):
            optimizer.step()
        return [p.detach() for p in ps]

    for p, q in zip(stepped(peer.build), stepped(lambda groups: fusedopt.Muon(groups, **case.options)), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=6e-3 if p.dim() > 1 else 1e-6)
