"""Parameters that share memory with one another, or with other ranks."""

import warnings

import hostile
import numpy as np
import pytest
import torch
from helpers import close, fill_gradients, params, same_gradients
from hostile import assert_equal, stepped

import fusedopt
from fusedopt import planner

engine = hostile.engine


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RAdam"])
def test_parameter_given_twice(engine, name):
    options = {"momentum": 0.9, "dampening": 0.3} if name == "SGD" else {}
    value = torch.randn(70)
    p, q = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    other, another = params((5,)), params((5,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        a = getattr(fusedopt, name)([p, *other, p], engine=engine, **options)
    assert any("duplicate" in str(w.message) for w in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b = getattr(torch.optim, name)([q, *another, q], foreach=False, **options)
    for _ in range(4):
        same_gradients([p, *other], [q, *another])
        a.step(), b.step()
        close(p.detach(), q.detach(), 1e-5)
        close(a.state[p].get("step", torch.zeros(())), b.state[q].get("step", torch.zeros(())))


def test_parameter_given_twice_while_training(engine):
    ours, a, theirs, b = stepped(engine, [(5,), (6,)])
    a.param_groups[0]["params"].append(ours[0])
    b.param_groups[0]["params"].append(theirs[0])
    for _ in range(3):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)
    assert a.state[ours[0]]["step"] == 8 and a.state[ours[1]]["step"] == 5


@pytest.mark.parametrize("size", [8, 80_000])
def test_parameters_over_the_same_memory(engine, size):
    def build():
        torch.manual_seed(3)
        flat = torch.randn(size)
        parts = [flat, flat[: size // 2], flat[size // 4 :], flat[::2], flat.view(2, -1)[:, 1]]
        return flat, [torch.nn.Parameter(part) for part in parts] + params((5,))

    (flat, ours), (reference, theirs) = build(), build()
    a, b = fusedopt.AdamW(ours, lr=0.1, engine=engine), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for _ in range(3):
        same_gradients(ours, theirs)
        a.step(), b.step()
        close(flat, reference, 1e-5)
    close(ours[-1], theirs[-1], 1e-5)


def test_interleaved_parameters_share_a_step(engine):
    """Memory that lies between another's elements is not shared: one plan does."""
    flat = torch.randn(40)
    ps = [torch.nn.Parameter(flat[i::4]) for i in range(4)]
    optimizer = fusedopt.AdamW(ps, engine=engine)
    fill_gradients(ps)
    optimizer.step()
    assert len(optimizer._plans) == 1


def test_states_over_the_same_memory(engine):
    ours, a, theirs, b = stepped(engine, [(6,), (6,)])
    a.state[ours[1]]["exp_avg"] = a.state[ours[0]]["exp_avg"]
    b.state[theirs[1]]["exp_avg"] = b.state[theirs[0]]["exp_avg"]
    for _ in range(2):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


def test_norm_and_skip_of_parameters_over_the_same_memory(engine):
    flat = torch.zeros(6)
    ps = [torch.nn.Parameter(flat[:4]), torch.nn.Parameter(flat[2:])]
    a = fusedopt.SGD(ps, lr=1.0, max_grad_norm=1.0, skip_nonfinite=True, engine=engine)
    for value in (3.0, 1.0):
        ps[0].grad, ps[1].grad = torch.full((4,), value), torch.full((4,), 1.0)
        before = flat.clone()
        a.step()
        close(a.grad_norm, torch.tensor((4 * value**2 + 4) ** 0.5))
        close((before - flat).norm(), torch.tensor([value, value, value + 1, value + 1, 1, 1]).norm() / a.grad_norm)
    before = flat.clone()
    for bad in (0, 1):
        ps[bad].grad = torch.full((4,), float("nan"))
        a.step()
        assert torch.equal(flat, before) and not a.grad_norm.isfinite()


def test_one_skipped_step_of_several_waves_counts_once(engine):
    p = torch.nn.Parameter(torch.ones(4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a parameter given twice
        optimizer = fusedopt.AdamW([p, p], engine=engine, skip_nonfinite=True)
    for value, skipped in ((1.0, 0), (float("inf"), 1), (1.0, 1), (float("nan"), 2)):
        p.grad = torch.full((4,), value)
        optimizer.step()
        assert optimizer.skipped_steps == skipped
    assert optimizer.state[p]["step"] == 4


def test_as_many_dimensions_as_torch_has(engine):
    shape = (2, *[1] * 61, 2, 3)
    ours, a, theirs, b = stepped(engine, [shape])
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)
    p = torch.nn.Parameter(torch.randn(shape, dtype=torch.complex64).mT.contiguous().mT)
    q = torch.nn.Parameter(p.detach().clone())
    one, other = fusedopt.AdamW([p]), torch.optim.AdamW([q])
    for each, optimizer in ((p, one), (q, other)):
        each.grad = torch.ones_like(each)
        optimizer.step()
    torch.testing.assert_close(p, q)


@pytest.mark.parametrize("shift", [0, 3])
def test_gradient_in_its_parameters_memory(engine, shift):
    """It is read before anything is written."""
    flat = torch.randn(100)
    p, q = torch.nn.Parameter(flat[:90]), torch.nn.Parameter(flat[:90].clone())
    p.grad, q.grad = flat[shift : 90 + shift], flat[shift : 90 + shift].clone()
    if shift and engine != "eager":
        with pytest.raises(RuntimeError, match="parameter 0 .*gradient shares memory"):
            fusedopt.AdamW([p], engine=engine).step()
        assert torch.equal(p, q)
        engine = "auto"
    a, b = fusedopt.AdamW([p], lr=0.1, engine=engine), fusedopt.AdamW([q], lr=0.1, engine="eager")
    for _ in range(3):
        a.step(), b.step()
        close(p.detach(), q.detach(), 1e-6)
        p.grad, q.grad = flat[shift : 90 + shift], flat[shift : 90 + shift].clone()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("where", [slice(0, 60), slice(10, 70), slice(40, 100)])
def test_gradients_in_other_parameters_memory(engine, steps, where):
    """In the order of the parameters, as torch does it."""

    def build():
        torch.manual_seed(2)
        return params((100,), (60,), (7,), (100,))

    ours, theirs = build(), build()
    a, b = fusedopt.AdamW(ours, lr=0.1, engine=engine), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for _ in range(steps):
        same_gradients(ours, theirs)
        a.step(), b.step()
    for _ in range(3):
        same_gradients(ours, theirs)
        for ps in (ours, theirs):
            ps[0].grad = ps[3].detach()
            ps[1].grad = ps[0].detach()[where]
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
    same_gradients(ours, theirs)
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


def test_gradient_that_moves_into_a_state(engine):
    ours, a, theirs, b = stepped(engine, [(50,), (50,)])
    for ps, optimizer in ((ours, a), (theirs, b)):
        ps[0].grad = optimizer.state[ps[1]]["exp_avg"]
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


def test_parameters_and_gradients_in_one_buffer(engine):
    """Which does not overlap, and so costs nothing."""
    n, count = 40, 5
    buffer = torch.randn(2 * n * count)
    ps = [torch.nn.Parameter(buffer[2 * n * i : 2 * n * i + n]) for i in range(count)]
    optimizer = fusedopt.AdamW(ps, engine=engine)
    plans = None
    for step in range(4):
        for i, p in enumerate(ps):
            p.grad = buffer[2 * n * i + n : 2 * n * (i + 1)]
        optimizer.step()
        assert step < 2 or optimizer._plans is plans
        plans = optimizer._plans
    assert len(plans) == 1


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("lazily", [lambda t: t.conj(), lambda t: t.conj().imag], ids=["conjugated", "negated"])
def test_lazy_gradients_in_other_parameters_memory(lazily, steps):
    """What they stand for changes with the memory, up to the step of their own parameter."""

    def build(make, **options):
        torch.manual_seed(4)
        first = torch.nn.Parameter(torch.randn(9, dtype=torch.complex64))
        second = torch.nn.Parameter(torch.zeros_like(lazily(first.detach())).resolve_neg().resolve_conj())
        return [first, second], make([first, second], lr=0.1, **options)

    ours, a = build(fusedopt.SGD)
    theirs, b = build(torch.optim.SGD, foreach=False)
    for step in range(steps + 3):
        for ps in (ours, theirs):
            ps[0].grad = torch.full_like(ps[0], 0.5 + step)
            ps[1].grad = torch.ones_like(ps[1]) if step < steps else lazily(ps[0].detach())
        a.step(), b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q)


def test_lazy_gradient_in_other_memory_is_refused_by_an_engine_that_was_asked_for():
    first = torch.nn.Parameter(torch.randn(9, dtype=torch.complex64))
    second = torch.nn.Parameter(torch.zeros(9, dtype=torch.complex64))
    first.grad, second.grad = torch.ones_like(first), first.detach().conj()
    before = first.detach().clone()
    with pytest.raises(RuntimeError, match="parameter 1 .*lazily conjugated"):
        fusedopt.SGD([first, second], lr=0.1, engine="cpu").step()
    assert torch.equal(first, before)


@pytest.mark.parametrize("shift", [1, 13, 40])
def test_memory_that_torch_does_not_know_to_be_shared(engine, shift):
    """As of numpy arrays: the tensors' storages are others."""
    n = 5000
    twins = []
    for name in (engine, "eager"):
        values = np.random.default_rng(0).standard_normal(n + 100).astype(np.float32)
        p, q = torch.nn.Parameter(torch.from_numpy(values[50 : 50 + n])), torch.nn.Parameter(torch.zeros(n))
        optimizer = fusedopt.SGD([p, q], lr=0.1, engine=name)
        p.grad, q.grad = torch.ones(n), torch.ones(n)
        optimizer.step()
        q.grad = torch.from_numpy(values[50 - shift : 50 - shift + n])
        optimizer.step()
        twins.append((p, q))
    for p, q in zip(*twins, strict=True):
        assert torch.equal(p, q)


def test_gradient_with_other_strides_where_one_was_allowed(engine):
    """The planner allowed another extent."""
    n = 3000
    twins = []
    for name in (engine, "eager"):
        torch.manual_seed(0)
        flat, p = torch.randn(3 * n), torch.nn.Parameter(torch.zeros(n))
        q = torch.nn.Parameter(flat[n : 2 * n])
        optimizer = fusedopt.SGD([q, p], lr=0.1, engine=name)
        q.grad = torch.ones(n)
        for gradient in (flat[:n], flat.as_strided((n,), (2,), 0), flat[:n]):
            p.grad = gradient
            optimizer.step()
        twins.append((p, q))
    for p, q in zip(*twins, strict=True):
        assert torch.equal(p, q)


def test_gradient_that_moves_under_eager_plans():
    """Where an eager parameter stands between two of another engine."""

    def run(make):
        torch.manual_seed(0)
        ps = params((8,), (8,), (8,))
        ps[1].requires_grad_(False)
        optimizer = make([{"params": [p]} for p in ps])
        for _ in range(2):
            for p in ps:
                p.grad = torch.randn(8)
            optimizer.step()
        for _ in range(2):
            ps[1].grad = ps[2].detach()
            optimizer.step()
        return ps

    def ours(groups):
        groups[1]["differentiable"] = True
        return fusedopt.SGD(groups, lr=0.1)

    for p, q in zip(run(ours), run(lambda groups: torch.optim.SGD(groups, lr=0.1, foreach=False)), strict=True):
        torch.testing.assert_close(p, q)


def test_plans_are_kept_beside_a_differentiable_group(monkeypatch):
    """Whose states are others after each step, in memory that gradients of others may get."""
    plans = []
    plan = planner.plan
    monkeypatch.setattr(planner, "plan", lambda *a: plans.append(plan(*a)) or plans[-1])
    ps = params(*[(5000,)] * 8)
    for p in ps[6:]:
        p.requires_grad_(False)
    optimizer = fusedopt.AdamW([{"params": ps[:6]}, {"params": ps[6:], "differentiable": True}])
    for _ in range(20):
        for p in ps:
            p.grad = torch.randn(5000)
        optimizer.step()
        optimizer.zero_grad()
    assert len(plans) == 1


def test_a_shard_that_is_gone_refuses_no_step():
    p, q = params((3,), (4,))
    p._fsdp_flattened = True
    fill_gradients([p, q])
    optimizer = fusedopt.AdamW([q, p])
    optimizer.step()
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="sharded"):
        optimizer.step()
    optimizer.param_groups[0]["params"] = [q]
    optimizer.step()
    assert optimizer.state[q]["step"] == 2


def test_shared_counter_at_the_end_of_its_range():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = fusedopt.AdamW([p, p])
    optimizer.step()
    optimizer.state[p]["step"].fill_(2**24 - 1)
    for _ in range(2):
        optimizer.step()
    assert optimizer.state[p]["step"] >= 2**24
