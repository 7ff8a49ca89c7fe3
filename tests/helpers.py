"""What several tests need."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from hypothesis import HealthCheck, Phase, settings

import fusedopt
from fusedopt.engines import cuda, triton
from fusedopt.verification.cases import CASES

BY_NAME = {case.name: case for case in CASES}
EVERY = list(fusedopt.optimizers.__all__)
ALL = [name for name in EVERY if name not in ("KoalaM", "KoalaV")]  # whose steps need nothing but gradients
TORCH = [name for name in ALL if hasattr(torch.optim, name) and name != "Muon"]  # torch's takes matrices alone
RULES = {rule.name: rule for of in map(fusedopt.__dict__.get, EVERY) for rule in (of.rule, *of.rules)}


def clients_path():
    """Folders of what stands in for torchvision, which has no build for every torch, where that is not installed."""
    try:
        version("torchvision")
    except PackageNotFoundError:
        return [str(Path(__file__).parent / "stand_ins")]
    return []


def fewer(engine, count):
    """A tenth of the steps or tensors where every operation of a kernel is interpreted."""
    return max(count // 10, 3) if engine == "triton" else count


def programs_of(examples, *phases):
    """Settings of random programs: the same ones every time, however long they take."""
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        print_blob=False,
        phases=[Phase.generate, *phases],
        suppress_health_check=list(HealthCheck),
    )


def decay(name, weight_decay=0.1):
    """An option of those that have it."""
    return {"weight_decay": weight_decay} if name != "Rprop" else {}


def randn(*shape, dtype=torch.float32, device="cpu"):
    """The same numbers on every device."""
    return torch.randn(*shape, dtype=dtype).to(device)


def params(*shapes, dtype=torch.float32, device="cpu"):
    return [torch.nn.Parameter(randn(shape, dtype=dtype, device=device)) for shape in shapes]


def copies(parameters):
    return [torch.nn.Parameter(p.detach().clone()) for p in parameters]


def gradient_like(p):
    return torch.randn_like(p, device="cpu").to(p.device)


def fill_gradients(parameters):
    for p in parameters:
        p.grad = gradient_like(p)


def fill_growing_gradients(parameters, decades):
    """Sums of their squares have other bits in another order; of like addends, exponents and so bits stay the same."""
    for p in parameters:
        p.grad = gradient_like(p) * torch.logspace(0, decades, p.numel(), device=p.device).view_as(p)


def snapshot(optimizer):
    """Everything a step may change, as independent copies."""
    state = [
        {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state.get(p, {}).items()}
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    values = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return values, state


def bits(t):
    """What a tensor of any type is compared by, bit for bit, if it has two bytes; else itself."""
    return t.detach().contiguous().view(torch.int16) if t.dtype == torch.bfloat16 else t


def assert_same(a, b):
    """Bitwise equality of nested tensors."""
    assert type(a) is type(b), (type(a), type(b))
    if isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16:  # whose bits may be what is missing to a master
        assert b.dtype == a.dtype and torch.equal(bits(a), bits(b)), (a, b)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0)), (a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def close(a, b, tolerance=2e-6):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def set_programs(monkeypatch, engine, n):
    """How many programs the GPU engines launch at most, whatever the device holds at once."""
    if engine == "triton":
        monkeypatch.setattr(triton, "processors", lambda device: n)
        monkeypatch.setattr(triton, "PROGRAMS_PER_PROCESSOR", 1)
        return
    extension = cuda.load()

    class KernelSelection(extension.KernelSelection):
        def blocks(self, device, has_options):
            return n

    class Module:
        def __getattr__(self, name):
            return KernelSelection if name == "KernelSelection" else getattr(extension, name)

    monkeypatch.setattr(cuda, "load", Module)


def pair(shapes, name="AdamW", dtype=torch.float32, engine="auto", device="cpu", **options):
    """Ours and torch's plainest implementation, on any device, on equal parameters."""
    ours = params(*shapes, dtype=dtype, device=device)
    theirs = copies(ours)
    return (
        ours,
        getattr(fusedopt, name)(ours, engine=engine, **options),
        theirs,
        getattr(torch.optim, name)(theirs, **{"foreach": False} | options),
    )


def same_gradients(ours, theirs, gradients=None):
    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
        p.grad = gradient_like(p) if gradients is None else gradients[i]
        q.grad = None if p.grad is None else p.grad.detach().clone(memory_format=torch.contiguous_format)
