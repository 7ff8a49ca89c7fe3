"""Parameters that are stepped during the backward pass, and sets of groups that take turns."""

import copy
import gc
import signal
import warnings
import weakref

import pytest
import torch
from conftest import AVAILABLE
from helpers import ALL, assert_same, close, fill_gradients, params, snapshot
from torch import nn

import fusedopt
from fusedopt import planner
from fusedopt.stepper import Stepper


def model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))


def loss(module, t):
    torch.manual_seed(10 + t)
    return (module(torch.randn(6, 5)) - torch.randn(6, 1)).square().mean()


def build(name, module, engine):
    weights, biases = ([p for p in module.parameters() if (p.dim() > 1) == is_weight] for is_weight in (True, False))
    groups = [{"params": weights, "lr": 0.02}, {"params": biases, "weight_decay": 0.1}]
    cls = getattr(fusedopt, name)
    return cls(groups, engine=engine, **({"scope": "tensor"} if "tensor" in cls.rule.scopes[1:] else {}))


@pytest.mark.parametrize("name", [name for name in ALL if not getattr(fusedopt, name).steps_together])
def test_steps_are_those_of_step(engine, name):
    """To the last bit, with a schedule, a checkpoint in the middle, and steps of the ordinary kind after remove()."""
    ours, theirs = model(), model()
    a, b = build(name, ours, engine), build(name, theirs, engine)
    handle = fusedopt.step_in_backward(a)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7) for optimizer in (a, b)]
    for t in range(7):
        if t == 5:
            handle.remove()
        for module, optimizer, schedule in ((ours, a, schedules[0]), (theirs, b, schedules[1])):
            optimizer.zero_grad()
            loss(module, t).backward()
            assert all((p.grad is None) == (optimizer is a and t < 5) for p in module.parameters())
            optimizer.step()
            schedule.step()
        if t == 2:
            saved = copy.deepcopy(a.state_dict())
            names = [{k: list(v) for k, v in s["state"].items() if v} for s in (saved, b.state_dict())]
            assert names[0] == names[1]
            a.load_state_dict(saved)
    assert_same(snapshot(a), snapshot(b))


def test_what_needs_all_gradients_is_refused():
    module = model()
    for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
        with pytest.raises(RuntimeError, match=f"{next(iter(options))}=.* needs all gradients at once"):
            fusedopt.step_in_backward(fusedopt.AdamW(module.parameters(), **options))
    with pytest.raises(ValueError, match=r"differentiable=True \(group 0\)"):
        fusedopt.step_in_backward(fusedopt.AdamW(module.parameters(), differentiable=True))
    with pytest.raises(TypeError, match="Adam is no fused optimizer"):
        fusedopt.step_in_backward(torch.optim.Adam(module.parameters()))
    optimizer = fusedopt.AdamW(module.parameters())
    handle = fusedopt.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        fusedopt.step_in_backward(optimizer)
    before = snapshot(optimizer)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="max_grad_norm=1.0 needs all gradients"):
        loss(module, 0).backward()
    assert_same(snapshot(optimizer), before)
    optimizer.max_grad_norm = None
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="GradScaler needs all gradients"):
        scaler.step(optimizer)
    handle.remove()
    again = fusedopt.step_in_backward(optimizer)
    handle.remove()  # which is over
    with pytest.raises(RuntimeError, match="already"):
        fusedopt.step_in_backward(optimizer)
    again.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twice = fusedopt.SGD([module[0].bias] * 2)
    with pytest.raises(ValueError, match="given twice"):
        fusedopt.step_in_backward(twice)
    module.zero_grad()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss(module, 0)).backward()
    scaler.step(optimizer)
    assert all(p.grad is not None for p in module.parameters())


