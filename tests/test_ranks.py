"""Parameters that are sharded among ranks, against one process that has them whole."""

import math
from functools import partial

import pytest
import torch
from conftest import AVAILABLE
from helpers import close
from sharding import mesh_of, placed, replica_and_shard, whole
from torch import nn

import fusedopt
from fusedopt import planner

pytestmark = pytest.mark.xdist_group("ranks")

SHAPES = [(8, 4), (5, 3), (3,), (1, 6), (4, 2, 3)]  # among them uneven ones, and some of which ranks have nothing
OPTIMIZERS = {
    "AdamW": {"lr": 0.05, "weight_decay": 0.1},
    "SGD": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1},
    "Lion": {"lr": 0.05, "weight_decay": 0.1},
    "LAMB": {"lr": 0.05, "weight_decay": 0.1},
    "LARS": {"lr": 0.5, "trust_coefficient": 0.1, "weight_decay": 0.1},
}
ENGINES = [name for name in AVAILABLE if name != "triton"]  # interpreted, it takes a test of its own


def places(kind):
    """A mesh and placements for each of SHAPES; None for a plain parameter."""
    from torch.distributed import get_world_size
    from torch.distributed.tensor import Replicate, Shard

    world = get_world_size()
    line, square = mesh_of(world), mesh_of(2, world // 2)
    r, s, t = Replicate(), Shard(0), Shard(1)
    return {
        "fsdp": [(line, [s])] * 5,
        "hsdp": [(square, [r, s])] * 5,
        "tensor parallel": [(line, [x]) for x in (s, t, r, t, Shard(2))],
        "two dimensions": [(square, x) for x in ([s, t], [t, s], [r, s], [s, r], [s, s])],
        "mixed": [(line, [s]), None, (square, [r, s]), None, (square, [s, s])],
    }[kind]


def pair(kind, name, engine, **options):
    """Ours on parts, torch's (where torch has none, ours in eager) on the whole; two groups."""
    torch.manual_seed(1)
    theirs = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    ours = [nn.Parameter(placed(p.detach(), place)) for p, place in zip(theirs, places(kind), strict=True)]
    other = getattr(torch.optim, name, None) or partial(getattr(fusedopt, name), engine="eager")

    def groups(ps):
        return [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.02}]

    a = getattr(fusedopt, name)(groups(ours), **OPTIMIZERS[name], engine=engine, **options)
    return ours, a, theirs, other(groups(theirs), **OPTIMIZERS[name])


def compare(kind, engine, name, clip):
    ours, a, theirs, b = pair(kind, name, engine, max_grad_norm=clip)
    for t in range(4):
        for i, (p, q, place) in enumerate(zip(ours, theirs, places(kind), strict=True)):
            q.grad = None if (t + i) % 4 == 3 else torch.randn_like(q)
            p.grad = None if q.grad is None else placed(q.grad, place)
        a.step()
        if clip:
            close(a.grad_norm, nn.utils.clip_grad_norm_(theirs, clip), 1e-6)
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(whole(p), whole(q), 1e-5)
        for key, value in a.state[p].items():
            if value.dim():
                assert (type(value), value.shape, value.stride()) == (type(p.data), p.shape, p.stride())
                assert getattr(value, "placements", None) == getattr(p, "placements", None)
            close(whole(value), whole(b.state[q][key]), 1e-5)


def compare_all(kind, engine, names, clips):
    for name in names:
        for clip in clips:
            compare(kind, engine, name, clip)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tensor parallel", "two dimensions", "mixed"])
@pytest.mark.parametrize("engine", ENGINES)
def test_steps_are_those_of_one_process(ranks, engine, kind, world):
    ranks.run(world, compare_all, kind, engine, list(OPTIMIZERS), [None, 0.5])


@pytest.mark.skipif("triton" not in AVAILABLE, reason="needs Triton's interpreter")
def test_triton_steps_parts(ranks):
    ranks.run(2, compare_all, "mixed", "triton", ["AdamW"], [0.5])


def scan_in_python():
    import os

    os.environ["FUSEDOPT_HOST"] = "python"
    try:
        compare("mixed", "cuda", "AdamW", 0.5)
    finally:
        del os.environ["FUSEDOPT_HOST"]


@pytest.mark.skipif("cuda" not in AVAILABLE, reason="needs an engine that uses it")
def test_the_python_scan_sees_parts(ranks):
    ranks.run(2, scan_in_python)


def skip_together(engine):
    """What is not finite on the last rank alone is skipped by all; counters agree."""
    from torch.distributed import get_rank, get_world_size

    ours, a, _, _ = pair("fsdp", "AdamW", engine, skip_nonfinite=True)
    for t in range(4):
        for p, place in zip(ours, places("fsdp"), strict=True):
            p.grad = placed(torch.randn(p.shape), place)
        if t % 2 and get_rank() == get_world_size() - 1:
            ours[0].grad._local_tensor[-1] = math.nan
        before = [whole(p).clone() for p in ours]
        a.step()
        assert a.skipped_steps == (t + 1) // 2 and a.grad_norm.isfinite() == (t % 2 == 0)
        assert all(torch.equal(whole(p), q) == bool(t % 2) for p, q in zip(ours, before, strict=True))
    assert all(a.state[p]["step"] == 2 for p in ours)


