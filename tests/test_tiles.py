"""The GPU engines' kernels at odd sizes and alignments, with mixed types and strides, and step tables of all sizes.

On a GPU of both engines; without one of the CUDA engine, on host threads. What Triton interprets is in test_triton.py.
"""

import math

import pytest
import torch
from conftest import AVAILABLE, ON_GPU, engine_fixture
from helpers import (
    ALL,
    BY_NAME,
    close,
    copies,
    fill_gradients,
    fill_growing_gradients,
    params,
    randn,
    set_programs,
)

import fusedopt
from fusedopt import engines
from fusedopt.context import StepRequest
from fusedopt.engines import cuda, tables, triton
from fusedopt.passes import Pass
from fusedopt.scaling import Scaling

ENGINES = ON_GPU or [name for name in AVAILABLE if name == "cuda"]
pytestmark = pytest.mark.skipif(not ENGINES, reason="needs a GPU, or a C++ compiler")
engine = engine_fixture(ENGINES)

SIZES = {0, 1, 3, 7, 8, 9, 255, 256, 257, 263, 264, 511, 512, 520, 1031, 4097}


@pytest.fixture
def programs(monkeypatch, request, engine):
    """How many there are."""
    set_programs(monkeypatch, engine, request.param)


@pytest.fixture
def tile(engine, device):
    """Elements of a tile."""
    return cuda.load().tile if engine == "cuda" else triton.TILES[triton.backend_of(device)]


@pytest.fixture
def disorder(engine):
    """On host threads, blocks claim shares in any order, as a GPU's may by themselves."""
    switch = getattr(cuda.load() if engine == "cuda" else None, "set_disorder", lambda on: None)
    switch(True)
    yield
    switch(False)


@pytest.mark.parametrize("programs", [1, 3, 8], indirect=True)
@pytest.mark.parametrize("offset", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["AdamW amsgrad", "SGD", "Lion"])
def test_any_size_and_alignment(engine, device, tile, programs, case, dtype, offset):
    """Heads, tails, tensors that are never aligned, and any share of tiles."""
    sizes = sorted(SIZES | {tile - 1, tile, tile + 1, 2 * tile})
    ours = [torch.nn.Parameter(randn(n + offset, device=device).to(dtype)[offset:]) for n in sizes]
    theirs = copies(ours)
    a = BY_NAME[case].build(ours, engine=engine, max_grad_norm=1.0)
    b = BY_NAME[case].build(theirs, engine="eager", max_grad_norm=1.0)
    for t in range(2):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            shift = (offset + i) % 4  # sometimes aligned with the parameter, sometimes never
            p.grad = None if (t + i) % 5 == 4 else randn(p.numel() + shift, device=device).to(dtype)[shift:]
            q.grad = None if p.grad is None else p.grad.clone()
        a.step(), b.step()
        close(a.grad_norm, b.grad_norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=2e-6)


@pytest.mark.parametrize("programs", [1, 7], indirect=True)
@pytest.mark.parametrize("offset", [1000, 1001, 1003])
def test_nothing_beyond_a_row_is_touched(engine, device, programs, offset):
    memory = torch.full((6000,), 7.0, device=device)
    p = torch.nn.Parameter(memory[offset : offset + 2999])
    optimizer = fusedopt.SGD([p], lr=0.5, engine=engine)
    p.grad = torch.ones(6000, device=device)[1024 : 1024 + 2999]  # what is beyond it would be seen
    optimizer.step()
    assert (p == 6.5).all() and (memory[:offset] == 7).all() and (memory[offset + 2999 :] == 7).all()


@pytest.mark.parametrize("count", [100, 1000, 5000])
def test_step_tables_of_all_sizes(engine, device, count):
    """By value in small arguments, in large ones, and in the device's memory."""
    ours = params(*[(3,)] * count, device=device)
    whole = torch.nn.Parameter(torch.stack([p.detach() for p in ours]))
    a = fusedopt.AdamW(ours, engine=engine, max_grad_norm=1.0)
    b = fusedopt.AdamW([whole], engine="eager", max_grad_norm=1.0)
    for _ in range(2):
        fill_gradients([whole])
        for p, g in zip(ours, whole.grad.clone(), strict=True):
            p.grad = g
        a.step(), b.step()
    close(torch.stack([p.detach() for p in ours]), whole.detach())
    assert a._plans[0].step_table.by_value == (engine == "cuda" and count < 4000)


@pytest.mark.parametrize("name", ALL)
def test_one_launch_with_clipping_and_mixed_states(monkeypatch, engine, device, name):
    launches = []
    plan = engines.ENGINES[engine].plan
    launch = plan.launch
    monkeypatch.setattr(plan, "launch", lambda self, *a: launches.append(a[0]) or launch(self, *a))
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    ps = [p for dtype in dtypes for p in params((5,), (3, 2), dtype=dtype, device=device)]
    theirs = copies(ps)

    def build(parameters, engine):
        groups = [{"params": parameters[k::3], "lr": 0.01 * (k + 1), "weight_decay": 0.1 * k} for k in range(3)]
        optimizer = getattr(fusedopt, name)(groups, engine=engine, max_grad_norm=1.0)
        for switch in optimizer.rule.switches():
            optimizer.param_groups[1][switch] = 0.9 if switch == "momentum" else True
        return optimizer

    a, b = build(ps, engine), build(theirs, "eager")
    for _ in range(3):
        fill_gradients(ps)
        for p, q in zip(ps, theirs, strict=True):
            q.grad = p.grad.clone()
        a.step(), b.step()
    passes = Pass.of(a.rule, a.scope)
    after = [passes] if name in ("MBF", "Muon") else []  # of what the function of its matrices made
    assert launches == [Pass.NORM | passes, *after] * 3
    for p, q in zip(ps, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2 if p.dtype == torch.bfloat16 else 2e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["state", "gradient"])
