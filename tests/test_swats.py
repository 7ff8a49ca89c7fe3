"""SWATS: when it switches, what switches together, and what is left of Adam then. The gate judges its equations."""

import io
import math

import pytest
import torch
from helpers import close, copies, fill_gradients, params

import fusedopt

SHAPES = [(5, 3), (7,), (40, 2)]
SOON = {"tol": 1e9}  # in the third step


def made(engine, shapes=SHAPES, dtype=torch.float64, **options):
    parameters = params(*shapes, dtype=dtype)
    return parameters, fusedopt.SWATS(parameters, engine=engine, **options)


def along(ps, t):
    """Gradients that the parameters' own direction has a part in, so that the rate is positive."""
    generator = torch.Generator().manual_seed(t)
    for p in ps:
        p.grad = p.detach() + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def textbook(ps, steps, lr, betas, eps, tol, weight_decay=0.0):
    """Keskar and Socher's algorithm 1, all tensors as one vector; yields the phase before each step."""
    (b1, b2), ps = betas, [p.detach().clone() for p in ps]
    m, v, b = ([torch.zeros_like(p) for p in ps] for _ in range(3))
    running, rate = 0.0, None
    for k in range(1, steps + 1):
        phase = "adam" if rate is None else "sgd"
        along(ps_as_leaves := [torch.nn.Parameter(p) for p in ps], k)
        grads = [q.grad + weight_decay * p for p, q in zip(ps, ps_as_leaves, strict=True)]
        if rate is not None:
            b = [b1 * x + g for x, g in zip(b, grads, strict=True)]
            ps = [p - (1 - b1) * rate * x for p, x in zip(ps, b, strict=True)]
        else:
            m = [b1 * x + (1 - b1) * g for x, g in zip(m, grads, strict=True)]
            v = [b2 * x + (1 - b2) * g**2 for x, g in zip(v, grads, strict=True)]
            scale = lr * math.sqrt(1 - b2**k) / (1 - b1**k)
            steps_of = [-scale * x / (y.sqrt() + eps) for x, y in zip(m, v, strict=True)]
            ps = [p + q for p, q in zip(ps, steps_of, strict=True)]
            square = sum(float((q * q).sum()) for q in steps_of)
            slope = -sum(float((q * g).sum()) for q, g in zip(steps_of, grads, strict=True))
            found = square / slope
            running = b2 * running + (1 - b2) * found
            if k > 1 and 0 < running / (1 - b2**k) and abs(running / (1 - b2**k) - found) < tol:
                rate = running / (1 - b2**k)
        yield phase, [p.clone() for p in ps]


@pytest.mark.parametrize("scope", ["group", "all"])
def test_one_vector_switches_when_its_rate_settles(engine, scope):
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-8, "tol": 2e-4, "weight_decay": 0.01}
    ps, o = made(engine, scope=scope, **options)
    phases = []
    for k, (phase, expected) in enumerate(textbook(ps, 30, **options), 1):
        assert o.phase_of(0) == phase
        phases.append(phase)
        along(ps, k)
        o.step()
        for p, q in zip(ps, expected, strict=True):
            close(p.detach(), q, 1e-6)
    assert {"adam", "sgd"} == set(phases)
    assert phases[2] == "adam"


def test_scopes_switch_by_themselves(engine):
    """Gradients of 0 tell no rate, but switch with what shares their scope."""
    for scope, expected in (
        ("tensor", ["sgd", "adam", "adam", "mixed", "adam"]),
        ("group", ["sgd", "sgd", "adam", "sgd", "adam"]),
        ("all", ["sgd"] * 5),
    ):
        groups = [{"params": params((6, 2), (5,))}, {"params": params((4,))}]
        pulled, *others = everything = [p for group in groups for p in group["params"]]
        o = fusedopt.SWATS(groups, scope=scope, engine=engine, **SOON)
        for t in range(3):
            along([pulled], t)
            for p in others:
                p.grad = torch.zeros_like(p)
            o.step()
        assert [o.phase_of(p) for p in everything] + [o.phase_of(group) for group in o.param_groups] == expected
    with pytest.raises(KeyError, match="not a param group"):
        o.phase_of(2)


def test_schedules_scale_the_rate_of_sgd(engine):
    (p,), o = made(engine, [(4,)], lr=0.1, **SOON)
    for t in range(2):
        along([p], t)
        o.step()
    assert o.phase_of(p) == "sgd"
    along([p], 3)
    (q,) = copies([p])
    o.step()
    rate = float(o.state[p]["sgd_lr"])
    close(p.detach(), q.detach() - 0.1 * rate * (b := p.grad.clone()), 1e-6)
    before = p.detach().clone()
    o.param_groups[0]["lr"] = 0.05
    along([p], 4)
    o.step()
    close(p.detach(), before - 0.1 * rate / 2 * (0.9 * b + p.grad), 1e-6)
    before = p.detach().clone()
    o.param_groups[0]["lr"] = 0.0
    o.step()
    assert torch.equal(p, before)


def test_moments_are_dropped_after_the_switch(engine):
    ps, o = made(engine, **SOON)
    others = copies(ps)
    other = fusedopt.SWATS(others, engine=engine, **SOON)
    for t in range(8):
        for one, its in ((o, ps), (other, others)):
            along(its, t)
            one.step()
        if t == 0:
            assert o.drop_moments() == 0
        if t == 4:
            assert o.drop_moments() == 8 * sum(p.numel() for p in ps)
            assert not any("exp_avg_sq" in o.state[p] for p in ps)
    for p, q in zip(ps, others, strict=True):
        assert torch.equal(p, q)
    again = copies(ps)
    loaded = fusedopt.SWATS(again, engine=engine, **SOON)
    loaded.load_state_dict(o.state_dict())
    for one, its in ((o, ps), (loaded, again)):
        along(its, 9)
        one.step()
    for p, q in zip(ps, again, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("after", [1, 2, 3, 5])
def test_resumes_bit_for_bit_on_either_side_of_the_switch(engine, after):
    ps, o = made(engine, dtype=torch.float32, **SOON)
    for t in range(after):
        along(ps, t)
        o.step()
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    again = copies(ps)
    other = fusedopt.SWATS(again, engine=engine, **SOON)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert o.phase_of(0) == other.phase_of(0)
    for t in range(after, after + 4):
        for one, its in ((o, ps), (other, again)):
            along(its, t)
            one.step()
    for p, q in zip(ps, again, strict=True):
        assert torch.equal(p, q)
    assert o.phase_of(0) == "sgd"


def test_tensors_without_a_gradient_switch_with_their_group(engine):
    """Their buffer begins with their own first step of SGD; late ones begin there."""
    ps, o = made(engine, **SOON)
    for t in range(4):
        along(ps, t)
        if t >= 2:
            ps[1].grad = None
        o.step()
    late = params((3,), dtype=torch.float64)
    o.param_groups[0]["params"] += late
    before = [p.detach().clone() for p in (ps[1], *late)]
    fill_gradients([*ps, *late])
    o.step()
    rate = float(o.state[ps[0]]["sgd_lr"])
    for p, q in zip((ps[1], *late), before, strict=True):
        close(p.detach(), q - 0.1 * rate * p.grad, 1e-6)


def test_zero_gradients_tell_no_rate(engine):
    (p,), o = made(engine, [(4,)], **SOON)
    for _ in range(4):
        p.grad = torch.zeros_like(p)
        o.step()
    assert p.isfinite().all()
    assert o.phase_of(p) == "adam"
