"""Tensors whose memory is missing, lent, lazily transformed, or of another shape than it was."""

import contextlib

import hostile
import numpy as np
import pytest
import torch
from helpers import assert_same, close, fewer, fill_gradients, pair, same_gradients, snapshot
from hostile import FAST, assert_equal, stepped
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt

engine = hostile.engine


def two(g):
    return TwoTensor(g, g)


def zeros(g):
    return torch._efficientzerotensor(g.shape)


def waiting(g):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(g)


class Plain(torch.Tensor):
    """A subclass without operations of its own."""


def plain(g):
    return g.as_subclass(Plain)


@pytest.mark.parametrize("kind", [zeros, plain])
@pytest.mark.parametrize("steps", [0, 2])
def test_gradient_of_an_odd_kind(kind, steps):
    ours, a, theirs, b = stepped("auto", steps=steps, weight_decay=0.1)
    for odd in (True, False):
        grads = [kind(q.grad) if odd and i == 1 else q.grad for i, q in enumerate(theirs)]
        for p, q, g in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = g, g
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", [two, waiting])
def test_gradient_that_is_a_subclass(kind):
    """torch's own step mixes it with plain parameters or refuses; ours does the one or the other as well."""
    ours, a, theirs, b = stepped("auto")
    for p, q in zip(ours, theirs, strict=True):
        p.grad = kind(q.grad)
    before = snapshot(a)
    try:
        a.step()
    except (RuntimeError, TypeError):
        assert_same(snapshot(a), before)
    else:
        b.step()
        assert_equal(ours, a, theirs, b)
    same_gradients(ours, theirs)
    a.step()


@pytest.mark.parametrize("kind", [zeros, two])
@pytest.mark.parametrize("engine", FAST, indirect=True)
def test_gradient_that_an_engine_cannot_read(engine, kind):
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    ours[1].grad = kind(ours[1].grad)
    with pytest.raises(RuntimeError, match=f"parameter 1 of group 0.*{engine}.*of its gradient"):
        a.step()
    assert_same(snapshot(a), before)
    fill_gradients(ours)
    a.step()


def give_back(t):
    t.untyped_storage().resize_(0)


def shorten(t):
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.element_size())


PARTS = {
    "parameter": lambda a, p: p,
    "gradient": lambda a, p: p.grad,
    "exp_avg": lambda a, p: a.state[p]["exp_avg"],
    "exp_avg_sq": lambda a, p: a.state[p]["exp_avg_sq"],
    "step": lambda a, p: a.state[p]["step"],
}


@pytest.mark.parametrize("spoil", [give_back, shorten])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_tensor_without_its_memory(engine, part, spoil, clip):
    ours, a, _, _ = stepped(engine)
    a.max_grad_norm = clip
    others = [ours[0], ours[2]]
    tensor = PARTS[part](a, ours[1])
    before, kept = [p.detach().clone() for p in others], tensor.detach().clone()
    size = tensor.untyped_storage().nbytes()
    spoil(tensor)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=rf"{part}.*without its memory.*bytes") as caught:
            a.step()
        assert "parameter 1 of group 0" in str(caught.value)
    assert_same([p.detach() for p in others], before)
    assert all(a.state[p]["step"] == 2 for p in others)
    tensor.untyped_storage().resize_(size)
    with torch.no_grad():
        tensor.copy_(kept)
    a.step()
    assert all(a.state[p]["step"] == 3 for p in ours)


def test_parameter_without_memory_stands_by_without_a_gradient(engine):
    ours, a, _, _ = stepped(engine)
    size = ours[1].untyped_storage().nbytes()
    ours[1].grad = None
    give_back(ours[1])
    a.step(), a.step()
    assert a.state[ours[0]]["step"] == 4 and a.state[ours[1]]["step"] == 2
    ours[1].untyped_storage().resize_(size)
    ours[1].data.fill_(1.0)
    fill_gradients(ours)
    a.step()
    assert a.state[ours[1]]["step"] == 3 and ours[1].ne(1).all()


@pytest.mark.parametrize("which", ["parameter", "state", "both"])
def test_lazy_clone_is_not_overwritten(engine, which):
    ours, a, theirs, b = stepped(engine)
    for _ in range(2):
        clones = []
        for p in ours:
            if which != "state":
                clones.append(torch._lazy_clone(p.detach()))
            if which != "parameter":
                clones.append(torch._lazy_clone(a.state[p]["exp_avg"]))
                clones.append(torch._lazy_clone(a.state[p]["step"]))
        wanted = [c.numpy(force=True).copy() for c in map(torch.clone, clones)]
        a.step(), b.step()
        for clone, want in zip(clones, wanted, strict=True):
            np.testing.assert_array_equal(torch.clone(clone).numpy(), want)
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


def test_parameter_that_is_a_lazy_clone(engine):
    source = torch.randn(7)
    kept = source.clone()
    ours, a, theirs, b = stepped(engine, [(7,)])
    for p in (*ours, *theirs):
        p.data = torch._lazy_clone(source)
    a.step(), b.step()
    assert torch.equal(source, kept)
    assert_equal(ours, a, theirs, b)


def lazily_conjugated():
    return torch.randn(4, 3, dtype=torch.complex64).mH


def lazily_negated():
    return torch.randn(5, dtype=torch.complex64).conj().imag