@pytest.mark.parametrize("of", ENGINES)
def test_ranks_skip_together(ranks, of):
    ranks.run(2, skip_together, of)


def unused_experts(engine):
    """A rank without some gradients, or any, takes part all the same."""
    from torch.distributed import get_rank, get_world_size

    ours, a, _, _ = pair("fsdp", "AdamW", engine, max_grad_norm=1.0)
    for t in range(3):
        for i, (p, place) in enumerate(zip(ours, places("fsdp"), strict=True)):
            g = placed(torch.full(p.shape, t + 1.0), place)
            p.grad = g if get_rank() == 0 or (t == 1 and i != 2) else None
        a.step()
        norms = [torch.zeros_like(a.grad_norm) for _ in range(get_world_size())]
        torch.distributed.all_gather(norms, a.grad_norm)
        assert all(torch.equal(norm, norms[0]) for norm in norms) and norms[0] > 0


@pytest.mark.parametrize("of", ENGINES)
def test_a_rank_without_gradients_does_not_hang(ranks, of):
    ranks.run(2, unused_experts, of)


def sums_of_parts(engine):
    """Gradients that are partial sums, or placed otherwise: tensor parallel norms and biases have them."""
    from torch.distributed import get_rank
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, ours, theirs = replica_and_shard()
    a = fusedopt.SGD(ours, lr=0.1, max_grad_norm=1.0, engine=engine)
    b = torch.optim.SGD(theirs, lr=0.1)
    for t in range(6):
        grads = [torch.randn(4, 3) for _ in range(2)]
        if t != 2:
            ours[0].grad = DTensor.from_local(grads[0] * (get_rank() + 1), mesh, [Partial()])
            ours[1].grad = placed(grads[1], (mesh, [Replicate()]))
        else:
            ours[0].grad, ours[1].grad = (placed(g, (mesh, p.placements)) for g, p in zip(grads, ours, strict=True))
        theirs[0].grad, theirs[1].grad = grads[0] * (1 if t == 2 else 3), grads[1]
        a.step()
        close(a.grad_norm, nn.utils.clip_grad_norm_(theirs, 1.0))
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(whole(p), whole(q), 1e-5)


@pytest.mark.parametrize("of", ENGINES)
def test_gradients_are_brought_to_where_parameters_are(ranks, of):
    ranks.run(2, sums_of_parts, of)


def one_plan():
    """Another DTensor around the same memory is no reason to plan anew, and other memory is seen."""
    from torch.distributed.tensor import DTensor

    made = []
    original = planner.plan
    planner.plan = lambda *a: made.append(1) or original(*a)
    try:
        mesh, placements = places("fsdp")[0]
        p = nn.Parameter(placed(torch.ones(8, 4), (mesh, placements)))
        optimizer = fusedopt.SGD([p], lr=1.0, max_grad_norm=math.inf, engine="cpu")
        for t in range(8):
            gradient = torch.ones_like(p._local_tensor)
            p.grad = DTensor.from_local(gradient, mesh, placements, run_check=False)
            if t % 2:
                p._local_tensor = p._local_tensor.view_as(p._local_tensor)
            optimizer.step()
        assert len(made) == 1 and (whole(p) == -7).all()
        p._local_tensor = p._local_tensor.clone()
        optimizer.step()
        assert len(made) == 2 and (whole(p) == -8).all()
    finally:
        planner.plan = original


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
def test_a_new_dtensor_around_the_same_part_is_no_new_plan(ranks):
    ranks.run(2, one_plan)


def refusals(engine):
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = mesh_of(2)
    p = nn.Parameter(placed(torch.ones(4, 3), (mesh, [Shard(0)])))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4, 3), mesh, [Partial()]))
    partial.grad = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    for ps, state, expected in (
        ([partial], None, "sum of parts"),
        ([p], {"momentum_buffer": torch.ones(4, 3)}, "state 'momentum_buffer' of parameter 0 .* is no DTensor"),
        ([p], {"momentum_buffer": placed(torch.ones(4, 3), (mesh, [Shard(1)]))}, "placed as .*the parameter as"),
    ):
        optimizer = fusedopt.SGD(ps, momentum=0.9, engine=engine)
        p.grad = placed(torch.ones(4, 3), (mesh, [Shard(0)]))
        if state:
            optimizer.state[ps[0]].update(state)
        before = whole(p).clone()
        with pytest.raises((RuntimeError, ValueError), match=expected):
            optimizer.step()
        assert torch.equal(whole(p), before)
    for wrong in (3, "world", [0, 1]):
        with pytest.raises(TypeError, match="process_group is .*must be a torch.distributed.ProcessGroup"):
            fusedopt.SGD([p], process_group=wrong)


def test_what_does_not_fit_is_refused(ranks):
    ranks.run(2, refusals, "auto")
