"""Names and signatures are the same everywhere."""

import inspect

import pytest
import torch
from helpers import ALL, TORCH

import fusedopt
from fusedopt.engines import cpu

OWN = ["max_grad_norm", "skip_nonfinite", "engine"]


def signature(cls):
    return {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}


@pytest.mark.parametrize("name", TORCH)
def test_signature_is_torchs(name):
    theirs, ours = signature(getattr(torch.optim, name)), signature(getattr(fusedopt, name))
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for n, p in theirs.items():
        assert ours[n].default == p.default, n


@pytest.mark.parametrize("name", ALL)
def test_common_arguments(name):
    ours = signature(getattr(fusedopt, name))
    for argument in [*OWN, "maximize", "foreach", "fused", "capturable", "differentiable"]:
        assert argument in ours
    assert [ours[a].default for a in OWN] == [None, False, "auto"]


@pytest.mark.parametrize("name", TORCH)
def test_group_keys_and_states_are_torchs(name, engine):
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    theirs, ours = getattr(torch.optim, name)([p]), getattr(fusedopt, name)([q], engine=engine)
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    theirs.step(), ours.step()
    assert theirs.param_groups[0].keys() <= ours.param_groups[0].keys()
    for key, value in theirs.param_groups[0].items():
        if key != "params":
            assert ours.param_groups[0][key] == value, key
    assert list(ours.state[q]) == list(theirs.state[p])


@pytest.mark.skipif(cpu.available() is not None, reason="the CPU engine is not built")
@pytest.mark.parametrize("name", ALL)
def test_engines_agree_on_names(name):
    rule = getattr(fusedopt, name).rule
    kernels = [k for k in cpu.load()[1].kernels() if k["rule"] == rule.name]
    assert kernels
    for k in kernels:
        assert sorted(k["hyper"]) == sorted(h.name for h in rule.hyper)
        assert k["scalars"] == list(rule.scalars)
        assert not rule.scalars or k["scalars"][0] == "step"
    wanted = {tuple(s.name for s in rule.states if not s.when or on[s.when]) for on in switch_settings(rule)}
    assert {tuple(k["states"]) for k in kernels} == wanted


def switch_settings(rule):
    settings = [{}]
    for key in rule.switches():
        settings = [{**s, key: on} for s in settings for on in (False, True)]
    return settings


def test_no_kernel_without_a_rule():
    if cpu.available() is None:
        assert {k["rule"] for k in cpu.load()[1].kernels()} == {getattr(fusedopt, n).rule.name for n in ALL}


@pytest.mark.parametrize("name", ALL)
def test_docstring_has_its_parts(name):
    text = getattr(fusedopt, name).__doc__
    for part in ("Args:", "Raises:", "Example:", "Reference:"):
        assert part in text
    for argument in signature(getattr(fusedopt, name)):
        assert f"{argument}:" in text or f"{argument}," in text, argument


class SignRule(fusedopt.Lion.rule):
    name = "only_eager"


class Mine(fusedopt.FusedOptimizer):
    rule = SignRule

    def __init__(self, params, engine="auto"):
        super().__init__(params, fusedopt.Lion([torch.nn.Parameter(torch.ones(1))]).defaults, engine=engine)


def test_a_rule_without_kernels_is_stepped_by_eager(engine):
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    Mine([p]).step()
    assert torch.equal(p, torch.full((3,), 1 - 1e-4))
    if engine != "eager":
        with pytest.raises(RuntimeError, match="rule 'only_eager' has no"):
            Mine([p], engine=engine).step()
