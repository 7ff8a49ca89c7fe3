"""On a GPU: the gate for real, graphs, streams, sizes and launches. `make gpu` runs them."""

import pytest
import torch
from conftest import ON_GPU, engine_fixture
from helpers import ALL, assert_same, close, copies, decay, fill_gradients, params, set_programs, snapshot

import fusedopt
from fusedopt import engines
from fusedopt.bench.arena import kernels
from fusedopt.bench.rows import Result
from fusedopt.cli import main
from fusedopt.engines import cuda, tables
from fusedopt.verification import gate
from fusedopt.verification.cases import CASES

pytestmark = [
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU"),
    pytest.mark.filterwarnings("default"),  # of streams, contexts and prototypes, which differ between versions
]
engine = engine_fixture(ON_GPU)


@pytest.fixture(autouse=True)
def has_the_rule(request):
    """nvcc is not asked to compile SWATS."""
    asked = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    name = asked.get("name", getattr(asked.get("case"), "optimizer", ""))
    one_of_all = request.node.name.startswith("test_gpu_engines_agree")
    if name == "SWATS" and (asked.get("engine") == "cuda" or one_of_all):
        pytest.skip("engine 'cuda' has no SWATS")


@pytest.mark.parametrize("dtype", gate.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate(case, engine, dtype):
    result = gate.compare(case, engine, dtype)
    assert result.passed, result


def test_auto_takes_an_engine_for_gpus(device):
    (p,) = params((5,), device=device)
    fill_gradients([p])
    optimizer = fusedopt.AdamW([p])
    optimizer.step()
    assert optimizer._plans[0].asynchronous and optimizer.state[p]["step"].device.type == device.type


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("name", ALL)
def test_engines_agree(engine, device, name, clip):
    """With eager, in double precision: two groups, mixed shapes, a gradient missing now and then."""
    ours = params((0,), (), (5,), (1025,), (70, 33), (4, 3, 5, 5), dtype=torch.float64, device=device)
    theirs = copies(ours)

    def groups(ps):
        return [{"params": ps[:3], "lr": 0.05}, {"params": ps[3:], "weight_decay": 0.1}]

    a = getattr(fusedopt, name)(groups(ours), max_grad_norm=clip, engine=engine)
    b = getattr(fusedopt, name)(groups(theirs), max_grad_norm=clip, engine="eager")
    for t in range(6):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if (t + i) % 4 == 3 else torch.randn_like(p)
            q.grad = None if p.grad is None else p.grad.clone()
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-7)  # a product in float32 is kept in both


@pytest.mark.skipif(len(ON_GPU) < 2, reason="needs two engines for GPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_gpu_engines_agree_with_one_another(name, dtype):
    """Three steps apart by rounding alone."""
    results = []
    for engine in ON_GPU:
        torch.manual_seed(5)
        ps = params((5000,), (33, 7), (), dtype=dtype, device=engines.ENGINES[engine].home())
        optimizer = getattr(fusedopt, name)(ps, engine=engine, max_grad_norm=1.0, **decay(name))
        for _ in range(3):
            fill_gradients(ps)
            optimizer.step()
        results.append(ps)
    for p, q in zip(*results[:2], strict=True):
        close(p.float(), q.float(), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", ALL)
def test_graph_with_a_learning_rate_that_changes(engine, device, name, clip):
    ours = params((40,), (33, 7), (2000,), device=device)
    theirs = copies(ours)
    lr = torch.tensor(0.01, device=device)
    a = getattr(fusedopt, name)(ours, lr=lr, max_grad_norm=clip, engine=engine)
    b = getattr(fusedopt, name)(theirs, lr=0.01, max_grad_norm=clip, engine="eager")
    gradients = [[torch.randn_like(p) for p in ours] for _ in range(6)]
    for p, q, g in zip(ours, theirs, gradients[0], strict=True):
        p.grad, q.grad = g.clone(), g.clone()
    a.step(), b.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = snapshot(a)
    with torch.cuda.graph(graph):
        a.step()
        doubled = 2 * a.grad_norm if clip else None
    assert_same(snapshot(a), before)
    for t, step in enumerate(gradients[1:]):
        lr.fill_(0.01 * (t + 1))
        b.param_groups[0]["lr"] = 0.01 * (t + 1)
        for p, q, g in zip(ours, theirs, step, strict=True):
            p.grad.copy_(g)
            q.grad.copy_(g)
        graph.replay()
        b.step()
        if clip:
            close(a.grad_norm, b.grad_norm, 1e-5)
            close(doubled, 2 * a.grad_norm)
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-5)
        for key, value in b.state[q].items():
            close(a.state[p][key].cpu(), value.cpu(), 1e-5)


def test_graphs_and_steps_take_turns(engine, device):
    """Each graph has its own gradients; an eager step between replays has others."""
    ours = params((300,), (7,), device=device)
    theirs = copies(ours)
    a = fusedopt.AdamW(ours, engine=engine, max_grad_norm=1.0)
    b = fusedopt.AdamW(theirs, engine="eager", max_grad_norm=1.0)
    sets = [[torch.randn_like(p) for p in ours] for _ in range(3)]

    def give(step):
        for p, q, g in zip(ours, theirs, step, strict=True):
            p.grad, q.grad = g, g

    give(sets[0])
    a.step(), b.step()
    graphs = []
    for step in sets[1:]:
        graphs.append(torch.cuda.CUDAGraph())
        give(step)
        with torch.cuda.graph(graphs[-1]):
            a.step()
    for k in (1, 0, 2, 1, 2, 0, 0, 1):
        give(sets[k])
        graphs[k - 1].replay() if k else a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-5)


