"""Averages of the weights, and options of groups: what they are used for, and what is refused."""

import copy
import io
import pickle

import conftest  # noqa: F401, where ranks import this they need its engines
import numpy as np
import pytest
import torch
from helpers import assert_same, close, copies, fill_gradients, params, same_gradients, snapshot
from sharding import mesh_of, placed, whole
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt

SHAPES = (4, 3), (5,), ()
EMA, LOOKAHEAD = fusedopt.EMA(0.9), fusedopt.Lookahead(2, 0.5)


def made(engine="auto", average=EMA, name="AdamW", dtype=torch.float32, **options):
    parameters = params(*SHAPES, dtype=dtype)
    return parameters, getattr(fusedopt, name)(parameters, lr=0.1, average=average, engine=engine, **options)


def steps(optimizer, parameters, n):
    for _ in range(n):
        fill_gradients(parameters)
        optimizer.step()


def test_ema_is_torchs_average(engine):
    """AveragedModel, updated after each step."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    o = fusedopt.AdamW(model.parameters(), lr=0.1, average=EMA, engine=engine)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(5):
        fill_gradients(list(model.parameters()))
        o.step()
        theirs.update_parameters(model)
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        close(o.average_of(p), q)
    with o.averaged():
        theirs.module.load_state_dict(model.state_dict())  # the recipe of docs/averages.md
    for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(o.average_of(p), q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("average", [EMA, LOOKAHEAD], ids=str)
def test_parameters_hold_their_averages_and_get_their_bits_back(engine, average, dtype):
    parameters, o = made(engine, average, dtype=dtype)
    steps(o, parameters, 3)
    before = snapshot(o)
    with o.averaged():
        for p in parameters:
            assert torch.equal(p, o.average_of(p).to(dtype))
            assert o.average_of(p).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_same(snapshot(o), before)
    with pytest.raises(ZeroDivisionError), o.averaged():
        1 / 0  # noqa: B018
    assert_same(snapshot(o), before)
    steps(o, parameters, 1)


def test_what_is_refused_inside_and_without_an_average():
    parameters, o = made()
    steps(o, parameters, 1)
    with o.averaged():
        with pytest.raises(RuntimeError, match="a step inside of averaged"):
            o.step()
        with pytest.raises(RuntimeError, match="averages already"), o.averaged():
            pass
    o.step()
    plain = fusedopt.AdamW(parameters)
    with pytest.raises(RuntimeError, match="no group"), plain.averaged():
        pass
    with pytest.raises(ValueError, match="keeps no average"):
        plain.average_of(parameters[0])
    with pytest.raises(ValueError, match="none of this optimizer"):
        o.average_of(torch.ones(2))


def test_before_its_first_step_a_parameter_is_its_average(engine):
    parameters, o = made(engine)
    assert torch.equal(o.average_of(parameters[0]), parameters[0]) and not o.state
    with o.averaged():
        pass
    fill_gradients(parameters[:1])
    o.step()
    for p in parameters:
        assert torch.equal(o.average_of(p), p)


def test_groups_with_and_without(engine):
    a = params(*SHAPES)
    groups = [{"params": a[:1]}, {"params": a[1:2], "average": None}, {"params": a[2:], "average": LOOKAHEAD}]
    o = fusedopt.AdamW(groups, average=EMA, engine=engine)
    steps(o, a, 3)
    assert [sorted(set(o.state[p]) & {"ema", "slow"}) for p in a] == [["ema"], [], ["slow"]]
    with o.averaged():
        assert torch.equal(a[0], o.state[a[0]]["ema"]) and torch.equal(a[2], o.state[a[2]]["slow"])


def test_options_change_between_steps(engine):
    """Off, on with a rate of its own for each step, and then another average; none forgets what the rule has."""
    parameters, o = made(engine, None, "SGD", momentum=0.9)
    plain = copies(parameters)
    b = torch.optim.SGD(plain, lr=0.1, momentum=0.9)

    def step():
        same_gradients(plain, parameters)
        o.step()
        b.step()
        for p, q in zip(parameters, plain, strict=True):
            close(p, q)

    step()
    truth = None
    for decay in (0.5, 0.9, 0.99):
        o.param_groups[0]["average"] = fusedopt.EMA(decay)
        step()
        value = plain[0].detach().clone()
        truth = value if truth is None else decay * truth + (1 - decay) * value
        close(o.average_of(parameters[0]), truth)
    o.param_groups[0]["average"] = ("lookahead", 1, 0.0)
    start = plain[0].detach().clone()
    same_gradients(plain, parameters)
    o.step()
    close(parameters[0], start)  # put back at once
    o.param_groups[0].update(average=None)
    before = parameters[0].detach().clone()
    steps(o, parameters, 1)
    assert not torch.equal(before, parameters[0])


def test_parameters_count_their_own_steps(engine):
    parameters, o = made(engine, fusedopt.Lookahead(3, 0.5), "SGD")
    slow = [p.detach().clone() for p in parameters]
    fast = [p.detach().clone() for p in parameters]
    counts = [0] * 3
    for t in range(9):
        for i, p in enumerate(parameters):
            p.grad = None if (t + i) % (i + 2) == 0 else torch.randn_like(p)
            if p.grad is not None:
                counts[i] += 1
                fast[i] = fast[i] - 0.1 * p.grad
                if counts[i] % 3 == 0:
                    slow[i] = fast[i] = slow[i] + 0.5 * (fast[i] - slow[i])
        o.step()
        for p, q in zip(parameters, fast, strict=True):
            close(p, q)
    assert [int(o.state[p]["step"]) for p in parameters] == counts


@pytest.mark.parametrize("average", [EMA, LOOKAHEAD], ids=str)
def test_a_skipped_step_averages_nothing(engine, average):
    parameters, o = made(engine, average, skip_nonfinite=True)
    fill_gradients(parameters)
    parameters[1].grad[0] = float("nan")
    o.step()
    assert o.skipped_steps == 1 and not o.state
    steps(o, parameters, 3)
    before = snapshot(o)
    parameters[1].grad[0] = float("inf")
    o.step()
    assert_same(snapshot(o), before)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "LAMB"])
@pytest.mark.parametrize("average", [EMA, LOOKAHEAD], ids=str)
def test_resume_of_options_is_bit_exact(engine, name, average):
    asked = {"gradient_noise": fusedopt.GradientNoise(0.1, seed=3), "cautious_weight_decay": name == "AdamW"}
    a, o = made(engine, average, name, **asked)
    steps(o, a, 3)
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    b = copies(a)
    again = getattr(fusedopt, name)(b, lr=0.5, engine=engine)
    again.load_state_dict(torch.load(file))  # weights only: nothing of ours is needed to read it
    assert again.param_groups[0]["average"] == average
    for _ in range(3):
        same_gradients(a, b)
        o.step()
        again.step()
    assert_same(snapshot(again), snapshot(o))


def test_checkpoints_from_torch_and_to_torch():
    parameters, o = made()
    theirs = torch.optim.AdamW(copies(parameters), lr=0.1)
    fill_gradients(theirs.param_groups[0]["params"])
    theirs.step()
    o.load_state_dict(theirs.state_dict())
    assert o.param_groups[0]["average"] == EMA
    steps(o, parameters, 1)
    for p in parameters:
        assert torch.equal(o.average_of(p), p)
    theirs.load_state_dict(o.state_dict())
    assert made(average=None)[1].state_dict()["param_groups"][0].keys() <= theirs.param_groups[0].keys() | {"fused"}


def test_copies_and_pickles_go_on():
    parameters, o = made(gradient_noise=fusedopt.GradientNoise(0.1))
    steps(o, parameters, 2)
    for other in (copy.deepcopy(o), pickle.loads(pickle.dumps(o))):
        assert other.param_groups[0]["average"] == EMA
        copies = other.param_groups[0]["params"]
        for p, q in zip(parameters, copies, strict=True):
            assert torch.equal(other.average_of(q), o.average_of(p))
        steps(other, copies, 1)


def test_fused_optimizers_can_average(engine):
    parameters = params(*SHAPES)
    old = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    steps(old, parameters, 1)
    o = fusedopt.fuse(old, engine=engine)
    o.param_groups[0]["average"] = EMA
    steps(o, parameters, 1)
    for p in parameters:
        assert torch.equal(o.average_of(p), p)


def test_in_backward():
    a = params((4,))
    b = copies(a)
    ours = fusedopt.SGD(a, lr=0.1, average=LOOKAHEAD)
    alone = fusedopt.SGD(b, lr=0.1, average=LOOKAHEAD)
    fusedopt.step_in_backward(ours)
    for _ in range(3):
        (a[0] ** 2).sum().backward()
        (b[0] ** 2).sum().backward()
        alone.step()
        alone.zero_grad()
    assert torch.equal(a[0], b[0]) and torch.equal(ours.average_of(a[0]), alone.average_of(b[0]))


def test_gradients_flow_through_a_step_with_an_average():
    lr = torch.tensor(0.1, requires_grad=True)
    leaf = torch.ones(3, requires_grad=True)
    p = leaf.clone()
    p.retain_grad()
    p.grad = torch.full((3,), 2.0)
    o = fusedopt.SGD([p], lr=lr, differentiable=True, average=fusedopt.Lookahead(1, 0.5))
    o.step()
    p.sum().backward()
    close(lr.grad, torch.tensor(-3.0))  # half of what it is without
    close(leaf.grad, torch.full((3,), 0.5))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: fusedopt.EMA(1.5), ValueError, "decay of EMA"),
        (lambda: fusedopt.EMA(float("nan")), ValueError, "decay of EMA"),
        (lambda: fusedopt.EMA("a"), TypeError, "decay of EMA"),
        (lambda: fusedopt.Lookahead(0), ValueError, "k of Lookahead"),
        (lambda: fusedopt.Lookahead(2.5), ValueError, "whole"),
        (lambda: fusedopt.Lookahead(5, -1), ValueError, "alpha"),
        (lambda: fusedopt.GradientNoise(-1), ValueError, "eta"),
        (lambda: fusedopt.GradientNoise(1, -1), ValueError, "gamma"),
        (lambda: fusedopt.GradientNoise(1, seed=-1), ValueError, "seed"),
        (lambda: fusedopt.GradientNoise(1, seed=1.5), TypeError, "seed"),
        (lambda: made(average=0.9), TypeError, "average .group 0. is 0.9"),
        (lambda: made(average=("ema", 2.0)), ValueError, "decay"),
        (lambda: made(average=("ema",)), TypeError, "average .group 0."),
        (lambda: made(gradient_noise=0.1), TypeError, "gradient_noise .group 0."),
        (lambda: made(cautious_weight_decay=1), TypeError, "cautious_weight_decay .group 0."),
        (lambda: made(name="Adam", cautious_weight_decay=True), ValueError, "decoupled_weight_decay=True"),
        (lambda: made(name="Adamax", cautious_weight_decay=True), ValueError, "'adamax' does not have"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_cautious_decay_stays_decoupled(engine):
    parameters, o = made(engine, name="Adam", decoupled_weight_decay=True, cautious_weight_decay=True)
    steps(o, parameters, 1)
    before = [p.detach().clone() for p in parameters]
    o.param_groups[0]["decoupled_weight_decay"] = False
    with pytest.raises(ValueError, match="cautious_weight_decay.*decoupled_weight_decay=True"):
        steps(o, parameters, 1)
    assert all(map(torch.equal, parameters, before))


def test_a_bad_group_is_not_added():
    parameters, o = made()
    with pytest.raises(TypeError, match="group 1"):
        o.add_param_group({"params": params((2,)), "average": "often"})
    assert len(o.param_groups) == 1
    o.add_param_group({"params": params((2,)), "average": ["lookahead", 3, 0.5]})
    assert o.param_groups[1]["average"] == fusedopt.Lookahead(3, 0.5)


def sharded(engine):
    from torch.distributed.tensor import Shard

    mesh = mesh_of(2)
    for average in (EMA, LOOKAHEAD):
        wholes = params((5, 3), (4, 4))
        parts = [nn.Parameter(placed(p.detach(), (mesh, [Shard(k)]))) for k, p in enumerate(wholes)]
        asked = {"average": average, "gradient_noise": fusedopt.GradientNoise(0.1), "cautious_weight_decay": True}
        a = fusedopt.AdamW(parts, lr=0.1, weight_decay=0.1, max_grad_norm=1.0, engine=engine, **asked)
        b = fusedopt.AdamW(wholes, lr=0.1, weight_decay=0.1, max_grad_norm=1.0, engine="eager", **asked)
        for _ in range(4):
            for k, (p, q) in enumerate(zip(parts, wholes, strict=True)):
                q.grad = torch.randn_like(q)
                p.grad = placed(q.grad, (mesh, [Shard(k)]))
            a.step()
            b.step()
        for p, q in zip(parts, wholes, strict=True):
            close(whole(p), q.detach(), 1e-5)
            assert a.average_of(p).placements == p.placements
            close(whole(a.average_of(p)), b.average_of(q), 1e-5)
        before = [whole(p).clone() for p in parts]
        with a.averaged():
            for p in parts:
                assert torch.equal(whole(p), whole(a.average_of(p)))
        assert all(torch.equal(whole(p), q) for p, q in zip(parts, before, strict=True))


@pytest.mark.xdist_group("ranks")
def test_sharded_as_unsharded(ranks, engine):
    ranks.run(2, sharded, engine)


def test_parameters_that_share_memory_get_their_bits_back():
    p = nn.Parameter(torch.ones(3))
    q = nn.Parameter(p.detach())
    o = fusedopt.AdamW([p, q], lr=0.1, average=EMA)
    steps(o, [p, q], 3)
    before = p.detach().clone()
    with o.averaged():
        pass
    assert torch.equal(p, before)


def test_a_backward_pass_that_steps_is_refused_inside():
    a = params((4,))
    o = fusedopt.SGD(a, lr=0.1, average=EMA)
    fusedopt.step_in_backward(o)
    (a[0] ** 2).sum().backward()
    with o.averaged(), pytest.raises(RuntimeError, match="a step inside of averaged"):
        (a[0] ** 2).sum().backward()


@pytest.mark.parametrize("average", [None, EMA], ids=str)
@pytest.mark.parametrize("flat", [False, True])
def test_distributed_checkpoints(average, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    o = fusedopt.AdamW(model.parameters(), lr=0.1, average=average)
    steps(o, list(model.parameters()), 2)
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(model, o, options=how)
    again = fusedopt.AdamW(other.parameters(), lr=0.5, average=average)
    set_optimizer_state_dict(other, again, saved, options=how)
    assert again.param_groups[0]["lr"] == 0.1 and again.param_groups[0].get("average") == average
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_same(dict(o.state[p]), dict(again.state[q]))


def test_numbers_of_numpy_become_pythons():
    parameters, o = made(
        average=fusedopt.EMA(np.float64(0.9)), gradient_noise=fusedopt.GradientNoise(1, seed=np.int64(3))
    )
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["param_groups"][0]["gradient_noise"] == ("gaussian", 1, 0.55, 3)
