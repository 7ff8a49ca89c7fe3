"""Muon, Prodigy and schedule-free steps of parameters that ranks share: as one process steps them."""

import pytest
import torch
from conftest import AVAILABLE
from helpers import close
from sharding import mesh_of, placed, whole
from torch import nn

import fusedopt

pytestmark = pytest.mark.xdist_group("ranks")

SHAPES = [(8, 4), (5, 3), (3,), (1, 6), (4, 2, 3), (8, 4), (8, 4), (6, 6)]


def places(kind):
    from torch.distributed import get_world_size
    from torch.distributed.tensor import Replicate, Shard

    world = get_world_size()
    line, square = mesh_of(world), mesh_of(2, world // 2)
    r, s, t = Replicate(), Shard(0), Shard(1)
    return {
        "fsdp": [(line, [s])] * 8,
        "tensor parallel": [(line, [x]) for x in (s, t, r, t, Shard(2), t, r, s)],
        "two dimensions": [(square, x) for x in ([s, t], [t, s], [r, s], [s, r], [s, s], [r, t], [r, s], [t, r])],
        "mixed": [(line, [s]), None, (square, [r, s]), None, (square, [s, s]), None, (line, [t]), (square, [r, r])],
    }[kind]


def compare(kind, engine):
    where = places(kind)
    for dtype in (torch.float32, torch.bfloat16):
        options = {"lr": 0.05, "engine": engine, "ns_dtype": torch.float64}
        options |= {"max_grad_norm": 1.0} if kind != "mixed" else {}
        options |= {"master": "fp32", "average": fusedopt.EMA(0.5)} if dtype == torch.bfloat16 else {}
        torch.manual_seed(1)
        start = [torch.randn(shape).to(dtype) for shape in SHAPES]
        ours = [nn.Parameter(placed(t, place)) for t, place in zip(start, where, strict=True)]
        alone = [nn.Parameter(t.clone()) for t in start]
        a, b = fusedopt.Muon(ours, **options), fusedopt.Muon(alone, **options)
        for t in range(5):
            for k, (p, q, place) in enumerate(zip(ours, alone, where, strict=True)):
                g = torch.randn(q.shape).to(dtype)
                p.grad, q.grad = (None, None) if (t + k) % 4 == 3 else (placed(g, place), g)
            a.step(), b.step()
            if t == 2:
                saved = a.state_dict()
                a = fusedopt.Muon(ours, **options)
                a.load_state_dict(saved)
        for p, q in zip(ours, alone, strict=True):
            close(whole(p), q.detach())
            for name, value in b.state[q].items():
                close(whole(a.state[p][name]), value)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["fsdp", "tensor parallel", "two dimensions", "mixed"])
@pytest.mark.parametrize("engine", AVAILABLE)
def test_steps_are_those_of_one_process(ranks, engine, kind, world):
    ranks.run(world, compare, kind, engine)


def compare_others(kind, engine):
    """One estimate for all ranks, and swaps of what each has."""
    where = places(kind)
    options = {"engine": engine, "max_grad_norm": 1.0}
    for make in (
        lambda ps: fusedopt.Prodigy(ps, d0=1e-3, **options),
        lambda ps: fusedopt.ScheduleFreeAdamW(ps, lr=0.05, **options),
    ):
        torch.manual_seed(1)
        start = [torch.randn(shape) for shape in SHAPES]
        ours = [nn.Parameter(placed(t, place)) for t, place in zip(start, where, strict=True)]
        alone = [nn.Parameter(t.clone()) for t in start]
        a, b = make(ours), make(alone)
        for t in range(6):
            for k, (p, q, place) in enumerate(zip(ours, alone, where, strict=True)):
                g = q.detach() + 0.1 * torch.randn(q.shape)
                p.grad, q.grad = (None, None) if (t + k) % 5 == 4 else (placed(g, place), g)
            a.step(), b.step()
            if t == 3 and hasattr(a, "eval"):
                a.eval(), b.eval()
                for p, q in zip(ours, alone, strict=True):
                    close(whole(p), q.detach(), 1e-5)
                a.train(), b.train()
        if hasattr(a, "d"):
            close(a.d, b.d, 1e-5)
        for p, q in zip(ours, alone, strict=True):
            close(whole(p), q.detach(), 1e-5)


@pytest.mark.parametrize("kind", ["fsdp", "two dimensions"])
@pytest.mark.parametrize("engine", AVAILABLE)
def test_estimates_and_swaps_are_those_of_one_process(ranks, engine, kind):
    ranks.run(2, compare_others, kind, engine)


def fsdp2(engine):
    """A model that fully_shard has sharded, trained by Muon as it is by one process."""
    from torch.distributed.fsdp import fully_shard

    def trained(shards):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 5))
        if shards:
            for layer in model:
                fully_shard(layer, mesh=mesh_of(torch.distributed.get_world_size()))
            fully_shard(model, mesh=mesh_of(torch.distributed.get_world_size()))
        optimizer = fusedopt.Muon(fusedopt.muon_groups(model), lr=0.05, max_grad_norm=1.0, engine=engine)
        for t in range(4):
            torch.manual_seed(t)
            loss = model(torch.randint(11, (6,))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return [whole(p) for p in model.parameters()]

    for p, q in zip(trained(True), trained(False), strict=True):
        close(p, q, 1e-4)


@pytest.mark.parametrize("engine", AVAILABLE)
def test_fsdp2(ranks, engine):
    ranks.run(2, fsdp2, engine)