def test_a_whole_training_step_in_a_graph(engine, device):
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)).to(device)
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.01, engine=engine, max_grad_norm=1.0)
    x, y = torch.randn(64, 16, device=device), torch.randn(64, 1, device=device)

    def loss():
        return (model(x) - y).square().mean()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    start = loss().item()
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss().backward()
        optimizer.step()
    for _ in range(200):
        graph.replay()
    assert loss().item() < 0.5 * start
    assert {int(optimizer.state[p]["step"]) for p in model.parameters()} == {203}


def test_capture_refuses_what_a_graph_cannot_do(engine, device):
    ps = params((5,), (6,), device=device)
    optimizer = fusedopt.AdamW(ps, engine=engine)
    fill_gradients(ps)
    for message, prepare in (
        ("do a step before the capture", lambda: None),
        ("has no gradient", lambda: (optimizer.step(), setattr(ps[1], "grad", None))),
    ):
        prepare()
        before = snapshot(optimizer)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
        assert_same(snapshot(optimizer), before)
    fill_gradients(ps)
    optimizer.step()
    assert not torch.equal(ps[1], before[0][1])


def test_side_stream(engine, device):
    """The step runs where the gradients are made; it would be too early on another stream."""
    ours = params((1 << 22,), device=device)
    theirs = copies(ours)
    a, b = (fusedopt.SGD(ps, lr=0.1, momentum=0.9, engine=e) for ps, e in ((ours, engine), (theirs, "eager")))
    side = torch.cuda.Stream()
    busy = torch.randn(3000, 3000, device=device)
    for _ in range(3):
        gradient = torch.randn_like(ours[0])
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(10):
                busy = busy @ busy / 100
            ours[0].grad = gradient * 2
            a.step()
        torch.cuda.current_stream().wait_stream(side)
        theirs[0].grad = gradient * 2
        b.step()
    close(ours[0], theirs[0])


