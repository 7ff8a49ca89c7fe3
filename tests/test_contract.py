"""Names, signatures and layouts are the same everywhere."""

import inspect
import re
from importlib import import_module
from pkgutil import iter_modules
from types import SimpleNamespace

import pytest
import torch
from conftest import AVAILABLE
from helpers import EVERY, RULES, TORCH

import fusedopt
from fusedopt import layout, optimizers
from fusedopt.engines import cpu, cuda
from fusedopt.passes import Pass

OWN = ["max_grad_norm", "skip_nonfinite", "handles_amp", "engine"]


def signature(cls):
    return {n: p for n, p in inspect.signature(cls.__init__).parameters.items() if n != "self"}


@pytest.mark.parametrize("name", TORCH)
def test_signature_is_torchs(name):
    theirs, ours = signature(getattr(torch.optim, name)), signature(getattr(fusedopt, name))
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [n for n, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    for n, p in theirs.items():
        assert ours[n].default == p.default, n


@pytest.mark.parametrize("name", EVERY)
def test_common_arguments(name):
    ours = signature(getattr(fusedopt, name))
    for argument in [*OWN, "maximize", "foreach", "fused", "capturable", "differentiable"]:
        assert argument in ours
    assert [ours[a].default for a in OWN] == [None, False, True, "auto"]


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


def test_every_optimizer_is_exported():
    modules = [import_module(m.name) for m in iter_modules(optimizers.__path__, f"{optimizers.__name__}.")]
    found = {value for m in modules for value in vars(m).values() if getattr(value, "__module__", "") == m.__name__}
    classes = {
        c.__name__
        for c in found
        if isinstance(c, type) and issubclass(c, fusedopt.FusedOptimizer) and "rule" in vars(c)
    }
    assert classes == set(optimizers.OPTIMIZERS) == set(optimizers.__all__) <= set(fusedopt.__all__)


def names(rule):
    """What the rule in Python says: what it reads and prepares, in order, and what scales its direction."""
    h = SimpleNamespace(**{x.name: 0.5 for x in rule.hyper})
    coefficients = rule.prepare(h, SimpleNamespace(**dict.fromkeys(rule.scalars, 1.0)), False)
    return {
        "scalars": list(rule.scalars),
        "hyper": [x.name for x in rule.hyper],
        "coefficients": list(vars(coefficients)),
        "measures": list(rule.measures),
        "epilogue": list(rule.epilogue),
        "score": bool(rule.score),
        "step_scale": rule.step_scale.value,
    }


def kernels(engine):
    """What an engine has: for each rule its names, and the sets of states that it steps."""
    if engine == "triton":
        modules = pytest.importorskip("fusedopt.triton_kernels.rules").by_name()
        for name, module in modules.items():
            found = {key: list(getattr(module, key)) for key in ("scalars", "hyper", "coefficients")}
            found |= {key: list(getattr(module, key, ())) for key in ("measures", "epilogue")}
            found["score"] = hasattr(module, "score")
            found["step_scale"] = getattr(module, "step_scale", "lr")
            assert module.states == tuple(s.name for s in RULES[name].states)
            assert getattr(module, "replaces", "") == RULES[name].replaces
            yield name, found, set(RULES[name].variants())
        return
    if engine not in AVAILABLE:
        pytest.skip(f"needs engine {engine}")
    registry = cpu.load()[1] if engine == "cpu" else cuda.load()
    for k in registry.kernels():
        assert k["replaces"] == (RULES[k["rule"]].replaces in k["states"])
        steps = {tuple(k["states"])} if engine == "cpu" else set(map(tuple, k["variants"]))
        yield k["rule"], {key: value for key, value in k.items() if key in names(RULES[k["rule"]])}, steps


@pytest.mark.parametrize("engine", ["cpu", "cuda", "triton"])
def test_engines_have_the_same_rules_and_names(engine):
    stepped = {}
    for rule, found, states in kernels(engine):
        assert found == names(RULES[rule]), rule
        assert "step" not in found["scalars"][1:]
        stepped[rule] = stepped.get(rule, set()) | states
    assert stepped == {name: set(rule.variants()) for name, rule in RULES.items()}


@pytest.mark.skipif("cuda" not in AVAILABLE, reason="needs the engine's module")
def test_tables_have_one_layout():
    found = cuda.load().layout()
    assert found.pop("Pass") == [x.name for x in Pass] and list(Pass) == [1 << k for k in range(len(Pass))]
    for table in (
        layout.RowWord,
        layout.StepWord,
        layout.GroupFlag,
        layout.OptionNumber,
        layout.StatusNumber,
        layout.StatusCount,
        layout.SumsWord,
    ):
        words = [re.sub("(?<!^)(?=[A-Z])", "_", word.removeprefix("k")).upper() for word in found.pop(table.__name__)]
        assert words == [word.name for word in table] and list(table) == list(range(len(table)))
    assert found == {name: getattr(layout, name) for name in ("ADDRESSES", "NEW_STATE", "NEW_AVERAGE", "NO_MEMORY")}


@pytest.mark.parametrize("name", EVERY)
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


def stepped(rule, engine, name="LAMB"):
    """A step of an optimizer with another rule."""
    optimizer = type(name, (getattr(fusedopt, name),), {"rule": rule})(
        [torch.nn.Parameter(torch.ones(3))], engine=engine
    )
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()


def test_a_rule_whose_names_are_not_its_kernels_is_refused(engine):
    if engine == "eager":
        pytest.skip("it has no kernels")

    class Other(fusedopt.LAMB.rule):
        measures = ()

    with pytest.raises(RuntimeError, match="its kernel has the measures"):
        stepped(Other, engine)


def test_values_that_a_rule_leaves_out_and_scopes_that_there_are_not():
    class Fewer(fusedopt.LAMB.rule):
        @staticmethod
        def measure(p, g, state, c):
            return (p,)

    class Scoped(fusedopt.LAMB.rule):
        scopes = ("row",)

    with pytest.raises(TypeError, match="Fewer.measure returned 1 values"):
        stepped(Fewer, "eager")
    with pytest.raises(ValueError, match="Scoped.scopes has row"):
        stepped(Scoped, "eager")
