"""Groups, states and numbers of other kinds than torch makes."""

import collections
import contextlib
import decimal
import fractions
import warnings
import weakref

import hostile
import numpy as np
import pytest
import torch
from helpers import assert_same, fewer, fill_gradients, params, same_gradients, snapshot
from hostile import assert_equal, stepped

import fusedopt

engine = hostile.engine


def params_as_tuple(a):
    a.param_groups[0]["params"] = tuple(a.param_groups[0]["params"])


def groups_as_tuple(a):
    a.param_groups = tuple(a.param_groups)


def group_as_user_dict(a):
    a.param_groups[0] = collections.UserDict(a.param_groups[0])


def state_as_user_dict(a):
    for p in list(a.state):
        a.state[p] = collections.UserDict(a.state[p])


def states_as_user_dict(a):
    a.state = collections.UserDict(a.state)


@pytest.mark.parametrize(
    "change", [params_as_tuple, groups_as_tuple, group_as_user_dict, state_as_user_dict, states_as_user_dict]
)
@pytest.mark.parametrize("steps", [0, 2])
def test_other_containers(engine, change, steps):
    ours, a, theirs, b = stepped(engine, steps=steps)
    change(a)
    for _ in range(3):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)
    state = a.state[ours[1]]
    state["exp_avg"] = state["exp_avg"].clone() + 1
    b.state[theirs[1]]["exp_avg"].add_(1)
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


def test_states_that_change_places(engine):
    """The same dicts in the same order, under other keys."""
    ours, a, theirs, b = stepped(engine, [(4,), (4,)])
    for optimizer, (p, q) in ((a, ours), (b, theirs)):
        first, second = optimizer.state[p], optimizer.state[q]
        optimizer.state.clear()
        optimizer.state[q] = first
        optimizer.state[p] = second
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


@pytest.mark.parametrize("refused", ["AMP", "a bad gradient", "a bad number"])
def test_step_that_did_not_happen_holds_no_gradients(engine, refused):
    ours, a, _, _ = stepped(engine)
    seen = [weakref.ref(p.grad) for p in ours]
    if refused == "AMP":
        a.grad_scale, a.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        a.step()
        del a.grad_scale, a.found_inf
    else:
        good = a.param_groups[0]["lr"]
        if refused == "a bad gradient":
            ours[2].grad = torch.zeros(6).to_sparse()
        else:
            a.param_groups[0]["lr"] = -1.0
        with pytest.raises((RuntimeError, ValueError)):
            a.step()
        a.param_groups[0]["lr"] = good
    for p in ours:
        p.grad = None
    assert [ref() for ref in seen] == [None] * len(seen)


NO_NUMBERS = ["0.1", decimal.Decimal("0.1"), b"1", 0.1j, torch.tensor(1j), None, [0.1]]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(engine, value):
    for key in ("lr", "weight_decay", "eps"):
        with pytest.raises((TypeError, ValueError), match=key):
            fusedopt.AdamW(params((3,)), engine=engine, **{key: value})
        ours, a, _, _ = stepped(engine)
        before = snapshot(a)
        a.param_groups[0][key] = value
        with pytest.raises((TypeError, ValueError), match=key):
            a.step()
        assert_same(snapshot(a), before)


@pytest.mark.parametrize(
    "betas", [(0.9, 0.99, 0.999), (0.9,), (0.9, "0.99"), 0.9, (decimal.Decimal("0.9"), 0.99)], ids=repr
)
def test_betas_are_a_pair_of_numbers(engine, betas):
    with pytest.raises((TypeError, ValueError), match="betas"):
        fusedopt.AdamW(params((3,)), betas=betas, engine=engine)
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    a.param_groups[0]["betas"] = betas
    with pytest.raises((TypeError, ValueError), match="betas"):
        a.step()
    assert_same(snapshot(a), before)


@pytest.mark.parametrize(
    "value", [fractions.Fraction(1, 8), np.float32(0.125), np.array(0.125), torch.tensor(0.125)], ids=repr
)
def test_real_numbers_of_all_kinds(engine, value):
    ours, a, theirs, b = stepped(engine)
    a.param_groups[0]["lr"], b.param_groups[0]["lr"] = value, 0.125
    for _ in range(2):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps"])
def test_number_too_large_for_single_precision(engine, key):
    with pytest.raises(ValueError, match=f"{key}.*1e\\+300"):
        fusedopt.AdamW(params((3,)), engine=engine, **{key: 1e300})
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    for value in (1e300, torch.tensor(1e300, dtype=torch.float64)):
        a.param_groups[0][key] = value
        if isinstance(value, torch.Tensor) and engine in ("cuda", "triton"):
            continue  # a tensor on the parameters' device is read there
        with pytest.raises(ValueError, match=f"{key}.*1e\\+300"):
            a.step()
        assert_same(snapshot(a), before)
    wide = params((3,), dtype=torch.float64)
    fill_gradients(wide)
    fusedopt.AdamW(wide, engine=engine, **{key: 1e300}).step()


def test_parameters_that_torch_skips():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    odd = [nested, torch.nn.UninitializedParameter(), torch.nn.Parameter(torch.ones(3).to_sparse())]
    ours = params((4,))
    a = fusedopt.AdamW([odd[0], *ours, *odd[1:]], lr=0.1, max_grad_norm=1.0)
    for _ in range(2):
        before = ours[0].detach().clone()
        fill_gradients(ours)
        a.step()
        assert not torch.equal(ours[0], before)
    assert list(a.state) == ours


def test_lazy_module_is_stepped_once_it_is_there():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))
    a = fusedopt.AdamW(model.parameters(), lr=0.1)
    for p in model[1].parameters():
        p.grad = torch.ones_like(p)
    a.step()
    model(torch.ones(2, 4)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    a.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_other_values_in_the_state(engine):
    """Users keep what they like there, and checkpoints bring it back."""
    ours, a, theirs, b = stepped(engine)
    for optimizer in (a, b):
        optimizer.state.update(note=torch.zeros(3), epoch=5, names=["a"])
    for _ in range(2):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)


def test_parameters_come_after_a_step_without_any(engine):
    optimizer = fusedopt.AdamW([{"params": []}], engine=engine)
    optimizer.step()
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer.add_param_group({"params": [p]})
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    optimizer.param_groups[1]["params"] = []
    optimizer.step()
    optimizer.param_groups[1]["params"] = [p]
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("count", [3, 1200])
def test_parameter_that_becomes_of_another_class(engine, count):
    """Whose gradient runs Python that frees what others may be looking at; or that has operations of its own."""

    class Watched(torch.nn.Parameter):
        deed = None

        @property
        def grad(self):
            deed, Watched.deed = Watched.deed, None
            if deed is not None:
                deed()
            return torch.Tensor.grad.__get__(self)

    class Own(torch.nn.Parameter):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    for kind in (Watched, Own):
        ours, a, _, _ = stepped(engine, [(3,)] * fewer(engine, count))
        moment, plans = a.state[ours[0]]["exp_avg"], a._plans
        ours[-1].__class__ = kind
        Watched.deed = lambda moment=moment: moment.untyped_storage().resize_(0)
        try:
            with contextlib.suppress(RuntimeError, ValueError):
                a.step()
        finally:
            Watched.deed = None
            moment.untyped_storage().resize_(12)  # or it could not be printed
        assert engine == "eager" or a._plans is not plans
