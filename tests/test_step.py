"""What a step does: sizes, groups, schedules, flags, dtypes. The truth is torch.optim."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import (
    ALL,
    BY_NAME,
    assert_same,
    close,
    decay,
    fewer,
    fill_gradients,
    pair,
    params,
    same_gradients,
    snapshot,
)

import fusedopt


@pytest.mark.parametrize("size", [0, 1, 7, 15, 16, 17, 31, 1023, 1024, 1025, 4097, 65535, 65536, 65537, 200_003])
def test_sizes(engine, size):
    ours, a, theirs, b = pair([(size,), (3,)], engine=engine)
    for _ in range(3):
        same_gradients(ours, theirs)
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)


def test_result_does_not_depend_on_position_or_threads(engine):
    values, gradient = torch.randn(70_001), torch.randn(70_001)

    def stepped(cut, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            parts = [torch.nn.Parameter(part.clone()) for part in values.split(cut)]
            optimizer = fusedopt.AdamW(parts, engine=engine, max_grad_norm=1.0)
            for _ in range(3):
                for p, g in zip(parts, gradient.split(cut), strict=True):
                    p.grad = g.clone()
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return torch.cat([p.detach() for p in parts]), optimizer.grad_norm

    whole, norm = stepped(70_001, 1)
    again, same_norm = stepped(70_001, 2)
    assert torch.equal(whole, again) and torch.equal(norm, same_norm)
    for cut in (64, 1000, 4099)[engine == "triton" :]:  # more than a thousand tensors take the interpreter long
        pieces, other_norm = stepped(cut, 2)
        close(other_norm, norm, 1e-6)
        close(pieces, whole, 1e-6)


def test_none_gradients_keep_their_own_counts(engine):
    ours, a, theirs, b = pair([(3,), (40,), (5, 5)], engine=engine)
    for t in range(12):
        same_gradients(ours, theirs, [None if (t + i) % 3 == 0 else torch.randn_like(p) for i, p in enumerate(ours)])
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        assert torch.equal(a.state[p]["step"], b.state[q]["step"])


def test_no_gradient_at_all(engine):
    optimizer = fusedopt.AdamW(params((3,)), engine=engine, max_grad_norm=1.0)
    optimizer.step()
    assert not optimizer.state and optimizer.grad_norm == 0


def test_empty_and_scalar_parameters(engine):
    ours, a, theirs, b = pair([(0,), (), (0, 3), (4,), (0,)], engine=engine)
    for _ in range(3):
        same_gradients(ours, theirs)
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        assert a.state[p]["step"] == 3


def test_empty_group(engine):
    ps = params((3,))
    optimizer = fusedopt.AdamW([{"params": []}, {"params": ps}, {"params": []}], engine=engine)
    before = ps[0].detach().clone()
    fill_gradients(ps)
    optimizer.step()
    assert not torch.equal(ps[0], before)


@pytest.mark.parametrize("name", ALL)
def test_nan_propagates_and_stays_in_its_element(engine, name):
    for bad in (float("nan"), float("inf")):
        ps = params((67,))
        optimizer = getattr(fusedopt, name)(ps, engine=engine)
        fill_gradients(ps)
        ps[0].grad[13] = bad
        optimizer.step()
        fine = torch.arange(67) != 13
        if not optimizer.rule.has_sums() or name in ("LAMB", "LARS"):  # whose ratio is 1 where a norm is NaN
            assert ps[0][fine].isfinite().all()
        if bad != bad and name != "Rprop":  # as in torch, where the sign of NaN is 0
            assert ps[0][13].isnan()


@pytest.mark.parametrize("name", ALL)
def test_maximize_is_the_negated_gradient(engine, name):
    results = []
    for maximize in (False, True):
        torch.manual_seed(3)
        ps = params((37,))
        optimizer = getattr(fusedopt, name)(ps, engine=engine, maximize=maximize, **decay(name))
        for _ in range(5):
            fill_gradients(ps)
            if maximize:
                ps[0].grad.neg_()
            optimizer.step()
        results.append(ps[0].detach())
    assert torch.equal(*results)


def test_groups_have_their_own_options(engine):
    ours, theirs = params((31,), (8, 8), (5,)), None
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]

    def groups(ps):
        return [
            {"params": ps[:1], "lr": 0.1, "betas": (0.5, 0.9)},
            {"params": ps[1:2], "weight_decay": 0.3, "amsgrad": True},
            {"params": ps[2:], "maximize": True, "eps": 1e-3},
        ]

    a, b = fusedopt.Adam(groups(ours), engine=engine), torch.optim.Adam(groups(theirs))
    for _ in range(6):
        same_gradients(ours, theirs)
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)


def test_group_added_later_is_stepped(engine):
    for name in ("AdamW", "AdaBound"):
        ps = params((3,), (4,))
        optimizer = getattr(fusedopt, name)(ps[:1], engine=engine)
        fill_gradients(ps)
        optimizer.step()
        optimizer.add_param_group({"params": ps[1:], "lr": 0.5})
        before = ps[1].detach().clone()
        optimizer.step()
        assert not torch.equal(ps[1], before)
        assert optimizer.state[ps[0]]["step"] == 2 and optimizer.state[ps[1]]["step"] == 1


def test_flags_switched_while_training(engine):
    ours, a, theirs, b = pair([(33,)], "SGD", engine=engine, lr=0.1)
    for t in range(6):
        for optimizer in (a, b):
            optimizer.param_groups[0]["momentum"] = 0.9 if 2 <= t < 4 else 0
        same_gradients(ours, theirs)
        a.step(), b.step()
        close(ours[0], theirs[0])


def test_tensor_lr(engine):
    ours, theirs = params((9,)), None
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    lr = torch.tensor(0.1)
    a, b = fusedopt.AdamW(ours, lr=lr, engine=engine), torch.optim.AdamW(theirs, lr=lr)
    for _ in range(4):
        same_gradients(ours, theirs)
        a.step(), b.step()
        lr.mul_(0.7)
    close(ours[0], theirs[0])


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 1e-3, 0.1, step_size_up=4),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
        lambda o: torch.optim.lr_scheduler.LinearLR(o),
    ],
    ids=["OneCycle", "Cyclic", "Cosine", "Linear"],
)
@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdaBound"])
def test_schedulers(engine, name, scheduler):
    if name == "AdaBound":
        ps = params((9,))
        optimizer = fusedopt.AdaBound(ps, engine=engine)
        schedule = scheduler(optimizer)
        for _ in range(10):
            fill_gradients(ps)
            optimizer.step()
            schedule.step()
        assert ps[0].isfinite().all()
        return
    ours, a, theirs, b = pair([(9,)], name, engine=engine, **({"momentum": 0.9} if name == "SGD" else {}))
    first, second = scheduler(a), scheduler(b)
    for _ in range(10):
        same_gradients(ours, theirs)
        a.step(), b.step()
        first.step(), second.step()
    close(ours[0], theirs[0])


def test_closure_and_hooks(engine):
    (p,) = ps = params((3,))
    optimizer = fusedopt.SGD(ps, lr=0.1, engine=engine)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        calls.append("closure")
        return loss

    before = p.detach().clone()
    loss = optimizer.step(closure)
    assert calls == ["pre", "closure", "post"]
    close(loss.detach(), (before**2).sum())
    close(p.detach(), before * 0.8)


def test_step_counter_passes_two_to_the_24(engine):
    ps = params((3,))
    optimizer = fusedopt.AdamW(ps, engine=engine)
    fill_gradients(ps)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"].fill_(2**24 - 2)
    optimizer.load_state_dict(state)
    for t in range(4):
        optimizer.step()
        assert optimizer.state[ps[0]]["step"] == 2**24 - 1 + t


def test_centered_rmsprop_stays_finite(engine):
    ps = params((2000,))
    gradient = torch.randn(2000)
    optimizer = fusedopt.RMSprop(ps, centered=True, alpha=0.9, lr=1e-4, engine=engine)
    for _ in range(fewer(engine, 200)):
        ps[0].grad = gradient
        optimizer.step()
    assert ps[0].isfinite().all()


def test_lion_leaves_quiet_elements_alone(engine):
    ps = params((5,))
    before = ps[0].detach().clone()
    optimizer = fusedopt.Lion(ps, lr=0.1, engine=engine)
    for zero in (0.0, -0.0):
        ps[0].grad = torch.full((5,), zero)
        optimizer.step()
    assert torch.equal(ps[0], before)


def test_gradients_are_left_alone(engine):
    ps = params((33,), (4, 4))
    optimizer = fusedopt.AdamW(ps, engine=engine, max_grad_norm=0.01, weight_decay=0.1, maximize=True)
    fill_gradients(ps)
    before = [p.grad.clone() for p in ps]
    optimizer.step()
    assert_same([p.grad for p in ps], before)


@pytest.mark.parametrize(
    "case",
    ["AdamW", "SGD nesterov", "Adam amsgrad", "RAdam", "NAdam", "AdaBound", "Adamax", "Adadelta", "ASGD", "Rprop"],
)
def test_differentiable(case):
    case = BY_NAME[case]

    def step(value, gradient):
        p = value.clone()
        p.grad = gradient
        optimizer = case.build([p], differentiable=True)
        optimizer.step()
        return p

    value, gradient = (torch.randn(5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(step, (value, gradient))


def test_differentiable_leaf_is_refused():
    ps = params((3,), (4,))
    before = [p.detach().clone() for p in ps]
    optimizer = fusedopt.SGD(ps, differentiable=True)
    fill_gradients(ps)
    with pytest.raises(RuntimeError, match="parameter 0 of group 0.*leaf"):
        optimizer.step()
    assert_same([p.detach() for p in ps], before)


def test_engines_share_a_step():
    """One optimizer, two engines: the norm spans both, and so does the decision to skip."""
    ours, theirs = params((50,), (31,), (7,)), None
    ours[0].requires_grad_(False)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = fusedopt.AdamW(
        [{"params": ours[:1], "differentiable": True}, {"params": ours[1:]}], max_grad_norm=0.3, skip_nonfinite=True
    )
    b = torch.optim.AdamW(theirs)
    for t in range(6):
        same_gradients(ours, theirs)
        if t == 3:
            ours[1].grad[0] = float("inf")
            before = snapshot(a)
            a.step()
            assert_same(snapshot(a), before)
            continue
        a.step()
        close(a.grad_norm, torch.nn.utils.clip_grad_norm_(theirs, 0.3))
        b.step()
    assert a.skipped_steps == 1
    for p, q in zip(ours, theirs, strict=True):
        close(p.detach(), q.detach())


def test_differentiable_lr():
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    value = torch.randn(4, dtype=torch.float64)

    def step(lr):
        p = value.clone()
        p.grad = torch.arange(4, dtype=torch.float64) + 1
        fusedopt.AdamW([p], lr=lr, differentiable=True).step()
        return p

    assert torch.autograd.gradcheck(step, (lr,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_states_are_float(engine, dtype):
    ps = params((5,), dtype=dtype)
    optimizer = fusedopt.AdamW(ps, engine=engine)
    fill_gradients(ps)
    optimizer.step()
    assert optimizer.state[ps[0]]["exp_avg"].dtype == torch.float32


def test_gradient_of_a_declared_dtype(engine):
    ps, wide = params((70,), dtype=torch.bfloat16), params((70,))
    wide[0].data.copy_(ps[0].data)
    gradient = torch.randn(70)
    ps[0].grad_dtype = torch.float32
    ps[0].grad, wide[0].grad = gradient, gradient
    for p in (ps, wide):
        fusedopt.AdamW(p, engine=engine).step()
    assert torch.equal(ps[0], wide[0].bfloat16())


def test_mixed_dtypes_in_one_step(engine):
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.complex64]
    ps = [torch.nn.Parameter(torch.ones(50, dtype=d)) for d in dtypes]
    optimizer = fusedopt.AdamW(ps, engine=engine, max_grad_norm=1.0, lr=0.5)
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float64
    for p in ps:
        close(p.detach().cfloat().real, torch.full((50,), 0.495), 4e-3)


def test_optimizer_that_its_parameter_holds_is_collected(engine):
    (p,) = ps = params((3,))
    optimizer = fusedopt.SGD(ps, engine=engine)
    p.owner = optimizer
    (p**2).sum().backward()
    optimizer.step()
    alive = weakref.ref(optimizer)
    del p, ps, optimizer
    gc.collect()
    assert alive() is None


def test_deepcopy_is_independent(engine):
    ps = params((3,))
    optimizer = fusedopt.AdamW(ps, engine=engine, max_grad_norm=2.0)
    fill_gradients(ps)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    before = snapshot(optimizer)
    for p in other.param_groups[0]["params"]:
        p.grad = torch.ones(3)
    other.step()
    assert_same(snapshot(optimizer), before)
    assert other.max_grad_norm == 2.0 and other.grad_norm is not None
