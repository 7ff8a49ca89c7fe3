"""The CUDA engine: its kernels on host threads at odd sizes and alignments, its launches, and its machine code."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import AVAILABLE
from helpers import ALL, BY_NAME, close, fill_gradients, fill_growing_gradients, params

import fusedopt
from fusedopt.bench.variants import EXTENSION, VARIANTS, build
from fusedopt.engines import cuda, tables
from fusedopt.inspection import cuda as inspection
from fusedopt.launch import Scaling

ENGINE = cuda.load() if "cuda" in AVAILABLE else None
on_threads = pytest.mark.skipif("cuda" not in AVAILABLE, reason="needs a C++ compiler, and no GPU")

SIZES = [0, 1, 3, 7, 8, 9, 255, 256, 257, 263, 264, 511, 512, 520, 1031, 4097]


@pytest.fixture
def programs(monkeypatch, request):
    """How many blocks there are."""
    set_programs(monkeypatch, request.param)


def set_programs(monkeypatch, n):
    class KernelSelection(ENGINE.KernelSelection):
        def blocks(self, device):
            return n

    class Module:
        def __getattr__(self, name):
            return KernelSelection if name == "KernelSelection" else getattr(ENGINE, name)

    monkeypatch.setattr(cuda, "load", Module)


@on_threads
@pytest.mark.parametrize("programs", [1, 3, 8], indirect=True)
@pytest.mark.parametrize("offset", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["AdamW amsgrad", "SGD", "Lion"])
def test_any_size_and_alignment(programs, case, dtype, offset):
    """Heads, tails, tensors that are never aligned, and any share of tiles."""
    ours = [torch.nn.Parameter(torch.randn(n + offset).to(dtype)[offset:]) for n in SIZES]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = BY_NAME[case].build(ours, engine="cuda", max_grad_norm=1.0)
    b = BY_NAME[case].build(theirs, engine="eager", max_grad_norm=1.0)
    for t in range(2):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            shift = (offset + i) % 4  # sometimes aligned with the parameter, sometimes never
            p.grad = None if (t + i) % 5 == 4 else torch.randn(p.numel() + shift).to(dtype)[shift:]
            q.grad = None if p.grad is None else p.grad.clone()
        a.step(), b.step()
        close(a.grad_norm, b.grad_norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6 if dtype == torch.float32 else 1e-2, atol=2e-6)


@on_threads
@pytest.mark.parametrize("programs", [1, 7], indirect=True)
@pytest.mark.parametrize("offset", [1000, 1001, 1003])
def test_nothing_beyond_a_row_is_touched(programs, offset):
    memory = torch.full((6000,), 7.0)
    p = torch.nn.Parameter(memory[offset : offset + 2999])
    optimizer = fusedopt.SGD([p], lr=0.5, engine="cuda")
    p.grad = torch.ones(2999)
    optimizer.step()
    assert (p == 6.5).all() and (memory[:offset] == 7).all() and (memory[offset + 2999 :] == 7).all()


@on_threads
def test_nothing_beyond_a_row_is_asked_for_ahead():
    """Rows that end where memory does. Host threads read what a GPU is asked to bring to its cache, and would crash."""
    program = f"""
import ctypes, mmap, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest, torch, fusedopt
protect = ctypes.CDLL(None).mprotect
def at_the_end(n, dtype):
    pages = mmap.mmap(-1, 5 * mmap.PAGESIZE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    last = whole.data_ptr() + 4 * mmap.PAGESIZE
    assert protect(ctypes.c_void_p(last), mmap.PAGESIZE, 0) == 0
    return whole[: 4 * mmap.PAGESIZE].view(dtype)[-n:]
for dtype in (torch.float32, torch.bfloat16):
    for n in (1, 8, 52, 256, 260, 2100):
        p = torch.nn.Parameter(at_the_end(n, dtype).normal_())
        p.grad = at_the_end(n, dtype).fill_(1.0)
        optimizer = fusedopt.AdamW([p], engine="cuda", max_grad_norm=1.0)
        for _ in range(2):
            optimizer.step()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stderr)


@on_threads
@pytest.mark.parametrize("count", [100, 1000, 5000])
def test_step_tables_of_all_sizes(count):
    """By value in small arguments, in large ones, and in the device's memory."""
    ours = params(*[(3,)] * count)
    whole = torch.nn.Parameter(torch.stack([p.detach() for p in ours]))
    a = fusedopt.AdamW(ours, engine="cuda", max_grad_norm=1.0)
    b = fusedopt.AdamW([whole], engine="eager", max_grad_norm=1.0)
    for _ in range(2):
        whole.grad = torch.randn_like(whole)
        for p, g in zip(ours, whole.grad.clone(), strict=True):
            p.grad = g
        a.step(), b.step()
    close(torch.stack([p.detach() for p in ours]), whole.detach())
    assert a._plans[0].step_table.by_value == (count < 4000)


