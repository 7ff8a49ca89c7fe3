"""Parameters, states and lists that change between steps are seen."""

import os

import pytest
import torch
from conftest import AVAILABLE, engine_fixture
from helpers import close, fewer, fill_gradients, pair, params, same_gradients

import fusedopt
from fusedopt.scan import Scan

engine = engine_fixture(AVAILABLE, in_python=True)


def repoint(ps):
    ps[0].data = ps[0].data.clone()


def swap(ps):
    other = torch.nn.Parameter(ps[0].detach().clone())
    other.grad = ps[0].grad
    torch.utils.swap_tensors(ps[0], other)


def transpose_in_place(ps):
    ps[1].data = ps[1].data.t().contiguous().t()


def square_strides(ps):
    ps[2].data = ps[2].data.t()


@pytest.mark.parametrize("change", [repoint, swap, transpose_in_place, square_strides])
def test_parameters_that_moved(engine, change):
    ours, a, theirs, b = pair([(7,), (4, 6), (5, 5)], engine=engine)
    for t in range(4):
        same_gradients(ours, theirs)
        if t == 2:
            old = [p.data for p in ours]
            kept = [d.clone() for d in old]
            change(ours)
            if change is square_strides:
                theirs[2].data = theirs[2].data.t().contiguous()
        a.step(), b.step()
        if t == 2 and change in (repoint, transpose_in_place):
            k = 0 if change is repoint else 1
            assert torch.equal(old[k], kept[k])  # nothing was written where it had been
    for k in (0, 1) if change is square_strides else (0, 1, 2):
        close(ours[k], theirs[k])
    if change is square_strides:
        close(ours[2], theirs[2], 5e-3)  # its moments stay where they were, as torch's do


def replace_entry(state):
    state["exp_avg"] = state["exp_avg"].clone()


def repoint_entry(state):
    for value in state.values():
        value.data = value.data.clone()


def replace_step(state):
    state["step"] = torch.tensor(7.0)


@pytest.mark.parametrize("change", [replace_entry, repoint_entry, replace_step])
@pytest.mark.parametrize("count", [2, 600])
def test_states_that_moved(engine, change, count):
    ours, a, theirs, b = pair([(3,)] * fewer(engine, count), engine=engine)
    for t in range(4):
        same_gradients(ours, theirs)
        if t == 2:
            for p, q in zip(ours, theirs, strict=True):
                change(a.state[p]), change(b.state[q])
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        assert torch.equal(a.state[p]["step"], b.state[q]["step"])


def test_state_replaced_as_a_whole(engine):
    ours, a, theirs, b = pair([(3,), (4,)], engine=engine)
    for t in range(4):
        same_gradients(ours, theirs)
        if t == 2:
            a.state[ours[1]] = {}
            b.state[theirs[1]] = {}
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)


def test_parameter_list_changed_in_place(engine):
    ps = params((3,), (4,), (5,))
    optimizer = fusedopt.AdamW(ps, engine=engine)
    fill_gradients(ps)
    optimizer.step()
    del optimizer.param_groups[0]["params"][1]
    before = [p.detach().clone() for p in ps]
    optimizer.step()
    assert [torch.equal(p, q) for p, q in zip(ps, before, strict=True)] == [False, True, False]


def test_param_groups_and_state_replaced(engine):
    ours, a, theirs, b = pair([(3,), (4,)], engine=engine)
    for t in range(4):
        same_gradients(ours, theirs)
        if t == 2:
            for optimizer in (a, b):
                optimizer.param_groups = [dict(g, lr=0.5) for g in optimizer.param_groups]
                optimizer.state = type(optimizer.state)(dict, {p: dict(s) for p, s in optimizer.state.items()})
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        assert torch.equal(a.state[p]["step"], b.state[q]["step"])


@pytest.fixture
def mesh():
    """A mesh of this process alone, whose group has no threads: other tests fork."""
    import torch.distributed as dist
    from torch.distributed.tensor import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_parts_of_dtensors(engine, mesh):
    """Of a parameter, a state or a gradient: in another tensor around the same memory, or in other memory."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    theirs = params((5, 3), (0, 2), (7,))
    placements = [[Shard(0)], [Shard(0)], [Replicate()]]
    ours = [
        torch.nn.Parameter(DTensor.from_local(p.detach().clone(), mesh, x))
        for p, x in zip(theirs, placements, strict=True)
    ]
    a, b = fusedopt.AdamW(ours, engine=engine, max_grad_norm=1.0), torch.optim.AdamW(theirs)
    for t in range(12):
        for p, q, x in zip(ours, theirs, placements, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = DTensor.from_local(q.grad.clone(), mesh, x)
        if t == 3:  # as ones that another thread or a mode makes
            ours[0]._local_tensor = ours[0]._local_tensor.view(5, 3)
        if t == 5:
            ours[2]._local_tensor = ours[2]._local_tensor.clone()
        if t == 6:
            exp_avg = a.state[ours[0]]["exp_avg"]
            exp_avg._local_tensor = exp_avg._local_tensor.clone()
        if t == 7:
            ours[0].grad = DTensor.from_local(theirs[0].grad.t().contiguous().t(), mesh, [Replicate()])
        if t == 8:
            ours[0].grad = None
            theirs[0].grad = None
        if t == 9:
            ours[0]._local_tensor = torch.empty(5, 4)[:, :3].copy_(ours[0]._local_tensor)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p.detach()._local_tensor, q.detach())
        assert a.state[p]["exp_avg"].placements == p.placements


def test_who_scans(engine):
    (p,) = params((3,))
    fill_gradients([p])
    optimizer = fusedopt.SGD([p], engine=engine)
    optimizer.step()
    (plan,) = optimizer._plans
    assert isinstance(getattr(plan, "_scan", None), Scan) == (os.environ.get("FUSEDOPT_HOST") == "python")
