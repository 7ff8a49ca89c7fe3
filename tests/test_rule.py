"""What a rule says of weight decay, of what scales its direction, and of its scalars."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import close, params

import fusedopt
from fusedopt import checks
from fusedopt.codecs import dequantized
from fusedopt.operands import Q8_SIGNED
from fusedopt.rule import COUPLED, DECOUPLED, LR, PARAM, RULE, WEIGHT_DECAY, Hyper, Rule, State, StepScale
from fusedopt.state import initial_state

LR_, DECAY, GRADIENT = 0.1, 0.5, 3.0


def step(*, lr=LR_, flag=None, **says):
    """The parameters before and after one step of ``d = g``, or whatever else a rule says of itself."""

    class Plain(Rule):
        name = "plain"
        prepare = staticmethod(lambda h, s, new_state: SimpleNamespace(**vars(h), **vars(s)))
        direction = staticmethod(lambda p, g, state, c: (g, {}))

    for key, value in says.items():
        setattr(Plain, key, value)

    class Mine(fusedopt.FusedOptimizer):
        rule = Plain

    common = fusedopt.SGD(params((1,))).defaults
    defaults = {key: common[key] for key in ("maximize", "foreach", "fused", "capturable", "differentiable")}
    if WEIGHT_DECAY in (*Plain.engine_hyper(), *Plain.hyper):
        defaults["weight_decay"] = DECAY
    if flag is not None:
        defaults["decoupled_weight_decay"] = flag
    ps = params((5,))
    before = ps[0].detach().clone()
    ps[0].grad = torch.full((5,), GRADIENT)
    optimizer = Mine(ps, {"lr": lr, **defaults})
    assert optimizer.param_groups[0].keys() == {"params", "lr", *defaults}
    optimizer.step()
    return before, ps[0].detach(), optimizer


@pytest.mark.parametrize(
    ("says", "is_decoupled"),
    [
        ({"decay": COUPLED}, False),
        ({"decay": DECOUPLED}, True),
        ({"decay": "decoupled_weight_decay", "flag": False}, False),
        ({"decay": "decoupled_weight_decay", "flag": True}, True),
    ],
    ids=str,
)
@pytest.mark.parametrize("scale", StepScale)
def test_decay_and_step_scale(says, is_decoupled, scale):
    p, stepped, _ = step(step_scale=scale, **says)
    by = LR_ if scale is StepScale.LR else 1
    close(stepped, p - LR_ * DECAY * p - by * GRADIENT if is_decoupled else p - by * (GRADIENT + DECAY * p))


@pytest.mark.parametrize("lr", [LR_, 0.0])
def test_rule_without_decay(lr):
    p, stepped, _ = step(decay=RULE, lr=lr)
    close(stepped, p - lr * GRADIENT)
    p, stepped, _ = step(decay=RULE, lr=lr, step_scale=StepScale.ONE)
    close(stepped, p - GRADIENT)


def test_rule_that_decays_by_itself():
    direction = staticmethod(lambda p, g, state, c: (g + c.lr * c.weight_decay * p, {}))
    p, stepped, _ = step(decay=RULE, hyper=(LR, WEIGHT_DECAY), direction=direction)
    close(stepped, p - LR_ * (GRADIENT + LR_ * DECAY * p))


def test_scalar_that_starts_as_the_group_says():
    _, _, optimizer = step(decay=RULE, scalars={"step": 0.0, "rate": "lr"}, lr=torch.tensor(0.25))
    (state,) = optimizer.state.values()
    assert list(state) == ["step", "rate"] and state["step"] == 1 and state["rate"] == 0.25


def test_scalars_begin_with_the_step():
    with pytest.raises(TypeError, match="the first of Wrong.scalars is 'level'; it must be 'step'"):
        type("Wrong", (Rule,), {"scalars": {"level": 0.0, "step": 0.0}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_state_that_starts_as_the_parameter(dtype, exact):
    class Remembers(Rule):
        states = (State("first", init=PARAM, exact=exact),)
        prepare = direction = None

    p = torch.nn.Parameter(torch.randn(64, 130).to(dtype).t())
    first = initial_state(Remembers, p, {})["first"]
    assert first.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype) and not first.requires_grad
    assert torch.equal(first, p.to(first.dtype)) and first.stride() == p.stride()
    assert first.data_ptr() != p.data_ptr()
    if dtype == torch.bfloat16:
        made = initial_state(Remembers, p, {"state_dtype": "8bit"})
        values = made["first"] if exact else dequantized(made["first"], made["first_scale"], Q8_SIGNED)
        close(values, p.float(), 1e-9 if exact else 0.03)


def test_domain_with_infinity():
    limit, number = Hyper("limit", low=1.0, infinite=True), Hyper("number", low=1.0)
    assert (limit.domain, number.domain) == ("[1, inf]", "[1, inf)")
    for value in (1.0, 1e300, math.inf):
        checks.hyperparameter(limit, 0, {"limit": value, "params": params((1,))}, "")
    for hyper, value in ((limit, 0.5), (limit, math.nan), (number, math.inf), (number, 1e300)):
        with pytest.raises(ValueError, match=hyper.name):
            checks.hyperparameter(hyper, 0, {hyper.name: value, "params": params((1,))}, "")