@on_threads
@pytest.mark.parametrize("name", ALL)
def test_one_launch_with_clipping_and_mixed_states(monkeypatch, name):
    launches = []
    launch = cuda.Plan.launch
    monkeypatch.setattr(cuda.Plan, "launch", lambda self, *a: launches.append(a[:2]) or launch(self, *a))
    ps = [p for dtype in (torch.float32, torch.bfloat16, torch.float64) for p in params((5,), (3, 2), dtype=dtype)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ps]

    def build(parameters, engine):
        groups = [{"params": parameters[k::3], "lr": 0.01 * (k + 1), "weight_decay": 0.1 * k} for k in range(3)]
        optimizer = getattr(fusedopt, name)(groups, engine=engine, max_grad_norm=1.0)
        for switch in optimizer.rule.switches():
            optimizer.param_groups[1][switch] = 0.9 if switch == "momentum" else True
        return optimizer

    a, b = build(ps, "cuda"), build(theirs, "eager")
    for _ in range(3):
        fill_gradients(ps)
        for p, q in zip(ps, theirs, strict=True):
            q.grad = p.grad.clone()
        a.step(), b.step()
    assert launches == [(True, True)] * 3
    for p, q in zip(ps, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2 if p.dtype == torch.bfloat16 else 2e-6, atol=1e-5)


@on_threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["state", "gradient"])
def test_doubles_beside_narrower_parameters(what, dtype):
    """A state that was loaded as float64, or gradients that are: too wide for a tile's sixteen bytes."""
    results = []
    for engine in ("cuda", "eager"):
        torch.manual_seed(2)
        (p,) = params((700,), dtype=dtype)
        if what == "gradient":
            p.grad_dtype = torch.float64
        optimizer = fusedopt.SGD([p], lr=0.1, momentum=0.9, engine=engine)
        for t in range(3):
            p.grad = torch.randn(700, dtype=p.grad_dtype)
            optimizer.step()
            if t == 0 and what == "state":
                optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].double()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@on_threads
