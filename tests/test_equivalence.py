"""The gate of design section 11 for every row of the case table, and what it stands on."""

import pytest
import torch
from conftest import AVAILABLE
from helpers import params

import fusedopt
from fusedopt.verification import gate
from fusedopt.verification.cases import CASES
from fusedopt.verification.options import OPTION_CASES
from fusedopt.verification.trajectory import STEPS, asked, run, run_reference


@pytest.mark.parametrize("dtype", gate.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate(case, engine, dtype):
    result = gate.compare(case, engine, dtype, steps={"triton": 30, "cuda": 150}.get(engine, STEPS))
    assert result.passed, result


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.nightly)],
    ids=str,
)
@pytest.mark.parametrize("case", OPTION_CASES, ids=lambda case: case.name)
def test_gate_of_options(case, engine, dtype):
    result = gate.compare(case, engine, dtype, steps={"triton": 12}.get(engine))
    assert result.passed, result


@pytest.mark.nightly
@pytest.mark.skipif("triton" not in AVAILABLE, reason="Triton cannot run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate_of_triton_takes_more_steps(case, dtype):
    result = gate.compare(case, "triton", dtype, steps=60)
    assert result.passed, result


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.reference and not c.oracle.startswith("none:")], ids=lambda case: case.name
)
def test_textbook_loop_agrees_with_oracle(case):
    assert gate.has_oracle(case), f"{case.oracle} is not installed"
    theirs = gate.results(case, *run(lambda p: gate.oracle(case, p), torch.float64))
    ours = gate.reference_results(case, *run_reference(case, torch.float64))
    for a, b in zip(theirs, ours, strict=True):
        torch.testing.assert_close(a, b, rtol=case.exact, atol=case.exact)


def test_every_optimizer_has_a_case():
    assert {case.optimizer for case in CASES} == set(fusedopt.optimizers.__all__)


@pytest.mark.parametrize("dtype", gate.DTYPES, ids=str)
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_gate_sees_a_wrong_step(monkeypatch, name, dtype):
    (case,) = (c for c in CASES if c.name == name)
    rule = getattr(fusedopt, name).rule
    right = rule.direction

    def wrong(p, g, state, c):
        d, new = right(p, g, state, c)
        return d * (1.2 if dtype in gate.HALF else 1.001), new

    assert gate.compare(case, "eager", dtype).passed
    monkeypatch.setattr(rule, "direction", staticmethod(wrong))
    assert not gate.compare(case, "eager", dtype).passed


def test_ulps():
    a = torch.tensor([1.0, -1.0, 0.0, float("nan"), float("nan"), 2.0], dtype=torch.bfloat16)
    b = torch.tensor([1.0078125, -1.0, -0.0, float("nan"), 1.0, 1.9921875], dtype=torch.bfloat16)
    assert gate.ulps(a, b).tolist() == [1, 0, 0, 0, 1 << 16, 1]


@pytest.mark.parametrize("t", [1, 2, 5, 6, 1000, 10**7])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_steps_are_those_of_eager_in_double_precision(engine, case, t):
    """From the same state at step t, with counters in double precision: so close that all coefficients are exact."""
    shape = (case.replicas, 9) if case.replicas > 1 else (9,)
    ps = [params(shape, dtype=torch.float64) for _ in range(2)]
    a, b = case.build(ps[0], engine=engine), case.build(ps[1], engine="eager")
    ps[0][0].grad = ps[1][0].grad = torch.randn(shape, dtype=torch.float64)
    b.step(**asked(b, 0))
    ps[0][0].data.copy_(ps[1][0])
    state = b.state_dict()
    for name in b.rule.scalars:
        value = {"step": t - 1, "eta": 0.03}.get(name, 0.37)
        state["state"][0][name] = torch.tensor(value, dtype=torch.float64)
    if "betas" in b.defaults:
        state["param_groups"][0]["betas"] = (0.9, 0.999999, 0.9999)[: len(b.defaults["betas"])]
    for optimizer in (a, b):
        optimizer.load_state_dict(state)
        optimizer.step(**asked(optimizer, 1))
    torch.testing.assert_close(ps[0][0], ps[1][0], rtol=1e-14, atol=1e-15)
    for name, value in b.state[ps[1][0]].items():
        torch.testing.assert_close(a.state[ps[0][0]][name], value, rtol=1e-14, atol=1e-15)
