"""ASGD and Rprop, which scale their steps by themselves. The truth is torch.optim."""

import copy
import math

import pytest
import torch
from helpers import assert_same, close, pair, params, same_gradients, snapshot

import fusedopt

NAN, INF = float("nan"), float("inf")


def both(name, engine, shapes=((9,), (3, 4)), **options):
    """Ours and torch's, and what steps both on the same gradients."""
    ours, a, theirs, b = pair(shapes, name, engine=engine, **options)

    def step(gradients=None):
        same_gradients(ours, theirs, gradients)
        a.step(), b.step()

    return ours, a, theirs, b, step


def same_states(ours, a, theirs, b, tolerance=1e-6):
    for p, q in zip(ours, theirs, strict=True):
        close(p.detach(), q.detach(), tolerance)
        for key, value in b.state[q].items():
            close(a.state[p][key], value, tolerance)


# ------------------------------------------------------------------------------------------------------------- Rprop


def test_rprop_steps_whatever_lr_becomes(engine):
    ours, a, theirs, b, step = both("Rprop", engine, lr=0.25)
    for lr in (0.25, 0.0, 7.0, 0.0):
        before = ours[0].detach().clone()
        for optimizer in (a, b):
            optimizer.param_groups[0]["lr"] = lr
        step()
        assert not torch.equal(ours[0], before)
        assert_same(*([t.detach() for t in ts] for ts in (ours, theirs)))


def test_rprop_that_starts_from_nothing_takes_the_smallest_steps(engine):
    ours, a, *_, step = both("Rprop", engine, lr=0.0, step_sizes=(0.5, 2.0))
    before = [p.detach().clone() for p in ours]
    step([torch.ones_like(p) for p in ours])
    for p, q in zip(ours, before, strict=True):
        assert torch.equal(p, q - 0.5)


def test_rprop_has_no_weight_decay(engine):
    ours, a, _, b, step = both("Rprop", engine)
    step()
    assert a.state_dict()["param_groups"][0].keys() == b.param_groups[0].keys() | {"fused"}
    assert a.state_dict()["param_groups"][0].keys() == b.state_dict()["param_groups"][0].keys() | {"fused"}
    state = b.state_dict()
    a.load_state_dict(state)
    assert "weight_decay" not in a.param_groups[0] and "weight_decay" not in a.defaults
    step()
    live = torch.optim.Rprop(params((3,)))
    fused = fusedopt.fuse(live, engine=engine)
    fused.param_groups[0]["params"][0].grad = torch.ones(3)
    fused.step()
    assert "weight_decay" not in live.param_groups[0]


def test_rprop_takes_zeros_and_nan_as_torch_does(engine):
    ours, a, theirs, b, step = both("Rprop", engine, shapes=[(81,)], etas=(0.3, 1.7), step_sizes=(1e-3, 0.05))
    values = torch.tensor([1.0, -2.0, 0.0, -0.0, NAN, INF, -INF, 1e-30, 3.0])
    first, second = torch.meshgrid(values, values, indexing="ij")
    for t, gradient in enumerate((first, second, second, -first)):
        step([gradient.reshape(-1)])
        assert_same(ours[0].detach(), theirs[0].detach())
        for key in ("prev", "step_size"):
            assert_same(a.state[ours[0]][key], b.state[theirs[0]][key])
        assert a.state[ours[0]]["step"] == t + 1


def test_rprop_reads_its_pairs_in_every_step(engine):
    ours, a, theirs, b, step = both("Rprop", engine)
    for t in range(6):
        for optimizer in (a, b):
            optimizer.param_groups[0]["etas"] = [0.5 - 0.05 * t, 1.2 + 0.1 * t]
            optimizer.param_groups[0]["step_sizes"] = (1e-3 * t, 1 / (t + 1))
        step()
    same_states(ours, a, theirs, b)
    before = snapshot(a)
    for key, bad, named in (
        ("etas", (0.5, 1.0), r"etas\[1\] \(group 0\) is 1.0; it must lie in \(1, inf\)"),
        ("etas", (0.5, 1.2, 3.0), "etas .* must be a pair"),
        ("step_sizes", (NAN, 1.0), r"step_sizes\[0\]"),
    ):
        good = a.param_groups[0][key]
        a.param_groups[0][key] = bad
        with pytest.raises((TypeError, ValueError), match=named):
            a.step()
        a.param_groups[0][key] = good
        assert_same(snapshot(a), before)


# -------------------------------------------------------------------------------------------------------------- ASGD


