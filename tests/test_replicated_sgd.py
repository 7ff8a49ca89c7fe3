"""ReplicatedSGD: as loops over copies of a model, and what it must do as an optimizer."""

import copy
import math

import pytest
import torch
from helpers import assert_same, close, copies, fill_gradients, params, snapshot
from torch import nn

import fusedopt
from fusedopt import noise

SHAPES = ((3, 31), (3, 5, 4), (3,), (3, 0))
OPTIONS = {"lr": 0.1, "weight_decay": 0.05, "replicas": 3, "gamma0": 0.4, "gamma1": 0.2}
MOMENTA = [{}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.8, "nesterov": True}]


def built(ps, **options):
    return fusedopt.ReplicatedSGD(ps, **{**OPTIONS, **options})


def textbook(stacked, gradients, h):
    """Each copy by itself, in lists: ``w <- w - lr (momentum of g + wd w + gamma_t (w - mean))``."""
    copies_of = [list(p.detach().clone().unbind()) for p in stacked]
    buffers = [[None] * h["replicas"] for _ in stacked]
    for t, step in enumerate(gradients):
        gamma = h["gamma0"] * (1 + h["gamma1"]) ** t
        for k, ws in enumerate(copies_of):
            if step[k] is None:
                continue
            mean, new = sum(ws) / len(ws), []
            for a, w in enumerate(ws):
                d = step[k][a] + h["weight_decay"] * w + gamma * (w - mean)
                if momentum := h.get("momentum", 0.0):
                    b = buffers[k][a]
                    buffers[k][a] = b = d if b is None else momentum * b + (1 - h.get("dampening", 0.0)) * d
                    d = d + momentum * b if h.get("nesterov") else b
                new.append(w - h["lr"] * d)
            copies_of[k] = new
    return [torch.stack(ws) for ws in copies_of]


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_as_loops_over_copies(engine, momentum):
    """With gradients that are missing, and a resume in the middle."""
    ps = params(*SHAPES, dtype=torch.float64)
    gradients = [[None if (t + k) % 5 == 4 else torch.randn_like(p) for k, p in enumerate(ps)] for t in range(9)]
    expected = textbook(ps, gradients, {**OPTIONS, **momentum})
    optimizer = built(ps, engine=engine, **momentum)
    for t, step in enumerate(gradients):
        if t == 4:
            saved = copy.deepcopy(optimizer.state_dict())
            assert "gamma" not in saved["param_groups"][0]
            optimizer = built(ps, engine=engine, **momentum)
            optimizer.load_state_dict(saved)
        for p, g in zip(ps, step, strict=True):
            p.grad = None if g is None else g.clone()
        optimizer.step()
    for p, w in zip(ps, expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.mean_of(p), w.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", MOMENTA, ids=str)
def test_one_replica_is_sgd(engine, momentum):
    a = params((31,), (5, 4), (), (0,))
    b = copies(a)
    ours = built(a, replicas=1, engine=engine, **momentum)
    other = fusedopt.SGD(b, lr=0.1, weight_decay=0.05, engine=engine, **momentum)
    for _ in range(4):
        fill_gradients(a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        ours.step(), other.step()
    assert_same([p.detach() for p in a], [q.detach() for q in b])
    assert_same(ours.mean_of(a[2]), a[2].detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("after", [1, 3])
def test_resumes_to_the_last_bit(engine, after, dtype):
    a = params(*SHAPES, dtype=dtype)
    b = copies(a)
    ours, other = built(a, momentum=0.9, engine=engine), built(b, momentum=0.9, engine=engine)
    for t in range(6):
        if t == after:
            saved = copy.deepcopy(other.state_dict())
            other = built(b, momentum=0.9, engine=engine)
            other.load_state_dict(saved)
        fill_gradients(a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        ours.step(), other.step()
    assert_same([p.detach() for p in a], [q.detach() for q in b])
    assert_same(snapshot(ours), snapshot(other))


def test_masters_are_what_is_drawn_together(engine):
    """A run of halves with masters is one of float32; its mean is that of masters."""
    a = [nn.Parameter(p.detach().bfloat16().float()) for p in params((3, 40), (3, 5, 4))]
    b = [nn.Parameter(p.detach().bfloat16()) for p in a]
    ours, halves = built(a, engine=engine), built(b, master="fp32", engine=engine)
    for _ in range(5):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float()
        ours.step(), halves.step()
    for p, q in zip(a, b, strict=True):
        assert_same(halves.state[q]["master"], p.detach())
        assert_same(halves.mean_of(q), ours.mean_of(p))


def test_mean_of_halves_is_float32(engine):
    ps = params((3, 40), dtype=torch.bfloat16)
    optimizer = built(ps, engine=engine)
    close(optimizer.mean_of(ps[0]), ps[0].detach().float().mean(0))
    with pytest.raises(ValueError, match="in none of this optimizer's groups"):
        optimizer.mean_of(params((3,))[0])


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_that_does_not_happen_leaves_nothing(engine, history, momentum):
    """Neither one that is skipped nor one that raises makes a center."""
    ps = params(*SHAPES)
    optimizer = built(ps, momentum=momentum, skip_nonfinite=True, engine=engine)
    for _ in range(history):
        fill_gradients(ps)
        optimizer.step()
    before = snapshot(optimizer)
    fill_gradients(ps)
    ps[1].grad[0] = math.nan
    optimizer.step()
    assert_same(snapshot(optimizer), before)
    told = engine in ("cuda", "triton") and history > 0  # by the device alone: the host has counted it
    assert optimizer.skipped_steps == 1 and optimizer.param_groups[0]["steps"] == history + told
    fill_gradients(ps)
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises((TypeError, ValueError)):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.param_groups[0]["steps"] == history + told


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((3, 2), (2, 2)), {}, r"parameter 1 has shape \(2, 2\); dimension 0 must be the 3 replicas"),
        (((),), {}, r"parameter 0 has shape \(\); dimension 0 must be the 3 replicas"),
        (((3,),), {"replicas": 0}, "replicas"),
        (((3,),), {"replicas": 1.5}, "replicas .group 0. is 1.5; it must be a whole number"),
        (((3,),), {"gamma0": -1.0}, "gamma0"),
        (((3,),), {"differentiable": True}, "differentiable=True is not for replicas"),
        (((3,),), {"nesterov": True}, "nesterov"),
    ],
)
def test_refuses(shapes, options, message):
    with pytest.raises(ValueError, match=message):
        built(params(*shapes), **options)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("replicas", 2, r"parameter 0 has shape \(3, 2\); dimension 0 must be the 2 replicas"),
        ("replicas", 1.5, "replicas .group 0. is 1.5; it must be a whole number"),
        ("replicas", "x", "replicas .group 0. is 'x'"),
        ("gamma0", "x", "gamma0 .group 0. is 'x'"),
        ("gamma0", -1.0, "gamma0 .group 0. is -1.0"),
        ("gamma1", -0.5, "gamma1 .group 0. is -0.5"),
    ],
)
def test_options_that_become_wrong_are_named(engine, key, value, message):
    """Whatever the engine reads itself; nothing has changed then."""
    ps = params((3, 2))
    optimizer = built(ps, engine=engine)
    for _ in range(2):
        fill_gradients(ps)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0][key] = value
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_a_center_that_is_not_its_own_is_named(engine):
    ps = params((3, 2))
    optimizer = built(ps, engine=engine)
    fill_gradients(ps)
    optimizer.step()
    optimizer.state[ps[0]]["center"] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"state 'center' of parameter 0 of group 0"):
        optimizer.step()