def test_doubles_beside_narrower_parameters(engine, device, what, dtype):
    """A state that was loaded as float64, or gradients that are: too wide for a tile's sixteen bytes."""
    results = []
    for name in (engine, "eager"):
        torch.manual_seed(2)
        (p,) = params((700,), dtype=dtype, device=device)
        if what == "gradient":
            p.grad_dtype = torch.float64
        optimizer = fusedopt.SGD([p], lr=0.1, momentum=0.9, engine=name)
        for t in range(3):
            p.grad = randn(700, dtype=p.grad_dtype, device=device)
            optimizer.step()
            if t == 0 and what == "state":
                optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].double()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


def test_a_norm_that_single_precision_cannot_square(engine, device):
    ps = params((300,), (40,), device=device)
    for p in ps:
        p.grad = torch.full_like(p, 1e25)
    optimizer = fusedopt.SGD(ps, engine=engine, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    close(optimizer.grad_norm.cpu(), torch.tensor(math.sqrt(340) * 1e25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_norm_of_any_number_of_tiles(monkeypatch, engine, device, tile, dtype):
    """Of a warp: read eight, four, or one at a time. Whole numbers add up without rounding."""
    set_programs(monkeypatch, engine, 1)
    for tiles in range(1, 60):
        (p,) = params((tile * tiles + 3,), dtype=dtype, device=device)
        p.grad = (torch.arange(p.numel(), device=device) % 11 - 5).to(dtype)
        optimizer = fusedopt.SGD([p], lr=0.0, engine=engine, max_grad_norm=1.0)
        optimizer.step()
        assert float(optimizer._plans[0].status.squared_norm) == p.grad.double().square().sum()


def test_two_launches_with_a_hook_between(engine, device):
    """As ranks do that add up their norms: measured, added, and updated by the sum."""
    ours = params((70,), (300,), device=device)
    theirs = copies(ours)
    a, b = (fusedopt.SGD(ps, lr=1.0, max_grad_norm=1.0, engine=engine) for ps in (ours, theirs))
    fill_gradients(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    a.step(), b.step()
    (plan,) = b._plans
    assert plan.scan()
    squared, _, _ = plan.run(Pass.NORM, StepRequest(Scaling()), None)
    total = squared * 4
    _, norm, _ = plan.run(Pass.UPDATE, StepRequest(Scaling(), 1.0), total)
    close(norm.float(), 2 * a.grad_norm)
    for p, q in zip(ours, theirs, strict=True):
        factor = 1 / (2 * a.grad_norm + 1e-6)
        close(p.detach() - factor * p.grad, q.detach(), 1e-5)


def test_as_many_signatures_as_there_are(engine, device):
    """Every combination of types and strides of a parameter, its gradient and its state, in one launch."""
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    if engine == "triton":  # whose kernels are compiled for their signatures: for 128 it takes many minutes
        types = types[1:3]
    n = len(types)
    results = []
    for name in (engine, "eager"):
        torch.manual_seed(3)
        ps = [torch.nn.Parameter(randn(5, 7, device=device).to(a)) for a in types for _ in range(2 * n * n)]
        optimizer = fusedopt.SGD(ps, lr=0.1, momentum=0.9, engine=name)
        for i, p in enumerate(ps):
            p.grad_dtype = types[i % n]
            optimizer.state[p]["momentum_buffer"] = randn(5, 7, device=device).to(types[i // n % n])
            g = randn(7, 5, device=device).to(p.grad_dtype)
            p.grad = g.t() if i // (n * n) % 2 else g.t().contiguous()
        optimizer.step()
        results.append([p.detach().double() for p in ps])
        if name == engine:
            (plan,) = optimizer._plans
            assert len(plan.table.signatures) == 2 * n**3
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_norm_has_the_same_bits_whoever_computes_the_shares(monkeypatch, engine, device, tile, disorder):
    """The shares of four programs, computed by any number of them, which claim them in any order."""
    monkeypatch.setattr(tables, "partition", lambda n, _, sizes, cut=tables.partition: cut(n, 4, sizes))
    ps = params((390 * tile + 161,), (3, 100), (234 * tile + 97,), *[(7,)] * 50, device=device)
    fill_growing_gradients(ps, 6)
    squares = set()
    for n in (1, 2, 3, 7, 20):
        set_programs(monkeypatch, engine, n)
        optimizer = fusedopt.SGD(ps, lr=0.0, engine=engine, max_grad_norm=1.0)
        for _ in range(3):
            optimizer.step()
            squares.add(float(optimizer._plans[0].status.squared_norm))
        table = optimizer._plans[0].table
        assert (table.programs, table.n_shares) == (n, 20)
    assert len(squares) == 1
