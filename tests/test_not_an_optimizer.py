"""The programs of docs/not_an_optimizer.md do with these optimizers what they say: beside torch's, and by formulas.

Blocks are read from the page by their headings, so that neither goes on without the other. Those of gradients and
weights are in tests/test_not_an_optimizer_gradients.py.
"""

import copy
import functools
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from page_programs import HEADINGS, SECTIONS, Program, close, mean_square, sgd, textbook

import fusedopt


@pytest.mark.parametrize("heading", HEADINGS)
def test_programs_train_as_with_torch(heading):
    ours, theirs = Program(heading).all(), Program(heading, torch.optim).all()
    assert isinstance(ours.optimizer, fusedopt.FusedOptimizer)
    torch.testing.assert_close(ours.stepped(), theirs.stepped())
    steps = [state["step"].item() for state in theirs.optimizer.state.values() if "step" in state]
    assert steps == [state["step"].item() for state in ours.optimizer.state.values() if "step" in state]


def cyclic(s, per_epoch):
    x = s / (8 * per_epoch) % 1
    h = 2 * min(x, 1 - x)
    return {"lr": 0.01 + 0.09 * h, "momentum": 0.9 - 0.1 * h}


def warm_restarts(s, per_epoch):
    length = per_epoch
    while s >= length:
        s, length = s - length, 2 * length
    return {"lr": 1e-4 + (0.1 - 1e-4) / 2 * (1 + math.cos(math.pi * s / length))}


def one_cycle(s, per_epoch):
    n = 10 * per_epoch
    top = 0.3 * n - 1

    def between(start, end, at):
        return end + (start - end) / 2 * (1 + math.cos(math.pi * at))

    if s <= top:
        return {"lr": between(4e-4, 0.01, s / top), "betas": (between(0.95, 0.85, s / top), 0.999)}
    at = (s - top) / (n - 1 - top)
    return {"lr": between(0.01, 4e-8, at), "betas": (between(0.85, 0.95, at), 0.999)}


def warm_up(s, per_epoch):
    rate = 0.01 + 0.99 * s / 40 if s < 40 else (1 + math.cos(math.pi * (s - 40) / 960)) / 2
    return {"lr": 1e-3 * rate}


def check_schedule(heading, formula, epochs, optimizers=fusedopt):
    """A program, trained on for some epochs: what its groups say at each step, and where a loop by hand ends."""
    seen = []
    run = Program(heading, optimizers)
    run.observe(lambda run: seen.append({key: run.optimizer.param_groups[0][key] for key in formula(0, 4)}))
    run.all()
    kind, options = type(run.optimizer).__name__, {k: run.optimizer.defaults[k] for k in ("lr",)}
    for key in {"momentum", "betas"} & {*run.optimizer.defaults}:
        options[key] = run.optimizer.defaults[key]
    for _ in range(epochs - 1):
        run.train(run.model, run.optimizer, run.batches, run.schedule.step)
    expected = [formula(s, 4) for s in range(4 * epochs)]
    assert len(seen) == len(expected)
    for found, said in zip(seen, expected, strict=True):
        for key in said:
            assert found[key] == pytest.approx(said[key], rel=1e-9)
    assert max(said["lr"] for said in expected) > 2 * min(said["lr"] for said in expected)

    model = copy.deepcopy(run.before)
    by_hand = getattr(torch.optim, kind)(model.parameters(), **options)
    for said, (x, y) in zip(expected, itertools.cycle(run.batches), strict=False):
        by_hand.param_groups[0].update(said)
        by_hand.zero_grad()
        mean_square(model(x), y).backward()
        by_hand.step()
    torch.testing.assert_close([*run.model.parameters()], [*model.parameters()])


@pytest.mark.parametrize(
    ("heading", "formula", "epochs"),
    [("Cyclic rates", cyclic, 18), ("Warm restarts", warm_restarts, 8), ("Warm-up", warm_up, 15)],
)
def test_schedules_are_their_formulas(heading, formula, epochs):
    check_schedule(heading, formula, epochs)


def test_one_cycle_on_every_engine(engine):
    check_schedule("One cycle", one_cycle, 10, SimpleNamespace(AdamW=functools.partial(fusedopt.AdamW, engine=engine)))


def test_a_plateau_lowers_the_rate():
    rates = []
    run = Program("Plateaus", batches=1)
    run.observe(lambda run: rates.append(run.optimizer.param_groups[0]["lr"]))
    run.all()
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.1, 0.01, 0.01])
    close([*run.model.parameters()], textbook(run.before, run.batches * 6, sgd(rates.__getitem__, 0.9)))


def test_frozen_layers_keep_their_bits_until_they_join():
    run = Program("Frozen layers")
    run.next()
    assert all(map(torch.equal, run.model.blocks.parameters(), run.before.blocks.parameters()))
    assert not any(map(torch.equal, run.model.head.parameters(), run.before.head.parameters()))
    run.next()
    assert not any(map(torch.equal, run.model.blocks.parameters(), run.before.blocks.parameters()))
    assert [run.optimizer.state[p]["step"].item() for p in run.stepped()] == [8, 8, 4, 4]


def test_layers_have_their_rates():
    """Adam's first step is one rate long, in each element."""
    run = Program("Rates of layers", batches=1).all()
    rates = {"head": 1e-3, "blocks": 8e-4}
    for name, p in run.before.named_parameters():
        rate = rates[name.partition(".")[0]]
        went = p * (1 - 0.1 * rate) - run.model.get_parameter(name)
        torch.testing.assert_close(went.abs(), torch.full_like(p, rate), rtol=1e-4, atol=0)


def test_a_grown_network_goes_on():
    run, outputs, moments, norms = Program("Growing a network"), [], [], []

    def see(net):
        outputs.append(net(run.x).detach())
        if len(outputs) == 2:
            moments.extend(run.optimizer.state[p]["exp_avg"].clone() for p in run.old.parameters())
            into = run.new[0].weight
            for out in (run.new[2].weight, 0.1 * torch.linalg.qr(torch.randn(6, 2))[0]):
                grown = run.old(run.x) + torch.tanh(run.x @ into.T) @ out.T
                norms.append(torch.autograd.grad(mean_square(net[1:](grown), run.y), into)[0].norm().item())

    run.call_before_training(see)
    run.all()
    ungrown = Program("Growing a network")
    ungrown.next(SECTIONS["Growing a network"][0].partition("z = old(x)")[0])
    close(outputs[1], ungrown.net(ungrown.x).detach())  # what it computes is what it was, and so are states
    close(moments, [ungrown.optimizer.state[p]["exp_avg"] for p in ungrown.old.parameters()])
    largest = np.linalg.svd((run.dz.T @ run.x).numpy())[1][:2]
    assert norms[0] == pytest.approx(0.1 * math.hypot(*largest)) and norms[0] > 1.1 * norms[1]
    assert [run.optimizer.state[p]["step"].item() for p in run.stepped()] == [8] * 6 + [4] * 2
    assert run.net[0].new is run.new and run.new[0].weight.abs().min() > 0
