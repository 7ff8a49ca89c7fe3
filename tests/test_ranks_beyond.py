"""MBF, EntropySGD and ReplicatedSGD of parameters that ranks share: as one process steps them."""

import pytest
import torch
from conftest import AVAILABLE
from helpers import close
from sharding import mesh_of, placed, whole
from torch import nn

import fusedopt

pytestmark = pytest.mark.xdist_group("ranks")

# Kernels, a matrix with fewer rows than ranks, one with many, and a vector; of replicas, stacks of three.
SHAPES = [(4, 3, 3, 3), (1, 5), (7, 6), (5,)]
STACKED = [(8,), (5, 4), (), (2, 6)]


def places(kind, dims):
    from torch.distributed import get_world_size
    from torch.distributed.tensor import Replicate, Shard

    world = get_world_size()
    line, square = mesh_of(world), mesh_of(2, world // 2)
    r, s = Replicate(), Shard(0)
    return {
        "fsdp": [(line, [s])] * len(dims),
        "kernels": [(line, [Shard(1) if d > 2 else s if d > 1 else r]) for d in dims],
        "other dimensions": [(line, [Shard(d - 1)]) for d in dims],
        "hsdp": [(square, [r, s])] * len(dims),
        "both": [(square, [s, Shard(1) if d > 2 else s]) for d in dims],
        "mixed": [(line, [s]) if k % 2 else None for k in range(len(dims))],
    }[kind]


def compare(name, options, shapes, kind, engine):
    where = places(kind, [len(shape) for shape in shapes])
    options = {**options, "engine": engine, **({"max_grad_norm": 1.0} if kind != "mixed" else {})}
    make = getattr(fusedopt, name)
    torch.manual_seed(1)
    start = [torch.randn(shape) for shape in shapes]
    ours = [nn.Parameter(placed(t, place)) for t, place in zip(start, where, strict=True)]
    alone = [nn.Parameter(t.clone()) for t in start]
    a, b = make(ours, **options), make(alone, **options)
    for t in range(7):
        for k, (p, q, place) in enumerate(zip(ours, alone, where, strict=True)):
            g = torch.randn(q.shape)
            p.grad, q.grad = (None, None) if (t + k) % 4 == 3 else (placed(g, place), g)
        a.step(), b.step()
        if t == 3:
            saved = a.state_dict()
            a = make(ours, **options)
            a.load_state_dict(saved)
    for p, q in zip(ours, alone, strict=True):
        close(whole(p), q.detach(), 1e-5)
        for state, value in b.state[q].items():
            found = a.state[p][state]
            assert found.shape == value.shape
            close(whole(found), value, 1e-4)
        if name == "ReplicatedSGD" and whole(a.mean_of(p)).shape == q.shape[1:]:
            close(whole(a.mean_of(p)), b.mean_of(q), 1e-5)


@pytest.mark.parametrize("kind", ["fsdp", "kernels", "hsdp", "both", "mixed"])
@pytest.mark.parametrize("engine", AVAILABLE)
def test_blocks_are_those_of_one_process(ranks, engine, kind):
    options = {"lr": 0.05, "damping": 0.3, "inverse_every": 3}
    ranks.run(4 if kind in ("hsdp", "both") else 2, compare, "MBF", options, SHAPES, kind, engine)


@pytest.mark.parametrize("kind", ["fsdp", "other dimensions", "mixed"])
@pytest.mark.parametrize("engine", AVAILABLE)
def test_loops_are_those_of_one_process(ranks, engine, kind):
    """With the same noise."""
    ranks.run(2, compare, "EntropySGD", {"lr": 0.9, "L": 3, "noise": 0.1, "gamma0": 0.3}, SHAPES, kind, engine)


@pytest.mark.parametrize(
    ("kind", "replicas"), [("fsdp", 3), ("fsdp", 4), ("other dimensions", 3), ("hsdp", 4), ("hsdp", 3), ("mixed", 3)]
)
@pytest.mark.parametrize("engine", AVAILABLE)
def test_replicas_are_drawn_together_across_ranks(ranks, engine, kind, replicas):
    """Where ranks have as many, or not."""
    options = {"lr": 0.1, "momentum": 0.9, "replicas": replicas, "gamma0": 0.5}
    shapes = [(replicas, *shape) for shape in STACKED]
    ranks.run(4 if kind == "hsdp" else 2, compare, "ReplicatedSGD", options, shapes, kind, engine)


def refuse(engine):
    from torch.distributed.tensor import Shard

    p = nn.Parameter(placed(torch.randn(4, 6), (mesh_of(2), [Shard(1)])))
    optimizer = fusedopt.MBF([p], engine=engine)
    p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="which cuts its blocks, and its group says algorithm='blocks'; say 'diag"):
        optimizer.step()
    assert not optimizer.state


@pytest.mark.parametrize("engine", AVAILABLE)
def test_blocks_that_are_cut_are_refused(ranks, engine):
    ranks.run(2, refuse, engine)


def resumed(name, options, engine):
    """A model that fully_shard has sharded, whose optimizer's state goes through torch's own functions, whole."""
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.fsdp import fully_shard

    def made():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(96, 5), nn.Linear(5, 3))
        fully_shard(model, mesh=mesh_of(2))
        return model, getattr(fusedopt, name)(model.parameters(), engine=engine, **options)

    def advance(model, optimizer, steps):
        for t in steps:
            torch.manual_seed(t)
            optimizer.zero_grad()
            model(torch.randn(4, 2, 6, 6)).square().mean().backward()
            optimizer.step()

    model, optimizer = made()
    advance(model, optimizer, range(4))
    other, again = made()
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            q.copy_(p)
    whole_state = dcp.StateDictOptions(full_state_dict=True)
    saved = dcp.get_optimizer_state_dict(model, optimizer, options=whole_state)
    dcp.set_optimizer_state_dict(other, again, saved, options=whole_state)  # which steps once, with a rate of 0
    advance(model, optimizer, range(4, 8)), advance(other, again, range(4, 8))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(whole(p), whole(q))


@pytest.mark.parametrize(
    ("name", "options"),
    [("MBF", {"inverse_every": 3, "lr": 1e-2}), ("EntropySGD", {"L": 3, "inner_momentum": 0.5, "noise": 0.1})],
)
@pytest.mark.parametrize("engine", AVAILABLE)
def test_fsdp2_resumes_bit_for_bit(ranks, engine, name, options):
    ranks.run(2, resumed, name, options, engine)
