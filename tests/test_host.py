"""The CPU engine's host side: levels, how tensors are read, sizes, many tensors and groups."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import assert_same, fill_gradients, params, snapshot

import fusedopt
from fusedopt import host
from fusedopt.bench import memory
from fusedopt.engines import cpu
from fusedopt.verification import gate

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=f"the CPU engine is not built: {cpu.available()}")

LEVELS = ("v2", "v3", "v4")


def lower_levels():
    extension = host.load()
    highest = extension.isa_level()
    return LEVELS[: LEVELS.index(highest) + 1] if highest in LEVELS else ()


@pytest.mark.parametrize("level", LEVELS)
def test_every_isa_level_passes_the_gate(level):
    if level not in lower_levels():
        pytest.skip(f"this CPU does not run {level}")
    program = (
        "import torch; from fusedopt.engines import cpu; from fusedopt.verification import cases, gate;"
        f"assert cpu.load()[2] == {level!r};"
        "chosen = [c for c in cases.CASES if c.name in ('AdamW', 'RMSprop both')];"
        "results = [gate.compare(c, 'cpu', d) for c in chosen for d in (torch.float32, torch.float16)];"
        "assert len(results) == 4 and all(r.passed for r in results), results"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "FUSEDOPT_ISA": level})


def test_unknown_isa_level_is_a_clear_error():
    program = "import fusedopt, torch; fusedopt.SGD([torch.nn.Parameter(torch.ones(1))], engine='cpu')"
    env = {**os.environ, "FUSEDOPT_ISA": "v9"}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert run.returncode and "FUSEDOPT_ISA is 'v9'" in run.stderr


def test_extensions_link_no_torch():
    from pathlib import Path

    for path in Path(fusedopt.__file__).parent.glob("_*.so"):
        needed = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert "libtorch" not in needed and "libc10" not in needed and "libcudart" not in needed
        assert ("libgomp" in needed) == (not path.name.startswith("_cuda"))


def test_tensors_are_read_through_the_abi():
    assert host.reading_path() == "torch's C ABI"


@pytest.fixture
def without_abi():
    host.load().forget_abi()
    yield
    assert host.bind_abi(host.load())


def busy_run():
    """Many parameters of all kinds, some without gradients, some moved."""
    torch.manual_seed(7)
    ps = params(*[(5,)] * 700, (2, 2, 2, 2, 2, 3), (0,), ())
    optimizer = fusedopt.AdamW(ps, engine="cpu", max_grad_norm=1.0)
    for t in range(4):
        fill_gradients(ps)
        for p in ps[t::13]:
            p.grad = None
        if t == 2:
            for p in ps[::17]:
                p.data = p.data.clone()
            for p in ps[::19]:
                if p in optimizer.state:
                    optimizer.state[p]["exp_avg"].data = optimizer.state[p]["exp_avg"].clone()
        optimizer.step()
    return snapshot(optimizer)


def test_results_do_not_hang_on_the_reading_path(without_abi):
    through_dlpack = busy_run()
    assert host.bind_abi(host.load())
    assert_same(busy_run(), through_dlpack)


def test_dlpack_says_what_the_abi_says(without_abi):
    tensors = [t for t in host._probes() if not (t.is_conj() or t.is_neg())]
    dlpack = [host.load().geometry(t) for t in tensors]
    assert host.bind_abi(host.load())
    for t, told in zip(tensors, dlpack, strict=True):
        other = host.load().geometry(t)
        parts = (slice(1), slice(2, 4), slice(6, 10))  # but for numbers of dtypes and devices, and gradients
        assert [told[part] for part in parts] == [other[part] for part in parts]


@pytest.mark.parametrize("fact", range(10))
def test_abi_that_says_otherwise_is_not_used(monkeypatch, fact):
    told = host._facts

    def other(t, numbers):
        facts = list(told(t, numbers))
        facts[fact] = [*facts[fact], 1] if isinstance(facts[fact], list) else facts[fact] + 1
        return tuple(facts)

    extension = host.load()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(host, "_facts", other)
            assert not host.bind_abi(extension)
        assert extension.geometry(torch.ones(3))[2] == [3]  # through DLPack
    finally:
        assert host.bind_abi(extension)


class Elsewhere(torch.Tensor):
    _cdata = 12345


def test_handles_that_are_elsewhere_are_not_followed(monkeypatch):
    extension = host.load()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(host, "_probes", lambda: [torch.ones(3), torch.ones(3).as_subclass(Elsewhere)])
            assert not host.bind_abi(extension)
    finally:
        assert host.bind_abi(extension)


class Tables:
    """What a scan says of a tensor, but for one fact."""

    def __init__(self, t, wrong):
        address, dtype, shape, strides, _, _, nbytes, *_ = host.load().geometry(t)
        facts = [t, address, dtype, shape, strides, nbytes]
        if wrong:
            facts[wrong] = [7] if isinstance(facts[wrong], list) else facts[wrong] + 2
        self.facts = lambda: [tuple(facts)]


def test_checked_scan_sees_a_wrong_answer():
    host.check_scan(Tables(torch.ones(3), 0))
    for wrong in range(1, 6):
        with pytest.raises(AssertionError):
            host.check_scan(Tables(torch.ones(3), wrong))


def test_20000_tiny_tensors():
    ps = params(*[(3,)] * 20_000)
    optimizer = fusedopt.AdamW(ps, engine="cpu")
    fill_gradients(ps)
    before = [p.detach().clone() for p in ps]
    optimizer.step(), optimizer.step()
    assert not any(torch.equal(p, q) for p, q in zip(ps, before, strict=True))


def test_500_groups_with_their_own_options():
    ps = params(*[(4,)] * 500)
    for p in ps:
        p.grad = torch.ones(4)
    before = [p.detach().clone() for p in ps]
    optimizer = fusedopt.SGD([{"params": [p], "lr": i / 100} for i, p in enumerate(ps)], engine="cpu")
    optimizer.step()
    for i, (p, q) in enumerate(zip(ps, before, strict=True)):
        torch.testing.assert_close(p.detach(), q - i / 100)


def test_cohorts_follow_step_counts():
    ps = params(*[(4,)] * 50)
    optimizer = fusedopt.AdamW(ps, engine="cpu")
    fill_gradients(ps)
    optimizer.step()
    (plan,) = optimizer._plans
    optimizer.step()
    assert plan.cohorts == 1 and optimizer._plans == [plan]
    ps[7].grad = None
    optimizer.step()
    ps[7].grad = torch.ones(4)
    optimizer.step()
    assert plan.cohorts == 2 and optimizer._plans == [plan]  # no gradient is no reason to plan anew


def test_plan_is_kept_when_gradients_are_new():
    ps = params((7,), (3, 3))
    optimizer = fusedopt.AdamW(ps, engine="cpu")
    for _ in range(3):
        fill_gradients(ps)
        optimizer.step()
        plans = optimizer._plans
        optimizer.zero_grad()
        fill_gradients(ps)
        optimizer.step()
        assert optimizer._plans is plans


@pytest.mark.xdist_group("memory")
def test_more_than_two_to_the_31_elements():
    if (memory.room(torch.device("cpu")) or 0) < 8 * 2**30:
        pytest.skip("needs 8 GiB of memory")
    n = 2**31 + 12_345
    p = torch.nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    p.grad = torch.ones(1, dtype=torch.bfloat16).expand(n)
    fusedopt.SGD([p], lr=0.5, engine="cpu").step()
    for i in (0, 1, 2**31 - 1, 2**31, n - 1):
        assert p[i] == 0.5
    assert p.detach()[-100_000:].eq(0.5).all()


@pytest.mark.parametrize(
    "value",
    [
        1.0,
        -3.14159,
        1e-40,
        65504.0,
        65520.0,
        3.4e38,
        0.0,
        -0.0,
        2**-24,
        2**-25,
        1 + 2**-8,
        1 + 2**-9,
        1 + 3 * 2**-9,
        1 + 2**-11,
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_is_torchs(dtype, value):
    for size in (1, 8, 21):
        p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        p.grad_dtype = torch.float32
        p.grad = torch.full((size,), -value)
        fusedopt.SGD([p], lr=1.0, engine="cpu").step()
        assert torch.equal(p.detach().view(torch.int16), (torch.zeros(size) + value).to(dtype).view(torch.int16))


def test_state_in_double_rounds_once_to_bfloat16():
    p = torch.nn.Parameter(torch.zeros(64, dtype=torch.float64))
    optimizer = fusedopt.SGD([p], momentum=0.5, engine="cpu")
    # Halfway between two bfloat16 values but for a bit that float32 cannot hold.
    values = 1 + 2.0**-8 + torch.linspace(-1, 1, 64, dtype=torch.float64) * 2.0**-40
    p.grad = values.clone()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["momentum_buffer"] = torch.zeros(64, dtype=torch.bfloat16)
    optimizer.load_state_dict(state)
    optimizer.step()
    got = optimizer.state[p]["momentum_buffer"].double()
    assert torch.equal(got, torch.where(values > 1 + 2.0**-8, 1 + 2.0**-7, 1.0).double())


def test_gate_has_a_limit_for_everything():
    assert {d for _, _, d in gate.comparisons(["cpu"], None)} == set(gate.DTYPES)
