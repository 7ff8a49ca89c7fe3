"""Rules that add up over every scope, on parameters that are sharded among ranks, against one process."""

from contextlib import contextmanager

import pytest
import rule_builds
import torch
from conftest import AVAILABLE
from helpers import close
from sharding import mesh_of, placed, whole
from sum_rules import SCOPED
from torch import nn

from fusedopt.engines import cpu, cuda

pytestmark = pytest.mark.xdist_group("ranks")

SHAPES = [(8, 4), (5, 3), (3,), (1, 6), (4, 2, 3)]


@contextmanager
def knowing(engine):
    """The engine has the rules of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        if engine == "cpu":
            known = {**cpu.kernels(), **rule_builds.cpu_kernels()}
            patch.setattr(cpu, "kernels", lambda: known)
        elif engine == "cuda":
            patch.setattr(cuda, "load", rule_builds.cuda_extension)
            cuda.kernels.cache_clear()
        elif engine == "triton":
            import triton_rules

            triton_rules.know(patch)
        try:
            yield
        finally:
            cuda.kernels.cache_clear()


def places(kind):
    """As in test_ranks.py."""
    from torch.distributed import get_world_size
    from torch.distributed.tensor import Replicate, Shard

    world = get_world_size()
    line, square = mesh_of(world), mesh_of(2, world // 2)
    r, s, t = Replicate(), Shard(0), Shard(1)
    return {
        "fsdp": [(line, [s])] * 5,
        "tensor parallel": [(line, [x]) for x in (s, t, r, t, Shard(2))],
        "two dimensions": [(square, x) for x in ([s, t], [t, s], [r, s], [s, r], [s, s])],
        "mixed": [(line, [s]), None, (square, [r, s]), None, (square, [s, s])],
    }[kind]


def compare(kind, engine):
    with knowing(engine):
        for of, scope in SCOPED:
            torch.manual_seed(1)
            theirs = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
            ours = [nn.Parameter(placed(p.detach(), place)) for p, place in zip(theirs, places(kind), strict=True)]

            def groups(ps):
                return [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.02}]

            a = of(groups(ours), scope=scope, engine=engine, max_grad_norm=2.0)
            b = of(groups(theirs), scope=scope, engine="eager", max_grad_norm=2.0)
            for t in range(4):
                for i, (p, q, place) in enumerate(zip(ours, theirs, places(kind), strict=True)):
                    q.grad = None if (t + i) % 4 == 3 else torch.randn_like(q)
                    p.grad = None if q.grad is None else placed(q.grad, place)
                a.step(), b.step()
            for p, q in zip(ours, theirs, strict=True):
                close(whole(p), whole(q), 1e-5)
                for key, value in a.state[p].items():
                    close(whole(value), whole(b.state[q][key]), 1e-5)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("kind", ["fsdp", "tensor parallel", "two dimensions", "mixed"])
@pytest.mark.parametrize("engine", AVAILABLE)
def test_sums_are_those_of_one_process(ranks, engine, kind, world):
    rule_builds.cpu_kernels(), rule_builds.cuda_extension()  # once, and not by all ranks
    ranks.run(world, compare, kind, engine)


def compare_process_group(engine):
    """Each rank has parameters of its own; scopes span them where they are more than a tensor."""
    import torch.distributed as dist

    with knowing(engine):
        for of, scope in SCOPED:
            torch.manual_seed(2)
            world, rank = dist.get_world_size(), dist.get_rank()
            theirs = [nn.Parameter(torch.randn(3, k + 1)) for k in range(2 * world)]
            ours = [nn.Parameter(p.detach().clone()) for p in theirs[2 * rank : 2 * rank + 2]]
            a = of([{"params": [p]} for p in ours], scope=scope, engine=engine, process_group=dist.group.WORLD)
            b = of([{"params": theirs[0::2]}, {"params": theirs[1::2]}], scope=scope, engine="eager")
            for _ in range(3):
                for q in theirs:
                    q.grad = torch.randn_like(q)
                for p, q in zip(ours, theirs[2 * rank : 2 * rank + 2], strict=True):
                    p.grad = q.grad.clone()
                a.step(), b.step()
            for p, q in zip(ours, theirs[2 * rank : 2 * rank + 2], strict=True):
                close(p, q, 1e-5)


@pytest.mark.parametrize("engine", AVAILABLE)
def test_scopes_span_a_process_group(ranks, engine):
    rule_builds.cpu_kernels(), rule_builds.cuda_extension()
    ranks.run(2, compare_process_group, engine)
