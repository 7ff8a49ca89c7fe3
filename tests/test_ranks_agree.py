"""What ranks decide together, and in which order they talk, whoever plans anew, joins, or has or finds nothing."""

import math

import many
import pytest
import torch
from conftest import AVAILABLE
from helpers import close
from sharding import mesh_of, placed, replica_and_shard, whole
from torch import nn

import fusedopt
from fusedopt import planner

pytestmark = pytest.mark.xdist_group("ranks")

ENGINES = [name for name in AVAILABLE if name != "triton"]


def one_rank_plans_anew(engine):
    """In any step, with gradients to be settled or not, and findings of a scaler: collectives stay in order."""
    from torch.distributed import get_rank
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh, ours, theirs = replica_and_shard()
    a = fusedopt.AdamW(ours, lr=0.1, max_grad_norm=1.0, engine=engine)
    b = torch.optim.AdamW(theirs, lr=0.1)
    for t in range(9):
        grads = [torch.randn(4, 3) for _ in range(2)]
        if t % 2:
            ours[0].grad = DTensor.from_local(grads[0] / 2, mesh, [Partial()])
        else:
            ours[0].grad = placed(grads[0], (mesh, [Replicate()]))
        ours[1].grad = placed(grads[1], (mesh, [Shard(0)]))
        theirs[0].grad, theirs[1].grad = grads
        if t in (2, 3, 4) and get_rank() == 1:
            ours[t % 2]._local_tensor = ours[t % 2]._local_tensor.clone()
        found = t in (3, 6)
        a.found_inf = torch.tensor(float(found and get_rank() == 0))
        if found and get_rank() == 0:
            ours[1].grad._local_tensor[0, 0] = math.inf
        a.step()
        if found:
            assert not a.grad_norm.isfinite()
            continue
        close(a.grad_norm, nn.utils.clip_grad_norm_(theirs, 1.0))
        b.step()
    assert a.skipped_steps == 2
    for p, q in zip(ours, theirs, strict=True):
        close(whole(p), whole(q), 1e-5)


@pytest.mark.parametrize("of", ENGINES)
def test_one_rank_may_plan_anew(ranks, of):
    ranks.run(2, one_rank_plans_anew, of)


def a_group_is_added(clip):
    """Of shards to replicas, by whose placements torch's scaler then goes, in the step in which it finds something."""
    from torch.distributed import get_rank
    from torch.distributed.tensor import Replicate, Shard

    mesh = mesh_of(2)
    q = nn.Parameter(placed(torch.ones(3), (mesh, [Replicate()])))
    p = nn.Parameter(placed(torch.ones(4), (mesh, [Shard(0)])))
    optimizer = fusedopt.SGD([q], lr=0.1, max_grad_norm=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for t in range(2):
        q.grad = placed(torch.zeros(3), (mesh, [Replicate()]))
        if t:
            optimizer.add_param_group({"params": [p]})
            p.grad = placed(torch.ones(4), (mesh, [Shard(0)]))
            if get_rank() == 1:
                p.grad._local_tensor.fill_(math.inf)
        scaler.step(optimizer), scaler.update()
    assert optimizer.skipped_steps == 1 and scaler.get_scale() == 2 and (whole(p) == 1).all()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_group_of_shards_is_added(ranks, clip):
    ranks.run(2, a_group_is_added, clip)


def shards_join_plain_parameters():
    """Without a scaler; their first gradient is a partial sum."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = mesh_of(2)
    q = nn.Parameter(torch.zeros(3))
    p = nn.Parameter(placed(torch.zeros(4), (mesh, [Shard(0)])))
    optimizer = fusedopt.SGD([q], lr=1.0, max_grad_norm=100.0)
    for t in range(3):
        q.grad = torch.ones(3)
        if t == 1:
            optimizer.add_param_group({"params": [p]})
        p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
        optimizer.step()
        close(optimizer.grad_norm, torch.tensor(3.0 + (16.0 if t else 0)).sqrt())
    assert (q == -3).all() and (whole(p) == -4).all()


def test_shards_join_plain_parameters(ranks):
    ranks.run(2, shards_join_plain_parameters)


def partial_sums_in_every_step():
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, made, original = mesh_of(2), [], planner.plan
    planner.plan = lambda *a: made.append(1) or original(*a)
    try:
        p = nn.Parameter(placed(torch.zeros(4), (mesh, [Replicate()])))
        optimizer = fusedopt.SGD([p], lr=1.0)
        for _ in range(6):
            p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
            optimizer.step()
    finally:
        planner.plan = original
    assert len(made) == 1 and (whole(p) == -12).all()


def test_partial_sums_are_no_reason_to_plan_anew(ranks):
    ranks.run(2, partial_sums_in_every_step)


def ranks_with_nothing(clip):
    """A rank without parameters, under a scaler, which then has found nothing."""
    from torch.distributed import get_rank, group

    p = nn.Parameter(torch.ones(4))
    params = [p] if get_rank() == 0 else []
    optimizer = fusedopt.SGD([{"params": params}], lr=0.1, max_grad_norm=clip, process_group=group.WORLD)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for t in range(3):
        scale = scaler.get_scale()
        p.grad = torch.full((4,), math.inf if t == 1 else scale)
        before = p.detach().clone()
        scaler.step(optimizer), scaler.update()
        assert torch.equal(p, before) == (t == 1 or get_rank() == 1)
        if clip and t != 1:
            close(optimizer.grad_norm, torch.tensor(2.0))
    assert optimizer.skipped_steps == 1 and scaler.get_scale() == 2


@pytest.mark.parametrize("clip", [None, 100.0])
def test_a_scaler_on_a_rank_with_no_parameters(ranks, clip):
    ranks.run(2, ranks_with_nothing, clip)


def overlap():
    from torch.distributed import group
    from torch.distributed.tensor import Shard

    p = nn.Parameter(placed(torch.ones(4), (mesh_of(2), [Shard(0)])))
    p.grad = placed(torch.ones(4), (mesh_of(2), [Shard(0)]))
    optimizer = fusedopt.SGD([p], max_grad_norm=1.0, process_group=group.WORLD)
    with pytest.raises(RuntimeError, match=r"process_group has ranks \[0, 1\], among which DTensors are sharded"):
        optimizer.step()
    assert (whole(p) == 1).all()


def test_a_process_group_of_what_a_mesh_reduces_is_refused(ranks):
    ranks.run(2, overlap)


def outside():
    """A mesh that some ranks are not in."""
    from torch.distributed import get_rank
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", [0, 1])
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    p.grad = distribute_tensor(torch.ones(4), mesh, [Shard(0)])
    optimizer = fusedopt.AdamW([p], lr=0.5, max_grad_norm=100.0)
    optimizer.step()
    close(optimizer.grad_norm, torch.tensor(2.0 if get_rank() < 2 else 0.0))


def test_a_mesh_that_a_rank_is_outside_of():
    fresh = many.Ranks(4)  # torch numbers such groups by those that a process has made before
    try:
        fresh.run(4, outside)
    finally:
        fresh.stop()
