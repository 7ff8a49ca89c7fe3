"""Each row's step is counted once, by whoever updates it or by the last: in the engines that step by tables."""

import random
from bisect import bisect_right
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import AVAILABLE
from helpers import close, params, set_programs

import fusedopt
from fusedopt.engines import cuda, tables, triton

TABLES = [name for name in ("cuda", "triton") if name in AVAILABLE]


@pytest.fixture(params=TABLES)
def engine(request):
    return request.param


@pytest.fixture(params=[1, 3, 8])
def programs(monkeypatch, engine, request):
    """How many there are; on the cuda engine, several claim shares in any order."""
    monkeypatch.setattr(triton, "INTERPRETED_PROGRAMS", request.param)
    monkeypatch.setattr(triton, "INTERPRETED_TILE", 256)
    if engine == "cuda":
        set_programs(monkeypatch, engine, request.param)
        cuda.load().set_disorder(request.param > 1)
    yield request.param
    if engine == "cuda":
        cuda.load().set_disorder(False)


def build(name, shapes, engine, steps):
    """An optimizer of two groups whose parameters have done some steps already, and its twin."""
    ours = params(*shapes)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    made = []
    for ps, which in ((ours, engine), (theirs, "eager")):
        groups = [{"params": ps[::2], "lr": 0.01}, {"params": ps[1::2], "lr": 0.02, "weight_decay": 0.1}]
        made.append(getattr(fusedopt, name)(groups if steps is None else ps, lr=0.01, engine=which))
        for p in ps:
            p.grad = torch.ones_like(p)
        made[-1].step()
        for p, step in zip(ps, steps or (), strict=False):
            made[-1].state[p]["step"].fill_(step)
    return ours, theirs, *made


def step_both(ours, theirs, a, b, without):
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad = None if without(i) else torch.randn_like(p)
        q.grad = None if p.grad is None else p.grad.clone()
    a.step(), b.step()


def same(ours, theirs, a, b):
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=5e-6, atol=5e-6)
        assert a.state[p]["step"] == b.state[q]["step"]
        if "mu_product" in a.state[p]:
            close(a.state[p]["mu_product"], b.state[q]["mu_product"])


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_empty_rows_and_rows_across_borders_are_counted_once(engine, programs, name):
    sizes = [0, 1, 0, 0, 3000, 256, 255, 257, 0, 512, 1, 1, 9000, 0, 700, 0]
    what = build(name, [(n,) for n in sizes], engine, None)
    for t in range(3):
        step_both(*what, lambda i, t=t: (i + t) % 5 == 4)
    same(*what)
    table = what[2]._plans[0].table
    assert table.n_borders >= sizes.count(0) + (programs > 1)


@pytest.mark.parametrize("rows", ["few counters", "many counters", "groups"])
def test_thousands_of_small_rows(engine, programs, rows):
    """Cohorts of many rows and of one, with rows without a gradient among them."""
    rng = random.Random(5)
    n = 2000 if engine == "cuda" else 100
    shapes = [(rng.choice((0, 1, 5, 64, 300)) if rows == "groups" else 5,) for _ in range(n)]
    steps = {"few counters": [1 + i // 100 for i in range(n)], "many counters": [1 + i % 3 for i in range(n)]}.get(rows)
    what = build("NAdam", shapes, engine, steps)
    step_both(*what, lambda i: i % 7 == 3 or 20 < i % 200 < 60)
    same(*what)


def test_a_skipped_step_is_not_counted(engine, programs):
    ours, _, a, _ = build("AdamW", [(0,), (3000,), (5,), (7,)], engine, None)
    before = [p.detach().clone() for p in ours]
    a.skip_nonfinite = True
    for p in ours:
        p.grad = torch.full_like(p, float("inf"))
    a.step()
    assert a.skipped_steps == 1 and all(a.state[p]["step"] == 1 for p in ours)
    assert all(torch.equal(p, q) for p, q in zip(ours, before, strict=True))


# ------------------------------------------------------------------------------------------------------ the tables


@pytest.mark.parametrize("sizes", [tables.SHARE_SIZES, triton.SHARE_SIZES, (1,)], ids=str)
def test_borders_are_the_rows_that_no_share_has_whole(engine, sizes, monkeypatch):
    monkeypatch.setattr(tables, "SHARE_SIZES", sizes)
    monkeypatch.setattr(triton, "SHARE_SIZES", sizes)
    monkeypatch.setattr(triton, "INTERPRETED_PROGRAMS", 3)
    monkeypatch.setattr(triton, "INTERPRETED_TILE", 256)
    if engine == "cuda":
        set_programs(monkeypatch, engine, 3)
    rng = random.Random(1)
    for _ in range(10):
        ps = params(*[(rng.choice((0, 5, 256, 700, 5000, 40_000)),) for _ in range(rng.randint(1, 60))])
        optimizer = fusedopt.SGD(ps, engine=engine)
        ps[0].grad = torch.ones_like(ps[0])
        optimizer.step()
        table = optimizer._plans[0].table
        ends, begins = list(accumulate(-(-p.numel() // 256) for p in ps)), [b for b, _ in table.shares.tolist()]
        spans = list(pairwise(begins))
        found = [
            i
            for i, (first, end) in enumerate(pairwise([0, *ends]))
            if first == end or not any(begin <= first and end <= stop for begin, stop in spans)
        ]
        assert table.borders.tolist()[: table.n_borders] == found
        assert all(bisect_right(begins, begin) for begin in begins)


def test_rows_of_other_plans_are_no_borders():
    """They have no gradient here, ever, and no addresses."""
    optimizer = SimpleNamespace(param_groups=[{"params": params((0,), (5,), (0,))}], state={}, rule=fusedopt.SGD.rule)
    optimizer.param_groups[0]["momentum"] = 0
    rows = tables.Rows(optimizer, [1, 2], torch.device("cpu"), ((), ()), 2, 256, (1,), None)
    assert rows.borders.tolist() == [2] and (rows.count, rows.n_borders) == (3, 1)


def makespan(sizes, per_processor, cut):
    """When the last program ends that claims shares, the last first, over when they would end if all ended at once."""
    shares = sorted((size for size in sizes for _ in range(cut)), reverse=True)
    ends = [0] * per_processor
    for share in shares:
        ends[ends.index(min(ends))] += share
    return max(ends) / (sum(shares) / per_processor)


def test_shares_of_triton_suit_any_number_of_programs():
    for programs in range(4, 17):
        assert makespan(triton.SHARE_SIZES, programs, triton.CUT_PER_PROCESSOR) < 1.1, programs
    assert makespan(tables.SHARE_SIZES, 6, 8) > 1.3  # which are cut for as many programs as there are


@pytest.mark.skipif("cuda" not in AVAILABLE, reason="needs the engine on host threads")
def test_all_tables_are_kept_for_graphs_and_streams():
    ps = params((5,))
    ps[0].grad = torch.ones(5)
    optimizer = fusedopt.AdamW(ps, engine="cuda")
    optimizer.step()
    (plan,) = optimizer._plans
    assert isinstance(plan, cuda.CudaPlan) and any(t is plan.table.borders for t in plan.tensors())