def test_a_norm_that_single_precision_cannot_square():
    ps = params((300,), (40,))
    for p in ps:
        p.grad = torch.full_like(p, 1e25)
    optimizer = fusedopt.SGD(ps, engine="cuda", max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    close(optimizer.grad_norm, torch.tensor(math.sqrt(340) * 1e25))


@on_threads
def test_two_launches_with_a_hook_between():
    """As ranks do that add up their norms: measured, added, and updated by the sum."""
    ours, theirs = params((70,), (300,)), None
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a, b = (fusedopt.SGD(ps, lr=1.0, max_grad_norm=1.0, engine="cuda") for ps in (ours, theirs))
    fill_gradients(ours)
    for p, q in zip(ours, theirs, strict=True):
        q.grad = p.grad.clone()
    a.step(), b.step()
    (plan,) = b._plans
    assert plan.scan()
    squared, _, _ = plan.run(Scaling(), math.inf, True, False, False, None)
    total = squared * 4
    _, norm, _ = plan.run(Scaling(), 1.0, False, True, False, total)
    close(norm.float(), 2 * a.grad_norm)
    for p, q in zip(ours, theirs, strict=True):
        factor = 1 / (2 * a.grad_norm + 1e-6)
        close(p.detach() - factor * p.grad, q.detach(), 1e-5)


@on_threads
def test_a_failed_launch_is_an_error_with_its_name_and_changes_nothing():
    ps = params((5,))
    optimizer = fusedopt.AdamW(ps, engine="cuda")
    fill_gradients(ps)
    optimizer.step()
    before = ps[0].detach().clone()
    cuda.load().fail_next_launch()
    with pytest.raises(RuntimeError, match="cudaLaunchKernelEx failed: cudaErrorLaunchFailure"):
        optimizer.step()
    assert torch.equal(ps[0], before) and optimizer.state[ps[0]]["step"] == 1
    optimizer.step()
    assert optimizer.state[ps[0]]["step"] == 2


@on_threads
def test_as_many_signatures_as_there_are():
    """Every combination of types and strides of a parameter, its gradient and its state, in one launch."""
    types = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    results = []
    for engine in ("cuda", "eager"):
        torch.manual_seed(3)
        ps = [torch.nn.Parameter(torch.randn(5, 7).to(a)) for a in types for _ in range(32)]
        optimizer = fusedopt.SGD(ps, lr=0.1, momentum=0.9, engine=engine)
        for i, p in enumerate(ps):
            p.grad_dtype = types[i % 4]
            optimizer.state[p]["momentum_buffer"] = torch.randn(5, 7).to(types[i // 4 % 4])
            g = torch.randn(7, 5).to(p.grad_dtype)
            p.grad = g.t() if i // 16 % 2 else g.t().contiguous()
        optimizer.step()
        results.append([p.detach().double() for p in ps])
        if engine == "cuda":
            (plan,) = optimizer._plans
            assert len(plan.table.signatures) == 128
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


@on_threads
def test_two_launches_where_one_does_not_fit():
    results = []
    for refused in (False, True):
        torch.manual_seed(0)
        ps = params((700,), (3, 100))
        optimizer = fusedopt.AdamW(ps, engine="cuda", max_grad_norm=1.0)
        for t in range(3):
            torch.manual_seed(t)
            fill_gradients(ps)
            if refused and t == 1:
                ENGINE.refuse_next_cooperative_launch()
            optimizer.step()
        (plan,) = optimizer._plans
        assert plan._launcher.in_one_launch is not refused
        results.append([*(p.detach() for p in ps), optimizer.grad_norm, optimizer.state[ps[0]]["step"]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@on_threads
def test_norm_has_the_same_bits_whoever_computes_the_shares(monkeypatch):
    """The shares of four programs, computed by any number of them, which claim them in any order."""
    monkeypatch.setattr(tables, "partition", lambda n_tiles, _, sizes, cut=tables.partition: cut(n_tiles, 4, sizes))
    ps = params((100_001,), (3, 100), (60_001,), *[(7,)] * 50)
    fill_growing_gradients(ps, 6)
    squares = set()
    for n in (1, 2, 3, 7, 20):
        set_programs(monkeypatch, n)
        optimizer = fusedopt.SGD(ps, lr=0.0, engine="cuda", max_grad_norm=1.0)
        ENGINE.set_disorder(True)
        try:
            for _ in range(3):
                optimizer.step()
                squares.add(float(optimizer._plans[0].status.squared_norm))
        finally:
            ENGINE.set_disorder(False)
        table = optimizer._plans[0].table
        assert (table.programs, table.n_shares) == (n, 20)
    assert len(squares) == 1


# ------------------------------------------------------------------------------------- the built extension

# One for each variant of a rule, one for all where there are several, and both sizes of arguments.
N_VARIANTS = [2 ** len(rule.switches()) for rule in {getattr(fusedopt, name).rule for name in ALL}]
N_KERNELS = 2 * sum(n + (n > 1) for n in N_VARIANTS)
built = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@built
def test_imports_without_a_gpu_and_says_so():
    program = (
        "import fusedopt._cuda as extension; print(extension.no_device());"
        "from fusedopt.engines import cuda; print(cuda.available())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if not torch.cuda.is_available():
        assert run.stdout.splitlines()[0].startswith("no device") and "no device" in run.stdout.splitlines()[1]


@built
@pytest.mark.parametrize("arch", ["90", *(pytest.param(a, marks=pytest.mark.nightly) for a in ("80", "100"))])
def test_machine_code_is_wide_and_spills_nothing(arch, tmp_path):
    file = tmp_path / "inspect.json"
    command = [sys.executable, "-m", "fusedopt", "inspect", "--engine", "cuda", "--arch", arch, "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(file.read_text())["kernels"]
    assert len(kernels) == N_KERNELS
    for k in kernels:
        assert k["spills"] == 0 and k["loads_128"] >= 4 and k["stores_128"] >= 2, k
        assert k["loads_other"] == 0 and k["stores_other"] == 0, k
        assert k["norm_loads_in_flight"] >= 8, k
        assert k["scalar_loads_in_flight"] >= CHOICES["MASKED_ELEMENTS"] * n_operands(k["name"]), k


POLICY = Path(__file__).parent.parent / "csrc" / "cuda" / "policy.h"
CHOICES = {name: int(value) for name, value in re.findall(r"#define FUSEDOPT_(\w+) (\d+)", POLICY.read_text())}
STATES = {
    "AdaBound": 2,
    "Adagrad": 1,
    "Lion": 1,
    "NAdam": 2,
    "NAdamW": 2,
    "RAdam": 2,
    "RMSprop": 1,
    "SGD": 0,
    "Adam": 2,
}


def n_operands(kernel):
    """Of the largest variant that a kernel steps; each switch that is on adds a state."""
    variants = re.findall(r"(\w+)(?:<([\w, ]+)>)?", kernel.removesuffix(" large"))
    return max(2 + STATES[rule] + arguments.count("true") for rule, arguments in variants)


@built
@pytest.mark.nightly
def test_fewer_loads_in_flight_are_seen(monkeypatch):
    """The machine code of builds that read one tile, and one element, at a time."""
    chosen = [v for v in VARIANTS if str(v) in ("cuda norm-tiles-1", "cuda masked-elements-1")]
    assert set(build(chosen, "90").values()) == {None}
    found = []
    for variant in chosen:
        monkeypatch.setattr(inspection, "_extension", lambda variant=variant: str(variant.folder / EXTENSION))
        (small, _) = inspection.inspect({"adam"}, "90")
        found.append((small.norm_loads_in_flight, small.scalar_loads_in_flight))
    (norm, _), (_, scalar) = found
    assert norm < 8 and scalar < CHOICES["MASKED_ELEMENTS"] * 4