def test_parameters_without_a_hook_are_stepped_by_step():
    """Those that were added, and those that required no gradient."""
    module = model()
    module[0].bias.requires_grad_(False)
    optimizer = fusedopt.SGD(module.parameters(), lr=1.0)
    handle = fusedopt.step_in_backward(optimizer)
    module[0].bias.requires_grad_(True)
    (extra,) = params((3,))
    optimizer.add_param_group({"params": [extra]})
    (loss(module, 0) + extra.sum()).backward()
    before = extra.detach().clone()
    assert module[0].bias.grad is not None and extra.grad is not None and module[0].weight.grad is None
    optimizer.step()
    assert torch.equal(extra, before - 1)
    handle.remove()


def test_names_in_messages_are_those_of_the_parameters():
    module = model()
    optimizer = fusedopt.AdamW(module.named_parameters())
    fusedopt.step_in_backward(optimizer)
    optimizer.state[module[2].bias]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="'2.bias'"):
        loss(module, 0).backward()


def counted(monkeypatch):
    made = []
    original = planner.plan
    monkeypatch.setattr(planner, "plan", lambda *a: made.append(1) or original(*a))
    return made


def test_groups_that_take_turns_are_planned_once_each(engine, monkeypatch):
    """As DeepSpeed does it: each group alone in the place of all, in a list of its own."""
    ours = params((7,), (5, 3), (40,), (2,))
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    a = fusedopt.AdamW([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(ours)], engine=engine)
    b = torch.optim.AdamW([{"params": [p], "lr": 0.01 * (i + 1)} for i, p in enumerate(theirs)])
    everything, made = a.param_groups, counted(monkeypatch)
    for t in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for group in everything:
            group["lr"] *= 0.9
            a.param_groups = [group]
            a.step()
        a.param_groups = everything
        for group in b.param_groups:
            group["lr"] *= 0.9
        b.step()
        if t == 1:
            settled = len(made)
    assert len(made) == settled
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
    fill_gradients(ours)
    a.step()
    assert len(made) == settled + 1 and all(a.state[p]["step"] == 7 for p in ours)


def test_plans_of_groups_that_are_gone_are_let_go():
    (p,), (q,) = params((3,)), params((4,))
    optimizer = fusedopt.SGD([p], momentum=0.9)
    fill_gradients([p, q])
    optimizer.step()
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [q]}]
    optimizer.state.pop(p)
    gone = weakref.ref(p)
    del p
    for _ in range(10):
        optimizer.step()
    gc.collect()
    assert gone() is None


def test_plans_of_groups_that_are_made_anew_do_not_pile_up():
    (p,) = params((3,))
    optimizer = fusedopt.AdamW([p])
    fill_gradients([p])
    for _ in range(5):
        optimizer.param_groups = [dict(optimizer.param_groups[0])]
        optimizer.step()
    assert len(optimizer._stepper.plans._by_groups) == 1 and optimizer.state[p]["step"] == 5


def test_without_the_handle_nothing_stays_alive():
    module = model()
    optimizer = fusedopt.AdamW(module.parameters())
    fusedopt.step_in_backward(optimizer)
    loss(module, 0).backward()
    gone = [weakref.ref(optimizer), *map(weakref.ref, module.parameters())]
    del module, optimizer
    gc.collect()
    assert all(reference() is None for reference in gone)


def test_an_interrupt_leaves_whole_steps(monkeypatch):
    """Also the first one, whose state is made."""
    module = model()
    optimizer = fusedopt.AdamW(module.parameters())
    fusedopt.step_in_backward(optimizer)
    seen = []

    def interrupted(*arguments, step=Stepper.step):
        told = step(*arguments)
        seen.append(1)
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)
        return told

    monkeypatch.setattr(Stepper, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss(module, 0).backward()
    done = [p for p in module.parameters() if p in optimizer.state]
    assert len(done) == 1 and done[0].grad is None and optimizer.state[done[0]]["step"] == 1


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
def test_a_parameter_alone_is_planned_once(monkeypatch):
    module, made = model(), counted(monkeypatch)
    optimizer = fusedopt.AdamW(module.parameters())
    fusedopt.step_in_backward(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for t in range(5):
            loss(module, t).backward()
    assert len(made) == 6