def test_other_current_device(engine, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ps = [*params((50,), device="cuda:0"), *params((60,), device="cuda:1")]
    theirs = copies(ps)
    a, b = (fusedopt.AdamW(x, engine=e, max_grad_norm=0.1) for x, e in ((ps, engine), (theirs, "eager")))
    with torch.cuda.device(1):
        for _ in range(3):
            fill_gradients(ps)
            for p, q in zip(ps, theirs, strict=True):
                q.grad = p.grad.clone()
            a.step(), b.step()
    for p, q in zip(ps, theirs, strict=True):
        close(p, q)


def test_beyond_two_to_the_31_elements(engine, device):
    n = 2**31 + 4097
    if torch.cuda.mem_get_info()[0] < 3 * 2 * n:
        pytest.skip("needs 13 GB of free memory")
    p = torch.nn.Parameter(torch.ones(n, device=device, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = fusedopt.SGD([p], lr=0.5, engine=engine, max_grad_norm=float("inf"))
    optimizer.step()
    for part in p.detach().split(1 << 28):
        assert (part == 0.5).all()
    close(optimizer.grad_norm.cpu(), torch.tensor(n).sqrt())


def test_twenty_thousand_tensors(engine, device):
    sizes = [1 + k % 97 for k in range(20_000)]
    memory = torch.randn(sum(sizes), device=device)
    ours = [torch.nn.Parameter(part.clone()) for part in memory.split(sizes)]
    whole = torch.nn.Parameter(memory.clone())
    gradient = torch.randn_like(memory)
    a = fusedopt.AdamW(ours, engine=engine, max_grad_norm=1.0)
    b = fusedopt.AdamW([whole], engine="eager", max_grad_norm=1.0)
    for _ in range(3):
        for p, g in zip(ours, gradient.split(sizes), strict=True):
            p.grad = g.clone()
        whole.grad = gradient
        a.step(), b.step()
    close(torch.cat([p.detach() for p in ours]), whole.detach())


@pytest.mark.parametrize("clip", [None, 1.0])
def test_launches_per_step(engine, device, clip):
    ps = [p for dtype in (torch.float32, torch.bfloat16) for p in params(*[(50,)] * 40, dtype=dtype, device=device)]
    groups = [{"params": ps[k::4], "lr": 0.01 * k} for k in range(4)]
    optimizer = fusedopt.AdamW(groups, engine=engine, max_grad_norm=clip)
    fill_gradients(ps)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            optimizer.step()
        torch.cuda.synchronize()
    launched = [name for name, _ in kernels(profile.profiler.kineto_results.events())]
    assert len(launched) == 5 * (2 if clip and engine == "triton" else 1), launched


def test_two_launches_where_one_does_not_fit(monkeypatch, engine, device):
    """More programs than all processors hold together, and one on each, with the same shares: the same bits."""
    if engine != "cuda":
        pytest.skip("it always launches twice")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    too_many = 33 * processors  # 32 are the most that any processor holds
    monkeypatch.setattr(tables, "partition", lambda n, _, sizes, cut=tables.partition: cut(n, too_many, sizes))
    results = []
    for programs in (processors, too_many):
        torch.manual_seed(0)
        set_programs(monkeypatch, engine, programs)
        ps = params((too_many * cuda.load().tile + 1,), (3, 100), device=device)
        optimizer = fusedopt.AdamW(ps, engine=engine, max_grad_norm=1.0)
        for _ in range(3):
            fill_gradients(ps)
            optimizer.step()
        (plan,) = optimizer._plans
        assert (plan.table.programs, plan._launcher.in_one_launch) == (programs, programs == processors)
        results.append([*(p.detach() for p in ps), optimizer.grad_norm, optimizer.state[ps[0]]["step"]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_nothing_waits_for_the_device(engine, device):
    ps = params(*[(50,)] * 10, device=device)
    optimizer = fusedopt.AdamW(ps, engine=engine, max_grad_norm=1.0, skip_nonfinite=True)
    fill_gradients(ps)
    for _ in range(3):
        optimizer.step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for t in range(20):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 / (t + 1)
            for p in ps:
                p.grad = torch.randn_like(p)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(engine, device, unscale):
    ours = params((31,), (6, 5), device=device)
    theirs = copies(ours)
    a = fusedopt.AdamW(ours, max_grad_norm=0.7, engine=engine)
    b = torch.optim.AdamW(theirs, foreach=False)
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=3) for _ in range(2)]
    for t in range(8):
        gradients = [torch.randn_like(p) for p in ours]
        if t in (0, 4):  # also before there is any state
            gradients[0][3] = float("inf")
        for ps, scaler in zip((ours, theirs), scalers, strict=True):
            loss = sum((p * g).sum() for p, g in zip(ps, gradients, strict=True))
            for p in ps:
                p.grad = None
            scaler.scale(loss).backward()
        if unscale:
            scalers[0].unscale_(a)
        scalers[0].step(a)
        scalers[1].unscale_(b)
        torch.nn.utils.clip_grad_norm_(theirs, 0.7)
        scalers[1].step(b)
        for scaler in scalers:
            scaler.update()
    assert a.skipped_steps == 2 and int(a.state[ours[0]]["step"]) == 6
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-5)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"capturable": True}])
def test_state_goes_to_torch_and_back(engine, device, options):
    ours = params((31,), (6, 5), device=device)
    theirs = copies(ours)
    a, b = fusedopt.AdamW(ours, engine=engine), torch.optim.AdamW(theirs, **options)
    for turn in range(2):
        for _ in range(3):
            fill_gradients(ours)
            for p, q in zip(ours, theirs, strict=True):
                q.grad = p.grad.clone()
            a.step(), b.step()
        if turn == 0:
            saved = a.state_dict()
            a.load_state_dict(b.state_dict())
            b.load_state_dict({**saved, "param_groups": b.state_dict()["param_groups"]})
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-5)
        assert float(a.state[p]["step"]) == float(b.state[q]["step"]) == 6


def test_benchmark(tmp_path, device, capsys):
    """Its event clock, its count of launches and its memory, which need a GPU; the device is the default one."""
    path = tmp_path / "bench.json"
    arguments = ["--suite", "30x1000", "--groups", "3", "--clip", "1", "--peer", "torch-fused", "--repeats", "3"]
    assert main(["bench", *arguments, "--json", str(path)]) == 0, capsys.readouterr()
    rows = {row.variant: row for row in Result.load(path).rows}
    assert rows.keys() >= {*(f"fusedopt-{name}" for name in ON_GPU), "torch-fused", "limit"}
    for row in rows.values():
        assert row.device == device.type and 0 < row.q1 <= row.median <= row.q3 < 0.1
    for name in ON_GPU:
        row = rows[f"fusedopt-{name}"]
        assert row.launches == (2 if name == "triton" else 1)
        assert row.host > 0 and row.peak_memory is not None and row.bytes == 30_000 * 32
    assert rows["torch-fused"].launches > 3