@pytest.mark.parametrize("make", [lazily_conjugated, lazily_negated])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_lazy_parameter(make, clip):
    value = make()
    p, q = torch.nn.Parameter(value), torch.nn.Parameter(value.clone().resolve_conj().resolve_neg())
    assert p.is_conj() or p.is_neg()
    a, b = fusedopt.AdamW([p], lr=0.1, max_grad_norm=clip), torch.optim.AdamW([q], lr=0.1)
    for t in range(4):
        p.grad = q.grad = torch.randn_like(q)
        if t == 2:
            p.grad = q.grad.mH.clone().mH if p.is_complex() else (q.grad + 0j).mul(-1j).conj().imag
            close(p.grad.resolve_neg().resolve_conj(), q.grad)
        a.step()
        if clip:
            q.grad = q.grad.clone()
            torch.nn.utils.clip_grad_norm_([q], clip)
        b.step()
        close(p.detach().resolve_conj().resolve_neg(), q.detach(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=str)
def test_parameter_that_becomes_lazy_where_it_is(dtype):
    z = torch.randn(6, dtype=torch.complex64)
    p = torch.nn.Parameter(z if dtype.is_complex else z.imag)
    q = torch.nn.Parameter(p.detach().clone())
    a, b = fusedopt.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    for t in range(5):
        if t in (2, 4):
            address = p.data_ptr()
            p.data = p.data.conj() if dtype.is_complex else torch._neg_view(p.data)
            q.data = q.data.conj().resolve_conj() if dtype.is_complex else -q.data
            assert p.data_ptr() == address
        p.grad = torch.randn_like(q)
        q.grad = p.grad.clone()
        a.step(), b.step()
        close(p.detach().resolve_conj().resolve_neg(), q.detach(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=str)
def test_lazy_state(dtype):
    ours, a, theirs, b = pair([(6,), (3,)], dtype=dtype)
    for t in range(5):
        same_gradients(ours, theirs)
        if t == 2:
            state = a.state[ours[0]]
            m = state["exp_avg"]
            state["exp_avg"] = m.conj().clone().conj() if dtype.is_complex else torch._neg_view(-m)
            close(state["exp_avg"].resolve_conj().resolve_neg(), b.state[theirs[0]]["exp_avg"])
        if t == 3:  # at the same address, other numbers
            for optimizer, p in ((a, ours[1]), (b, theirs[1])):
                m = optimizer.state[p]["exp_avg"]
                lazy = m.conj() if dtype.is_complex else torch._neg_view(m)
                optimizer.state[p]["exp_avg"].data = lazy if optimizer is a else lazy.resolve_conj().resolve_neg()
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)


def to_half(s):
    return s.data.view(torch.float16)[: s.numel()]


def as_integers(s):
    return s.data.view(torch.int32)


def transposed(s):
    return s.data.t()


def flattened(s):
    return s.data.view(-1)


def halved(s):
    return s.data[:1]


@pytest.mark.parametrize("how", [as_integers, flattened, halved])
@pytest.mark.parametrize("count", [1, 600])
def test_state_that_does_not_fit_any_more(engine, how, count):
    ours, a, _, _ = stepped(engine, [(4, 3)] * fewer(engine, count))
    state = a.state[ours[-1]]
    good = state["exp_avg"].data
    state["exp_avg"].data = how(state["exp_avg"])
    assert state["exp_avg"].data_ptr() == good.data_ptr()
    before = [p.detach().clone() for p in ours]
    with pytest.raises((RuntimeError, ValueError), match="exp_avg"):
        a.step()
    assert_same([p.detach() for p in ours], before)
    state["exp_avg"].data = good
    a.step()


def test_state_of_another_dtype_at_the_same_address(engine):
    ours, a, _, _ = stepped(engine, [(8,)])
    guard = torch.full((64,), 7.0)
    s = a.state[ours[0]]["exp_avg_sq"]
    s.data = guard[:8]
    fill_gradients(ours)
    a.step()
    guard.fill_(7.0)
    s.data = guard.view(torch.bfloat16)[:8]
    a.step()
    assert guard[4:].eq(7).all()  # 16 bytes were the state's


def test_state_transposed_in_place(engine):
    ours, a, theirs, b = stepped(engine, [(4, 4)])
    for optimizer, (p,) in ((a, ours), (b, theirs)):
        optimizer.state[p]["exp_avg"].t_()
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


@pytest.mark.parametrize("convert", [lambda t: t.to_sparse(), lambda t: t.to_mkldnn()], ids=["sparse", "mkldnn"])
@pytest.mark.parametrize("part", ["exp_avg", "parameter"])
def test_tensor_swapped_with_one_without_strides(engine, convert, part):
    ours, a, _, _ = stepped(engine, [(4, 4), (3,)])
    tensor = PARTS[part](a, ours[0])
    other = convert(tensor.detach())
    if isinstance(tensor, torch.nn.Parameter):
        other = torch.nn.Parameter(other)
        other.grad = None
        gradient, tensor.grad = tensor.grad, None
    before = ours[1].detach().clone()
    torch.utils.swap_tensors(tensor, other)
    if part == "parameter":
        with contextlib.suppress(RuntimeError):
            ours[0].grad = gradient
    if ours[0].grad is not None:
        with pytest.raises((RuntimeError, ValueError), match="parameter 0 of group 0"):
            a.step()
        assert torch.equal(ours[1], before)


class Odd(torch.Tensor):
    """A subclass without operations of its own, but for one that answers with anything."""

    answer = 5

    def resolve_neg(self):
        return self.answer


@pytest.mark.parametrize("answer", [5, None])
@pytest.mark.parametrize("steps", [0, 2])
def test_gradient_that_resolves_to_no_tensor(engine, steps, answer):
    ours, a, _, _ = stepped(engine, steps=steps)
    ours[1].grad = ours[1].grad.as_subclass(Odd)
    Odd.answer = answer
    with contextlib.suppress(RuntimeError, TypeError, AttributeError):
        a.step()
    fill_gradients(ours)
    a.step()
