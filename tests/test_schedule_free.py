"""Schedule-free optimizers: as the authors' package, and the swap between what is trained and what is evaluated."""

import copy
import io

import pytest
import torch
from helpers import assert_same, copies, fill_gradients, params, snapshot

import fusedopt
from fusedopt.engines import ENGINES
from fusedopt.verification import oracles

NAMES = {"ScheduleFreeAdamW": "AdamWScheduleFree", "ScheduleFreeSGD": "SGDScheduleFree"}
SHAPES = ((31,), (5, 4), (), (0,), (100,))


def build(name, ps, **options):
    return getattr(fusedopt, name)(ps, **{"lr": 0.05, "weight_decay": 0.1, **options})


def advance(optimizer, ps, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        fill_gradients(ps)
        optimizer.step()


@pytest.mark.parametrize(
    "options",
    [{}, {"warmup_steps": 5}, {"r": 0.7, "warmup_steps": 3}, {"weight_lr_power": 0.0}, {"weight_decay": 0.0}],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_as_the_authors_package(engine, name, options):
    """Two groups, evaluated in between, and a learning rate that changes."""
    theirs = oracles.find(f"schedulefree:{NAMES[name]}")
    if theirs is None:
        pytest.skip("schedulefree is not installed")
    torch.manual_seed(0)
    a = params(*SHAPES, dtype=torch.float64)
    b = copies(a)

    def groups(ps):
        return [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.1}]

    ours = build(name, groups(a), engine=engine, **options)
    other = theirs(groups(b), **{"lr": 0.05, "weight_decay": 0.1, **options})
    other.train()
    for t in range(20):
        for group in (*ours.param_groups, *other.param_groups):
            group["lr"] *= 0.9 if t % 7 == 3 else 1.0
        if t in (4, 11):
            ours.eval(), other.eval()
            for p, q in zip(a, b, strict=True):
                torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
            ours.train(), other.train()
        fill_gradients(a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        ours.step(), other.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours.state[p]["z"], other.state[q]["z"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_evaluated_is_the_average(engine, name):
    """Algorithm 1 of the paper, with x kept: ``x <- (1-c) x + c z``, ``y = beta x + (1-beta) z``."""
    torch.manual_seed(0)
    (p,) = params((40,), dtype=torch.float64)
    optimizer = build(name, [p], weight_decay=0.0, engine=engine)
    x, total = p.detach().clone(), 0.0
    for _ in range(14):
        fill_gradients([p])
        optimizer.step()
        total += 0.05**2
        c = 0.05**2 / total
        z = optimizer.state[p]["z"]
        x = (1 - c) * x + c * z
        torch.testing.assert_close(p.detach(), 0.9 * x + 0.1 * z, rtol=1e-6, atol=1e-6)
        optimizer.eval()
        torch.testing.assert_close(p.detach(), x, rtol=1e-5, atol=1e-5)
        optimizer.train()
    assert optimizer.state[p]["step"] == 14


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(engine, name):
    """Calls that change nothing do nothing; a step in between is an error that says what to do."""
    ps = params(*SHAPES)
    optimizer = build(name, ps, engine=engine)
    optimizer.eval(), optimizer.train()  # before there is anything
    advance(optimizer, ps, 3, 1)
    before = snapshot(optimizer)
    optimizer.train()
    assert_same(snapshot(optimizer), before)
    optimizer.eval()
    evaluated = snapshot(optimizer)
    optimizer.eval()
    assert_same(snapshot(optimizer), evaluated)
    assert not torch.equal(ps[0], before[0][0])
    fill_gradients(ps)
    with pytest.raises(RuntimeError, match=r"eval mode.*optimizer.train\(\)"):
        optimizer.step()
    assert_same(snapshot(optimizer), evaluated)
    optimizer.train(False)
    assert_same(snapshot(optimizer), evaluated)
    optimizer.train()
    for p, q in zip(ps, before[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
    assert_same(snapshot(optimizer)[1], before[1])
    optimizer.step()


@pytest.mark.parametrize("master", ["fp32", "split", "stochastic", None])
@pytest.mark.parametrize("name", NAMES)
def test_masters_are_swapped_too(engine, name, master):
    """With one, a bfloat16 parameter goes back to its bits; without, to within what it can hold."""
    ps = params((64,), (5, 7), dtype=torch.bfloat16)
    optimizer = build(name, ps, master=master, lr=0.5, engine=engine)
    advance(optimizer, ps, 4, 1)
    before = [p.detach().clone() for p in ps]
    counted = [float(optimizer.state[p]["step"]) for p in ps]
    optimizer.eval()
    assert not torch.equal(ps[0], before[0])
    optimizer.train()
    for p, q in zip(ps, before, strict=True):
        if master in ("fp32", "split"):
            assert torch.equal(p, q)
        else:
            torch.testing.assert_close(p, q, rtol=2e-2, atol=2e-2)
    assert counted == [float(optimizer.state[p]["step"]) for p in ps]
    advance(optimizer, ps, 1, 2)


@pytest.mark.parametrize("evaluates", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_resumes_in_either_mode(engine, name, evaluates):
    a = params(*SHAPES)
    one = build(name, a, warmup_steps=3, engine=engine)
    advance(one, a, 4, 1)
    if evaluates:
        one.eval()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    b = copies(a)
    other = build(name, b, warmup_steps=3, engine=engine)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [group["train_mode"] for group in other.param_groups] == [not evaluates]
    again = copy.deepcopy(other)
    for optimizer in (one, other, again):
        optimizer.train()
        advance(optimizer, [p for group in optimizer.param_groups for p in group["params"]], 3, 2)
        optimizer.eval()
    assert_same(snapshot(one), snapshot(other))
    assert_same(snapshot(one), snapshot(again))


def test_a_swap_is_one_launch(monkeypatch, engine):
    if engine == "eager":
        pytest.skip("launches nothing")
    plan, runs = ENGINES[engine].plan, []
    name = "launch" if hasattr(plan, "launch") else "step"
    launch = getattr(plan, name)
    monkeypatch.setattr(plan, name, lambda self, *a, **k: runs.append(1) or launch(self, *a, **k))
    ps = params(*SHAPES, (3, 3))
    optimizer = fusedopt.ScheduleFreeAdamW([{"params": ps[:3]}, {"params": ps[3:], "betas": (0.8, 0.9)}], engine=engine)
    advance(optimizer, ps, 2, 1)
    for swap in (optimizer.eval, optimizer.train):
        del runs[:]
        swap()
        assert len(runs) == 1


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_have_moved(engine, name):
    """And some are never stepped."""
    a = params((6, 4), (5,), (3,))
    b = copies(a)
    one, other = build(name, a, engine=engine), build(name, b, engine=engine)
    for ps, optimizer in ((a, one), (b, other)):
        torch.manual_seed(3)
        fill_gradients(ps)
        ps[2].grad = None
        optimizer.step()
    one.eval(), one.train(), other.eval(), other.train()
    a[0].data = a[0].data.t().contiguous().t()
    one.eval(), other.eval()
    assert_same([p.detach().contiguous() for p in a], [p.detach() for p in b])
    assert not one.state.get(a[2])


def test_swaps_tell_autograd(engine):
    (p,) = params((4,))
    optimizer = fusedopt.ScheduleFreeSGD([p], engine=engine)
    advance(optimizer, [p], 2, 1)
    loss = (p * p).sum()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_new_groups_have_the_mode_of_the_others(engine):
    ps = params((4,), (3,))
    optimizer = fusedopt.ScheduleFreeSGD(ps[:1], lr=0.1, engine=engine)
    advance(optimizer, ps[:1], 2, 1)
    optimizer.eval()
    optimizer.add_param_group({"params": ps[1:]})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]
    optimizer.train()
    advance(optimizer, ps, 1, 2)


def test_averages_and_steps_in_backward(engine):
    ps = params((4,))
    optimizer = fusedopt.ScheduleFreeSGD(ps, lr=0.1, average=fusedopt.EMA(0.5), engine=engine)
    advance(optimizer, ps, 2, 1)
    with optimizer.averaged(), pytest.raises(RuntimeError, match="averaged"):
        optimizer.eval()
    handle = fusedopt.step_in_backward(optimizer)
    (ps[0] ** 2).sum().backward()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        (ps[0] ** 2).sum().backward()
    handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_that_is_given_twice_is_swapped_once(engine, name):
    (p,) = params((4,))
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = build(name, [p, p], engine=engine)
    advance(optimizer, [p], 2, 1)
    z = optimizer.state[p]["z"]
    expected = (p.detach() - 0.1 * z) / 0.9
    optimizer.eval()
    torch.testing.assert_close(p.detach(), expected)


def test_what_cannot_go_says_so_before_anything(engine):
    """A closure is not run, a parameter has its own number; where nothing is to change, nothing is refused."""
    ps = params((4,), (3, 2))
    optimizer = fusedopt.ScheduleFreeSGD(ps, average=fusedopt.EMA(0.5), engine=engine)
    advance(optimizer, ps[1:], 2, 1)
    with optimizer.averaged():
        optimizer.train()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        optimizer.step(lambda: pytest.fail("the closure ran"))
    ps[1].data = torch.ones(1).expand(3, 2)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0"):
        optimizer.train()
    assert not optimizer.param_groups[0]["train_mode"]


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("ScheduleFreeAdamW", {"betas": (0.0, 0.9)}, r"betas\[0\]"),
        ("ScheduleFreeSGD", {"momentum": 0.0}, "momentum"),
        ("ScheduleFreeSGD", {"momentum": 1.0}, "momentum"),
        ("ScheduleFreeSGD", {"warmup_steps": -1}, "warmup_steps"),
        ("ScheduleFreeAdamW", {"r": -0.5}, "r "),
    ],
)
def test_bad_arguments(name, options, named):
    with pytest.raises(ValueError, match=named):
        getattr(fusedopt, name)(params((3,)), **options)


def test_a_rate_of_zero_moves_nothing(engine):
    """As torch.distributed.checkpoint makes states."""
    for power in (0.0, 2.0):
        ps = params((4,), (3, 2))
        start = [p.detach().clone() for p in ps]
        optimizer = fusedopt.ScheduleFreeAdamW(ps, lr=0.0, weight_decay=0.1, weight_lr_power=power, engine=engine)
        advance(optimizer, ps, 2, 1)
        assert_same([p.detach() for p in ps], start)


def test_accelerate_swaps():
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed: pip install 'fusedopt[clients]'"
    )
    model = torch.nn.Linear(4, 3)
    optimizer = fusedopt.ScheduleFreeSGD(model.parameters(), lr=0.1)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    model(torch.ones(2, 4)).sum().backward()
    prepared.step()
    before = model.weight.detach().clone()
    model(torch.ones(2, 4)).sum().backward()
    prepared.step()
    trained = model.weight.detach().clone()
    prepared.eval()
    assert not torch.equal(model.weight, trained)
    prepared.train()
    torch.testing.assert_close(model.weight.detach(), trained)
    assert not torch.equal(before, trained)


@pytest.mark.parametrize("name", NAMES)
def test_fuse_goes_on_where_theirs_was(engine, name):
    theirs = oracles.find(f"schedulefree:{NAMES[name]}")
    if theirs is None:
        pytest.skip("schedulefree is not installed")
    torch.manual_seed(0)
    a = params(*SHAPES, dtype=torch.float64)
    b = copies(a)
    live, other = (theirs(ps, lr=0.05, weight_decay=0.1, warmup_steps=4, r=0.5) for ps in (a, b))
    live.train(), other.train()
    advance(live, a, 3, 1), advance(other, b, 3, 1)
    fused = fusedopt.fuse(live, engine=engine)
    assert type(fused) is getattr(fusedopt, name) and "k" not in fused.param_groups[0]
    for optimizer, ps in ((fused, a), (other, b)):
        advance(optimizer, ps, 3, 2)
        optimizer.eval()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