@pytest.mark.parametrize("lr", [0.03, torch.tensor(0.03), torch.tensor(0.03, dtype=torch.float64)], ids=repr)
def test_asgd_starts_with_the_learning_rate_of_its_group(engine, lr):
    ours = params((3,), (4,), (5,))
    optimizer = fusedopt.ASGD([{"params": ours[:2]}, {"params": ours[2:], "lr": 0.5}], lr=lr, engine=engine)
    optimizer.param_groups[1]["lr"] = 0.25  # by a scheduler, before there is a state
    before = [p.detach().clone() for p in ours]
    for p in (ours[0], ours[2]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert list(optimizer.state[ours[0]]) == ["step", "eta", "mu", "ax"]
    for p, old, rate in ((ours[0], before[0], 0.03), (ours[2], before[2], 0.25)):
        close(p.detach(), (1 - 1e-4 * rate) * old - rate)
        state = optimizer.state[p]
        assert state["eta"].dtype == state["mu"].dtype == torch.float32
        assert math.isclose(state["eta"], rate / (1 + 1e-4 * rate) ** 0.75, rel_tol=1e-7) and state["mu"] == 1
    optimizer.param_groups[0]["lr"] = 0.125
    ours[1].grad = torch.ones_like(ours[1])  # its first step
    optimizer.step()
    close(ours[1].detach(), (1 - 1e-4 * 0.125) * before[1] - 0.125)


def test_asgd_follows_schedules_as_torch_does(engine):
    ours, a, theirs, b, step = both("ASGD", engine, lr=0.1, lambd=0.02, t0=3.0, weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8) for optimizer in (a, b)]
    for t in range(10):
        step([None if (t + i) % 4 == 3 else torch.randn_like(p) for i, p in enumerate(ours)])
        for schedule in schedules:
            schedule.step()
        same_states(ours, a, theirs, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_asgd_averages_what_comes_after_t0(engine, dtype):
    (p,) = params((11,), dtype=dtype)
    optimizer = fusedopt.ASGD([p], lr=0.1, lambd=0.1, t0=3, engine=engine)
    averaged = []
    for t in range(1, 10):
        p.grad = torch.randn_like(p)
        optimizer.step()
        if t <= 3 + 2:
            assert torch.equal(optimizer.state[p]["ax"], p)  # to the last bit
            averaged = [p.detach().clone()]
        else:
            averaged.append(p.detach().clone())
            close(optimizer.state[p]["ax"], torch.stack(averaged).mean(0))
    assert len(averaged) == 5


def test_asgd_average_of_what_is_infinite(engine):
    ours, a, theirs, b, step = both("ASGD", engine, shapes=[(3,)])
    step([torch.tensor([1.0, -INF, NAN])])
    assert a.state[ours[0]]["ax"][1] == INF
    torch.testing.assert_close(a.state[ours[0]]["ax"], b.state[theirs[0]]["ax"], equal_nan=True)


# -------------------------------------------------------------------------------------------------------------- both


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "exact"), [("ASGD", "ax"), ("Rprop", "step_size")])
def test_exact_states_are_never_narrow(engine, name, exact, half):
    """Not when they are made, nor when torch made them as narrow as the parameter."""
    live, saved = params((5,), dtype=half), params((5,), dtype=half)
    own = params((5,), dtype=half)
    optimizers = getattr(torch.optim, name)(live), getattr(torch.optim, name)(saved)
    for ps, optimizer in zip((live, saved), optimizers, strict=True):
        ps[0].grad = torch.ones_like(ps[0])
        optimizer.step()
        assert optimizer.state[ps[0]][exact].dtype == half
    narrow = optimizers[0].state[live[0]][exact].clone()
    loaded = getattr(fusedopt, name)(saved, engine=engine)
    loaded.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    assert torch.equal(loaded.state[saved[0]][exact], optimizers[1].state[saved[0]][exact].float())
    fused = fusedopt.fuse(optimizers[0], engine=engine)
    assert torch.equal(fused.state[live[0]][exact], narrow.float())
    for ps, optimizer in ((live, fused), (saved, loaded), (own, getattr(fusedopt, name)(own, engine=engine))):
        ps[0].grad = torch.ones_like(ps[0])
        optimizer.step()
        assert optimizer.state[ps[0]][exact].dtype == torch.float32


def test_adamax_remembers_nan_without_momentum(engine):
    ours, a, theirs, b, step = both("Adamax", engine, shapes=[(3,)], betas=(0.0, 0.9))
    for bad in (NAN, 1.0):
        step([torch.tensor([1.0, bad, -1.0])])
        assert_same(ours[0].isnan(), torch.tensor([False, True, False]))
        assert_same(a.state[ours[0]]["exp_inf"].isnan(), b.state[theirs[0]]["exp_inf"].isnan())
