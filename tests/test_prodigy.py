"""Prodigy: one estimate for everything, against the authors' package and in what is its own."""

import copy

import pytest
import torch
from helpers import assert_same, copies, fill_gradients, params, snapshot

import fusedopt
from fusedopt.verification import oracles

SHAPES = ((31,), (5, 4), (100,), ())


def toward(ps, targets, t):
    """Gradients of a distance, and noise: what d is made for."""
    generator = torch.Generator().manual_seed(t)
    for p, target in zip(ps, targets, strict=True):
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        p.grad = (p.detach() - target.to(p) + 0.1 * noise.to(p)).detach()


def started(dtype=torch.float64, shapes=SHAPES[:3]):
    torch.manual_seed(0)
    ps = params(*shapes, dtype=dtype)
    return ps, [torch.randn_like(p) for p in ps]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decouple": False},
        {"use_bias_correction": True},
        {"safeguard_warmup": True, "growth_rate": 1.05},
        {"beta3": 0.9, "d_coef": 2.0, "d0": 1e-4},
    ],
    ids=str,
)
def test_as_the_authors_package(engine, options):
    """To what float32 keeps of the estimate, which goes into all that follows."""
    theirs = oracles.find("prodigyopt:Prodigy")
    if theirs is None:
        pytest.skip("prodigyopt is not installed")
    a, targets = started()
    b = copies(a)
    ours, other = fusedopt.Prodigy(a, engine=engine, **options), theirs(b, **options)
    for t in range(60):
        toward(a, targets, t), toward(b, targets, t)
        ours.step(), other.step()
    assert float(ours.d) == pytest.approx(other.param_groups[0]["d"], rel=1e-5)
    assert float(ours.d) > 10 * options.get("d0", 1e-6)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_groups_with_an_lr_of_zero_count_for_nothing(engine):
    """They stay as they are, with weight decay too, and the estimate is that of the others."""
    a, targets = started()
    b = copies(a)
    still = a[1].detach().clone()
    groups = [{"params": a[:1]}, {"params": a[1:2], "lr": 0.0, "weight_decay": 0.5}, {"params": a[2:]}]
    one, other = fusedopt.Prodigy(groups, engine=engine), fusedopt.Prodigy([b[0], b[2]], engine=engine)
    for t in range(20):
        toward(a, targets, t), toward(b, targets, t)
        one.step(), other.step()
    assert torch.equal(a[1], still) and float(one.d) == pytest.approx(float(other.d), rel=1e-6)
    torch.testing.assert_close(a[2], b[2])


def test_all_parameters_have_one_estimate(engine):
    """Also those without a gradient in a step, and those whose first comes later."""
    a, targets = started()
    optimizer = fusedopt.Prodigy([{"params": a[:2]}, {"params": a[2:]}], d0=1e-4, engine=engine)
    assert float(optimizer.d) == pytest.approx(1e-4)
    seen = []
    for t in range(12):
        toward(a, targets, t)
        if t < 6:
            a[2].grad = None
        if t % 3 == 2:
            a[0].grad = None
        optimizer.step()
        seen.append(float(optimizer.d))
        assert {float(optimizer.state[p]["d"]) for p in a if optimizer.state.get(p)} == {seen[-1]}
    assert seen == sorted(seen) and seen[-1] > seen[0]
    assert torch.equal(optimizer.state[a[0]]["p0"], started()[0][0].detach())


def test_groups_must_agree(engine):
    a, targets = started()
    with pytest.raises(ValueError, match=r"lr \(group 1\) is 0.5"):
        fusedopt.Prodigy([{"params": a[:1]}, {"params": a[1:], "lr": 0.5}])
    optimizer = fusedopt.Prodigy([{"params": a[:1]}, {"params": a[1:2], "beta3": None}], engine=engine)
    with pytest.raises(ValueError, match=r"d0 \(group 2\)"):
        optimizer.add_param_group({"params": a[2:], "d0": 1e-3})
    assert len(optimizer.param_groups) == 2
    toward(a, targets, 0)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[1]["d_coef"] = 2.0
    with pytest.raises(ValueError, match=r"d_coef \(group 1\)"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"d0": 0.0}, "d0"),
        ({"d_coef": -1.0}, "d_coef"),
        ({"growth_rate": 0.5}, "growth_rate"),
        ({"beta3": 1.0}, "beta3"),
    ],
    ids=str,
)
def test_bad_arguments(options, named):
    with pytest.raises(ValueError, match=named):
        fusedopt.Prodigy(params((3,)), **options)


def test_resumes_to_the_last_bit(engine):
    a, targets = started(torch.float32)
    one = fusedopt.Prodigy(a, growth_rate=1.5, engine=engine)
    for t in range(12):
        toward(a, targets, t)
        if t == 6:
            b = copies(a)
            other = fusedopt.Prodigy(b, growth_rate=1.5, engine=engine)
            other.load_state_dict(copy.deepcopy(one.state_dict()))
        if t >= 6:
            toward(b, targets, t)
            other.step()
        one.step()
    assert_same(snapshot(one), snapshot(other))


def test_steps_that_are_skipped_leave_the_estimate(engine):
    a, targets = started(torch.float32)
    optimizer = fusedopt.Prodigy(a, skip_nonfinite=True, engine=engine)
    for t in range(5):
        toward(a, targets, t)
        optimizer.step()
    before = snapshot(optimizer)
    a[1].grad[0, 0] = float("inf")
    optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_nothing_moves_before_there_is_a_gradient(engine):
    a, _ = started(torch.float32)
    start = [p.detach().clone() for p in a]
    optimizer = fusedopt.Prodigy(a, weight_decay=0.1, engine=engine)
    for p in a:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert_same([p.detach() for p in a], start)
    fill_gradients(a)
    optimizer.step()
    assert not torch.equal(a[0], start[0])


def test_it_is_not_stepped_in_backward():
    with pytest.raises(RuntimeError, match="needs all gradients at once"):
        fusedopt.step_in_backward(fusedopt.Prodigy(params((3,))))
