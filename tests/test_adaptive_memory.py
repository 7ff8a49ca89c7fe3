"""AMSGD and AMAdamW: what their memory is, and what shares it. The truth is the model that they minimise."""

import pytest
import torch
from helpers import close, copies, fill_gradients, params, same_gradients

import fusedopt

NAMES = ["AMSGD", "AMAdamW"]
SHAPES = [(5, 3), (7,), (130, 2)]


def made(engine, name, shapes=SHAPES, dtype=torch.float64, **options):
    parameters = params(*shapes, dtype=dtype)
    return parameters, getattr(fusedopt, name)(parameters, engine=engine, **options)


def test_the_memory_minimises_the_model(engine):
    """max(<g, x>, gap + <d, x>) + |x|^2 / 2 lr + lam |x + lr d|^2 / 2 lr, at the step x, with the estimated gap."""
    lr, lam = 0.1, 0.3
    (p,), o = made(engine, "AMSGD", [(4, 5)], lr=lr, lam=lam, beta_max=1 - 1e-9)
    fill_gradients([p])
    o.step()
    for _ in range(20):
        d, before = o.state[p]["momentum_buffer"].clone(), p.detach().clone()
        fill_gradients([p])
        o.step()
        g, x = p.grad, p.detach() - before
        gap = lr * (g * d).sum()

        def model(x, g=g, d=d, gap=gap):
            planes = torch.maximum((g * x).sum(), gap + (d * x).sum())
            return planes + (x**2).sum() / (2 * lr) + lam / (2 * lr) * ((x + lr * d) ** 2).sum()

        best = model(x)
        assert all(model(x + 1e-4 * lr * torch.randn_like(x)) >= best for _ in range(20))


def test_momentum_of_a_fixed_memory(engine):
    """Without proximity, gradients that grow along themselves keep the memory at its bound: SGD's or Adam's."""
    for name, options, theirs in (
        ("AMSGD", {"lr": 0.1, "lam": 0.0, "beta_max": 0.5}, lambda p: torch.optim.SGD(p, 0.1, 0.5, 0.5)),
        (
            "AMAdamW",
            {"lam": 0.0, "beta_max": 0.9, "weight_decay": 0.0, "beta2": 0.99},
            lambda p: torch.optim.Adam(p, betas=(0.9, 0.99)),
        ),
    ):
        (p,), o = made(engine, name, [(6,)], **options)
        (q,) = copies([p])
        other, g = theirs([q]), torch.rand(6, dtype=torch.float64) + 1
        for t in range(6):
            p.grad, q.grad = g * (1 + 0.1 * t), g * (1 + 0.1 * t)
            o.step()
            other.step()
        if t and name == "AMSGD":
            assert float(o.memory_of(p)) == 0.5
        close(p, q, 1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_what_shares_a_memory(engine, name):
    groups = [{"params": params((3, 2), (4,))}, {"params": params((5,), (2, 2)), "lam": 0.4}]
    for scope, shared in (("tensor", 4), ("group", 2), ("all", 1)):
        wholes = [{**group, "params": copies(group["params"])} for group in groups]
        o = getattr(fusedopt, name)(wholes, engine=engine, scope=scope)
        everything = [p for group in wholes for p in group["params"]]
        for _ in range(4):
            fill_gradients(everything)
            o.step()
        found = [float(o.memory_of(p)) for p in everything]
        assert all(0 <= beta <= o.defaults["beta_max"] for beta in found)
        if scope == "group":
            assert found[0] == found[1]
            assert found[2] == found[3]
        assert len(set(found)) <= shared


@pytest.mark.parametrize("name", NAMES)
def test_memory_comes_back_with_a_checkpoint(engine, name):
    parameters, o = made(engine, name, dtype=torch.float32)
    for _ in range(3):
        fill_gradients(parameters)
        o.step()
    again = copies(parameters)
    other = getattr(fusedopt, name)(again, engine=engine)
    other.load_state_dict(o.state_dict())
    for _ in range(3):
        fill_gradients(parameters)
        same_gradients(parameters, again)
        o.step()
        other.step()
    for p, q in zip(parameters, again, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(o.memory_of(p), other.memory_of(q))


def test_memory_of_what_was_not_stepped():
    (p, *_), o = made("eager", "AMSGD")
    with pytest.raises(KeyError, match="shape .5, 3. has not been stepped"):
        o.memory_of(p)


@pytest.mark.parametrize("name", NAMES)
def test_equal_gradients_and_no_gradients(engine, name):
    """Neither a difference of 0 nor a step that goes nowhere makes a NaN."""
    (p,), o = made(engine, name, [(3,)])
    for value in (1.0, 1.0, 0.0, 0.0, 1.0):
        p.grad = torch.full_like(p, value)
        o.step()
        assert p.isfinite().all()
        assert o.memory_of(p).isfinite()


def test_a_rate_of_zero_has_no_gap(engine):
    (p,), o = made(engine, "AMAdamW", [(3,)])
    for lr in (0.0, 0.1, 0.0, 0.0, 0.1):
        o.param_groups[0]["lr"] = lr
        before = p.detach().clone()
        fill_gradients([p])
        o.step()
        assert p.isfinite().all()
        assert torch.equal(p, before) == (lr == 0)
