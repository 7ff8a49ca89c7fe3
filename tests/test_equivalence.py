"""The gate of design section 11 for every row of the case table, and what it stands on."""

import pytest
import torch
from helpers import ALL

from fusedopt.verification import gate, oracles
from fusedopt.verification.cases import CASES
from fusedopt.verification.trajectory import run, run_reference


@pytest.mark.parametrize("dtype", gate.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate(case, engine, dtype):
    result = gate.compare(case, engine, dtype)
    assert result.passed, result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_textbook_loop_agrees_with_oracle(case):
    assert gate.has_oracle(case), f"{case.oracle} is not installed"
    theirs, _ = run(lambda p: gate.oracle(case, p), torch.float64)
    ours, _ = run_reference(case, torch.float64)
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=case.exact, atol=case.exact)


def test_every_optimizer_has_a_case():
    assert {case.optimizer for case in CASES} == set(ALL)


def test_gate_sees_a_wrong_step(monkeypatch, engine):
    case = next(c for c in CASES if c.name == "AdamW")
    for dtype in gate.DTYPES:
        wrong = type(case)(case.name, "AdamW", {**case.options, "eps": 1e-3}, case.reference, case.oracle)
        gate._truth(case)
        monkeypatch.setattr(gate, "_truth", lambda _: gate_truth)
        gate_truth = (run(lambda p: gate.oracle(case, p), torch.float64)[0], None)
        if dtype in gate.HALF:
            monkeypatch.setattr(gate, "oracle", lambda _, p: oracles.find("torch:AdamW")(p, lr=1.0))
        result = gate.compare(wrong, engine, dtype)
        monkeypatch.undo()
        assert not result.passed, result


def test_ulps():
    a = torch.tensor([1.0, -1.0, 0.0, float("nan"), float("nan"), 2.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0078125, -1.0, -0.0, float("nan"), 1.0, 1.9921875], dtype=torch.bfloat16)
    assert gate.ulps(a, b).tolist() == [1, 0, 0, 0, 1 << 16, 1]
