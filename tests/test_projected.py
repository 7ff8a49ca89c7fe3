"""AdamP and SGDP: when a step is projected, and what of it. The truth is the package adamp."""

import pytest
import torch
from helpers import close, copies, params, same_gradients

import fusedopt

adamp = pytest.importorskip("adamp")
NAMES = ["AdamP", "SGDP"]
SHAPES = [(6, 5), (4, 3, 3, 2), (1, 9), (8, 1), (7,), (), (0, 3), (3, 0)]


def both(engine, name, shapes=SHAPES, dtype=torch.float64, **options):
    options = {"lr": 0.1, "weight_decay": 0.1} | options
    ours = params(*shapes, dtype=dtype)
    theirs = copies(ours)
    return (
        ours,
        getattr(fusedopt, name)(ours, engine=engine, **options),
        theirs,
        getattr(adamp, name)([p for p in theirs if p.numel()], **options),
    )


def orthogonal(p, rows):
    """A gradient that is orthogonal to each row of a parameter, or to all of it; and neither nearly so to the other."""
    g = torch.randn_like(p)
    q, h = (t.detach().reshape(rows, -1) for t in (p, g))
    return (h - q * (h * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True)).reshape(p.shape)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kind", ["channels", "tensor", "neither"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_projected(engine, name, kind, nesterov):
    ours, a, theirs, b = both(engine, name, [(6, 5), (4, 3, 3, 2)], nesterov=nesterov, delta=1e-3)
    for _ in range(3):
        before, lengths = [p.detach().clone() for p in ours], [p.detach().norm() for p in ours]
        gradients = {
            "channels": [orthogonal(p, len(p)) for p in ours],
            "tensor": [orthogonal(p, 1) for p in ours],
            "neither": [p.detach() + 0.1 * torch.randn_like(p) for p in ours],
        }[kind]
        same_gradients(ours, theirs, gradients)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p, q, 1e-12)
    decayed = [1 - 0.1 * 0.1 * (0.1 if kind != "neither" else 1)] * 2
    for p, old, length, kept in zip(ours, before, lengths, decayed, strict=True):
        along = ((p.detach() - kept * old) * old).sum() / length**2  # what the step itself has of the parameter
        assert (abs(along) < 1e-6) == (kind != "neither")


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"delta": 2.0}, {"wd_ratio": 0.7, "eps": 1e-3}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_all_dimensions(engine, name, options):
    more = {"momentum": 0.9, "dampening": 0.2} if name == "SGDP" else {}
    ours, a, theirs, b = both(engine, name, **options, **more)
    for t in range(12):
        gradients = [torch.randn_like(p) if (t + k) % 5 else torch.zeros_like(p) for k, p in enumerate(ours)]
        same_gradients(ours, theirs, gradients)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-11)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_theirs_goes_on(engine, name):
    shapes = [(6, 5), (7,)]
    ours, a, theirs, b = both(engine, name, shapes)
    for _ in range(3):
        same_gradients(ours, theirs)
        b.step()
    with torch.no_grad():
        for p, q in zip(ours, theirs, strict=True):
            p.copy_(q)
    for p, q in zip(ours, theirs, strict=True):
        a.state[p] = {k: torch.as_tensor(v).float() if k == "step" else v.clone() for k, v in b.state[q].items()}
    for _ in range(3):
        same_gradients(ours, theirs)
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-12)


def test_zero_parameters_and_gradients(engine):
    """Lengths of 0 make no NaN, with and without eps."""
    for name in NAMES:
        for eps in (1e-8, 0.0):
            p = torch.nn.Parameter(torch.zeros(3, 4))
            o = getattr(fusedopt, name)([p], lr=0.1, eps=eps, engine=engine)
            p.grad = torch.ones_like(p)
            o.step()
            assert p.isfinite().all()