def test_groups_count_together(engine):
    a, b = params((3, 2), (3, 4))
    optimizer = built([a], gamma1=1.0, engine=engine)
    for _ in range(3):
        fill_gradients([a])
        optimizer.step()
    optimizer.add_param_group({"params": [b]})
    fill_gradients([a, b])
    optimizer.step()
    assert [group["gamma"] for group in optimizer.param_groups] == pytest.approx([3.2, 3.2])


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_what_is_given_twice_is_refused():
    (p,) = params((3, 2))
    with pytest.raises(ValueError, match="a parameter is given twice, whose replicas have one mean"):
        built([p, p])


def test_cannot_step_in_backward(engine):
    with pytest.raises(RuntimeError, match="finds the means of replicas before it steps"):
        fusedopt.step_in_backward(built(params((3, 2)), engine=engine))


def test_models_are_drawn_together(engine):
    """Stacked by torch.func: they learn, each from batches of its own, and come together as gamma grows."""
    models = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(3)]
    skeleton = copy.deepcopy(models[0]).to("meta")
    stacked, buffers = torch.func.stack_module_state(models)
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True).tanh()
    forward = torch.func.vmap(lambda p, b, x: torch.func.functional_call(skeleton, (p, b), (x,)))
    optimizer = fusedopt.ReplicatedSGD(
        stacked.values(), lr=0.1, momentum=0.5, replicas=3, gamma0=0.01, gamma1=0.05, engine=engine
    )

    def apart():
        return sum(float((p.detach() - optimizer.mean_of(p)).square().sum()) for p in stacked.values())

    before, losses = apart(), []
    for _ in range(100):
        picked = torch.randint(64, (3, 16))
        optimizer.zero_grad()
        loss = (forward(stacked, buffers, x[picked]) - y[picked]).square().mean((1, 2)).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])
    assert apart() < 0.05 * before


def test_each_replica_has_noise_of_its_own(engine):
    """By its elements' numbers in the whole stack; injected into a loop it is the same."""
    (p,) = ps = params((3, 40), dtype=torch.float64)
    start = p.detach().clone()
    optimizer = built(ps, weight_decay=0.0, gradient_noise=fusedopt.GradientNoise(0.09, 0.0, seed=3), engine=engine)
    gradients = []
    for t in range(4):
        p.grad = torch.randn_like(p)
        drawn = 0.3 * noise.normal(torch.arange(120), 0, t, (3, 0)).view(3, 40)
        assert not torch.equal(drawn[0], drawn[1])
        gradients.append([p.grad + drawn])
        optimizer.step()
    (expected,) = textbook([start], gradients, {**OPTIONS, "weight_decay": 0.0})
    torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)
