"""Tensors, containers and moments that a step must survive: the result is torch's, or an error that names the tensor."""

import collections
import contextlib
import decimal
import fractions
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref

import numpy as np
import pytest
import torch
from conftest import AVAILABLE
from helpers import assert_same, close, fewer, fill_gradients, pair, params, same_gradients, snapshot
from torch.testing._internal.two_tensor import TwoTensor

import fusedopt
from fusedopt import host

FAST = [name for name in AVAILABLE if name != "eager"]


@pytest.fixture(
    params=[*AVAILABLE, *(f"{name}, {'DLPack' if name == 'cpu' else 'scan in Python'}" for name in FAST)]
)
def engine(request, monkeypatch):
    """Every engine, and each of them with another way to read tensors."""
    name, _, reading = request.param.partition(", ")
    if reading == "DLPack":
        host.load().forget_abi()
    elif reading:
        monkeypatch.setenv("FUSEDOPT_HOST", "python")
    yield name
    if reading == "DLPack":
        assert host.bind_abi(host.load())


def stepped(engine, shapes=((5,), (4, 3), (6,)), steps=2, name="AdamW", **options):
    """Ours and torch's after some steps, with gradients for the next."""
    ours, a, theirs, b = pair(shapes, name, engine=engine, **options)
    for _ in range(steps):
        same_gradients(ours, theirs)
        a.step(), b.step()
    same_gradients(ours, theirs)
    return ours, a, theirs, b


def assert_equal(ours, a, theirs, b):
    for p, q in zip(ours, theirs, strict=True):
        close(p.detach().resolve_conj().resolve_neg(), q.detach().resolve_conj().resolve_neg(), 1e-5)
        for key, value in b.state[q].items():
            close(a.state[p][key].resolve_conj().resolve_neg(), value.resolve_conj().resolve_neg(), 1e-5)


# ------------------------------------------------------------------ gradients


def two(g):
    return TwoTensor(g, g)


def zeros(g):
    return torch._efficientzerotensor(g.shape)


def waiting(g):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    return AsyncCollectiveTensor(g)


class Plain(torch.Tensor):
    """A subclass without operations of its own."""


def plain(g):
    return g.as_subclass(Plain)


@pytest.mark.parametrize("kind", [zeros, plain])
@pytest.mark.parametrize("steps", [0, 2])
def test_gradient_of_an_odd_kind(kind, steps):
    ours, a, theirs, b = stepped("auto", steps=steps, weight_decay=0.1)
    for odd in (True, False):
        given = [kind(q.grad) if odd and i == 1 else q.grad for i, q in enumerate(theirs)]
        for p, q, g in zip(ours, theirs, given, strict=True):
            p.grad, q.grad = g, g
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", [two, waiting])
def test_gradient_that_is_a_subclass(kind):
    """torch's own step mixes it with plain parameters or refuses; ours does the one or the other as well."""
    ours, a, theirs, b = stepped("auto")
    for p, q in zip(ours, theirs, strict=True):
        p.grad = kind(q.grad)
    before = snapshot(a)
    try:
        a.step()
    except (RuntimeError, TypeError):
        assert_same(snapshot(a), before)
    else:
        b.step()
        assert_equal(ours, a, theirs, b)
    same_gradients(ours, theirs)
    a.step()


@pytest.mark.parametrize("kind", [zeros, two])
@pytest.mark.parametrize("engine", FAST, indirect=True)
def test_gradient_that_an_engine_cannot_read(engine, kind):
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    ours[1].grad = kind(ours[1].grad)
    with pytest.raises(RuntimeError, match=f"parameter 1 of group 0.*{engine}.*of its gradient"):
        a.step()
    assert_same(snapshot(a), before)
    fill_gradients(ours)
    a.step()


# --------------------------------------------------------------------- memory


def give_back(t):
    t.untyped_storage().resize_(0)


def shorten(t):
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - t.element_size())


PARTS = {
    "parameter": lambda a, p: p,
    "gradient": lambda a, p: p.grad,
    "exp_avg": lambda a, p: a.state[p]["exp_avg"],
    "exp_avg_sq": lambda a, p: a.state[p]["exp_avg_sq"],
    "step": lambda a, p: a.state[p]["step"],
}


@pytest.mark.parametrize("spoil", [give_back, shorten])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_tensor_without_its_memory(engine, part, spoil, clip):
    ours, a, _, _ = stepped(engine)
    a.max_grad_norm = clip
    others = [ours[0], ours[2]]
    tensor = PARTS[part](a, ours[1])
    before, kept = [p.detach().clone() for p in others], tensor.detach().clone()
    size = tensor.untyped_storage().nbytes()
    spoil(tensor)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match=rf"{part}.*without its memory.*bytes") as caught:
            a.step()
        assert "parameter 1 of group 0" in str(caught.value)
    assert_same([p.detach() for p in others], before)
    assert all(a.state[p]["step"] == 2 for p in others)
    tensor.untyped_storage().resize_(size)
    with torch.no_grad():
        tensor.copy_(kept)
    a.step()
    assert all(a.state[p]["step"] == 3 for p in ours)


def test_parameter_without_memory_stands_by_without_a_gradient(engine):
    ours, a, _, _ = stepped(engine)
    size = ours[1].untyped_storage().nbytes()
    ours[1].grad = None
    give_back(ours[1])
    a.step(), a.step()
    assert a.state[ours[0]]["step"] == 4 and a.state[ours[1]]["step"] == 2
    ours[1].untyped_storage().resize_(size)
    ours[1].data.fill_(1.0)
    fill_gradients(ours)
    a.step()
    assert a.state[ours[1]]["step"] == 3 and ours[1].ne(1).all()


@pytest.mark.parametrize("which", ["parameter", "state", "both"])
def test_lazy_clone_is_not_overwritten(engine, which):
    ours, a, theirs, b = stepped(engine)
    for _ in range(2):
        clones = []
        for p in ours:
            if which != "state":
                clones.append(torch._lazy_clone(p.detach()))
            if which != "parameter":
                clones.append(torch._lazy_clone(a.state[p]["exp_avg"]))
                clones.append(torch._lazy_clone(a.state[p]["step"]))
        wanted = [c.numpy(force=True).copy() for c in map(torch.clone, clones)]
        a.step(), b.step()
        for clone, want in zip(clones, wanted, strict=True):
            np.testing.assert_array_equal(torch.clone(clone).numpy(), want)
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


def test_parameter_that_is_a_lazy_clone(engine):
    source = torch.randn(7)
    kept = source.clone()
    ours, a, theirs, b = stepped(engine, [(7,)])
    for p in (*ours, *theirs):
        p.data = torch._lazy_clone(source)
    a.step(), b.step()
    assert torch.equal(source, kept)
    assert_equal(ours, a, theirs, b)


# ------------------------------------------------------------------ lazy bits


def lazily_conjugated():
    return torch.randn(4, 3, dtype=torch.complex64).mH


def lazily_negated():
    return torch.randn(5, dtype=torch.complex64).conj().imag


@pytest.mark.parametrize("make", [lazily_conjugated, lazily_negated])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_lazy_parameter(make, clip):
    value = make()
    p, q = torch.nn.Parameter(value), torch.nn.Parameter(value.clone().resolve_conj().resolve_neg())
    assert p.is_conj() or p.is_neg()
    a, b = fusedopt.AdamW([p], lr=0.1, max_grad_norm=clip), torch.optim.AdamW([q], lr=0.1)
    for t in range(4):
        p.grad = q.grad = torch.randn_like(q)
        if t == 2:
            p.grad = q.grad.mH.clone().mH if p.is_complex() else (q.grad + 0j).mul(-1j).conj().imag
            close(p.grad.resolve_neg().resolve_conj(), q.grad)
        a.step()
        if clip:
            q.grad = q.grad.clone()
            torch.nn.utils.clip_grad_norm_([q], clip)
        b.step()
        close(p.detach().resolve_conj().resolve_neg(), q.detach(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=str)
def test_parameter_that_becomes_lazy_where_it_is(dtype):
    z = torch.randn(6, dtype=torch.complex64)
    p = torch.nn.Parameter(z if dtype.is_complex else z.imag)
    q = torch.nn.Parameter(p.detach().clone())
    a, b = fusedopt.AdamW([p], lr=0.1), torch.optim.AdamW([q], lr=0.1)
    for t in range(5):
        if t in (2, 4):
            address = p.data_ptr()
            p.data = p.data.conj() if dtype.is_complex else torch._neg_view(p.data)
            q.data = q.data.conj().resolve_conj() if dtype.is_complex else -q.data
            assert p.data_ptr() == address
        p.grad = torch.randn_like(q)
        q.grad = p.grad.clone()
        a.step(), b.step()
        close(p.detach().resolve_conj().resolve_neg(), q.detach(), 1e-5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float32], ids=str)
def test_lazy_state(dtype):
    ours, a, theirs, b = pair([(6,), (3,)], dtype=dtype)
    for t in range(5):
        same_gradients(ours, theirs)
        if t == 2:
            state = a.state[ours[0]]
            m = state["exp_avg"]
            state["exp_avg"] = m.conj().clone().conj() if dtype.is_complex else torch._neg_view(-m)
            close(state["exp_avg"].resolve_conj().resolve_neg(), b.state[theirs[0]]["exp_avg"])
        if t == 3:  # at the same address, other numbers
            for optimizer, p in ((a, ours[1]), (b, theirs[1])):
                m = optimizer.state[p]["exp_avg"]
                lazy = m.conj() if dtype.is_complex else torch._neg_view(m)
                optimizer.state[p]["exp_avg"].data = lazy if optimizer is a else lazy.resolve_conj().resolve_neg()
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)


# ----------------------------------------------------------------- containers


def params_as_tuple(a):
    a.param_groups[0]["params"] = tuple(a.param_groups[0]["params"])


def groups_as_tuple(a):
    a.param_groups = tuple(a.param_groups)


def group_as_user_dict(a):
    a.param_groups[0] = collections.UserDict(a.param_groups[0])


def state_as_user_dict(a):
    for p in list(a.state):
        a.state[p] = collections.UserDict(a.state[p])


def states_as_user_dict(a):
    a.state = collections.UserDict(a.state)


@pytest.mark.parametrize(
    "change", [params_as_tuple, groups_as_tuple, group_as_user_dict, state_as_user_dict, states_as_user_dict]
)
@pytest.mark.parametrize("steps", [0, 2])
def test_other_containers(engine, change, steps):
    ours, a, theirs, b = stepped(engine, steps=steps)
    change(a)
    for _ in range(3):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)
    state = a.state[ours[1]]
    state["exp_avg"] = state["exp_avg"].clone() + 1
    b.state[theirs[1]]["exp_avg"].add_(1)
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


def test_states_that_change_places(engine):
    """The same dicts in the same order, under other keys."""
    ours, a, theirs, b = stepped(engine, [(4,), (4,)])
    for optimizer, (p, q) in ((a, ours), (b, theirs)):
        first, second = optimizer.state[p], optimizer.state[q]
        optimizer.state.clear()
        optimizer.state[q] = first
        optimizer.state[p] = second
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


# ------------------------------------------------- states at the same address


def to_half(s):
    return s.data.view(torch.float16)[: s.numel()]


def as_integers(s):
    return s.data.view(torch.int32)


def transposed(s):
    return s.data.t()


def flattened(s):
    return s.data.view(-1)


def halved(s):
    return s.data[:1]


@pytest.mark.parametrize("how", [as_integers, flattened, halved])
@pytest.mark.parametrize("count", [1, 600])
def test_state_that_does_not_fit_any_more(engine, how, count):
    ours, a, _, _ = stepped(engine, [(4, 3)] * fewer(engine, count))
    state = a.state[ours[-1]]
    good = state["exp_avg"].data
    state["exp_avg"].data = how(state["exp_avg"])
    assert state["exp_avg"].data_ptr() == good.data_ptr()
    before = [p.detach().clone() for p in ours]
    with pytest.raises((RuntimeError, ValueError), match="exp_avg"):
        a.step()
    assert_same([p.detach() for p in ours], before)
    state["exp_avg"].data = good
    a.step()


def test_state_of_another_dtype_at_the_same_address(engine):
    ours, a, _, _ = stepped(engine, [(8,)])
    guard = torch.full((64,), 7.0)
    s = a.state[ours[0]]["exp_avg_sq"]
    s.data = guard[:8]
    fill_gradients(ours)
    a.step()
    guard.fill_(7.0)
    s.data = guard.view(torch.bfloat16)[:8]
    a.step()
    assert guard[4:].eq(7).all()  # 16 bytes were the state's


def test_state_transposed_in_place(engine):
    ours, a, theirs, b = stepped(engine, [(4, 4)])
    for optimizer, (p,) in ((a, ours), (b, theirs)):
        optimizer.state[p]["exp_avg"].t_()
    a.step(), b.step()
    assert_equal(ours, a, theirs, b)


@pytest.mark.parametrize("convert", [lambda t: t.to_sparse(), lambda t: t.to_mkldnn()], ids=["sparse", "mkldnn"])
@pytest.mark.parametrize("part", ["exp_avg", "parameter"])
def test_tensor_swapped_with_one_without_strides(engine, convert, part):
    ours, a, _, _ = stepped(engine, [(4, 4), (3,)])
    tensor = PARTS[part](a, ours[0])
    other = convert(tensor.detach())
    if isinstance(tensor, torch.nn.Parameter):
        other = torch.nn.Parameter(other)
        other.grad = None
        gradient, tensor.grad = tensor.grad, None
    before = ours[1].detach().clone()
    torch.utils.swap_tensors(tensor, other)
    if part == "parameter":
        with contextlib.suppress(RuntimeError):
            ours[0].grad = gradient
    if ours[0].grad is not None:
        with pytest.raises((RuntimeError, ValueError), match="parameter 0 of group 0"):
            a.step()
        assert torch.equal(ours[1], before)


# ---------------------------------------------------- modes of torch's, threads

FIRST_USE = {
    "fake tensors": "from torch._subclasses import FakeTensorMode\nwith FakeTensorMode():\n    use()",
    "vmap": "torch.vmap(lambda x: (use(), x)[1])(torch.ones(3))",
    "default device": "torch.set_default_device('meta')\nuse()\ntorch.set_default_device('cpu')",
    "inference": "with torch.inference_mode():\n    use()",
}


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
@pytest.mark.parametrize("mode", FIRST_USE)
def test_first_use_under_a_mode(mode):
    program = (
        "import torch, fusedopt\nfrom fusedopt.engines import cpu\nfrom fusedopt import host\n"
        "def use():\n    assert cpu.available() is None, cpu.available()\n"
        f"{FIRST_USE[mode]}\n"
        "p = torch.nn.Parameter(torch.ones(3))\np.grad = torch.ones(3)\n"
        "fusedopt.AdamW([p], engine='cpu').step()\n"
        "print(host.reading_path())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "torch's C ABI"), run.stderr


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
def test_failure_at_first_use_is_not_remembered(monkeypatch):
    from fusedopt.engines import cpu

    monkeypatch.setattr(host, "_path", None)
    cpu.load.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(host, "_bind", lambda extension: 1 / 0)
        assert "division" in (cpu.available() or "")
    assert cpu.available() is None


def test_gradient_that_runs_python(engine):
    """A TorchFunctionMode sees Tensor.grad; what it does there happens before anything is trusted."""
    count = fewer(engine, 600)
    ours, a, theirs, b = stepped(engine, [(3,)] * count)
    victim, done = ours[count // 2], []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if not done and args and args[0] is victim and getattr(func, "__self__", None) is torch.Tensor.grad:
                done.append(func)
                state = a.state[victim]
                state["step"] = state["step"].clone()
                state["exp_avg"].data = state["exp_avg"].data.clone()
            return func(*args, **(kwargs or {}))

    for _ in range(2):
        with Mode():
            a.step()
        b.step()
        assert_equal(ours, a, theirs, b)
        assert done
        done.clear()


def test_threads_take_turns(engine):
    count = 5
    ours, a, theirs, b = stepped(engine, [(2000,)] * 3)
    threads = [threading.Thread(target=lambda: [a.step() for _ in range(count)]) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for _ in range(3 * count):
        b.step()
    assert_equal(ours, a, theirs, b)


class Meddler(float):
    """A number that does something when it is read."""

    def __new__(cls, value, deed):
        self = super().__new__(cls, value)
        self.deed = deed
        return self

    def __float__(self):
        self.deed()
        return float.__add__(self, 0.0)


def test_step_inside_of_a_step_is_refused(engine):
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    a.param_groups[0]["lr"] = Meddler(0.1, a.step)
    with pytest.raises(RuntimeError, match="inside of the same optimizer's step"):
        a.step()
    assert_same(snapshot(a), before)


def test_lr_that_changes_the_groups(engine):
    ours, a, _, _ = stepped(engine)
    extra = params((3,), (2,))

    def meddle():
        fill_gradients(extra)
        a.param_groups[0]["params"] = [*ours, *extra]
        a.param_groups.append(dict(a.param_groups[0], params=[], lr=0.5))

    def forget():
        del a.param_groups[1:]
        a.param_groups[0]["params"] = []

    for deed in (meddle, forget):
        a.param_groups[0]["lr"] = Meddler(0.1, deed)
        for _ in range(2):
            with contextlib.suppress(RuntimeError):  # that things change while it plans
                a.step()
        a.param_groups[0].update(lr=0.1, params=ours)
        del a.param_groups[1:]
        fill_gradients(ours)
        a.step()


# -------------------------------------------------------------------- signals


def interrupted_steps(optimizer, seconds):
    """Twenty steps at a time until time is up, with a signal now and then; yields whether it came."""
    armed = False

    def interrupt(*_):
        if armed:
            raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    rng = np.random.default_rng(0)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, float(rng.uniform(2e-5, 2e-3)))
                for _ in range(20):
                    optimizer.step()
                armed = False
                yield False
            except KeyboardInterrupt:
                armed = False
                yield True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


# Not Triton's interpreter, whose steps take too long to be interrupted often; its plans are those of the cuda engine.
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("engine", [*(name for name in AVAILABLE if name != "triton"), "auto"], indirect=True)
def test_a_step_and_its_counters_are_one(engine, name):
    """Whenever a signal arrives, all parameters have been through the same number of whole steps."""
    mixed = engine == "auto"  # with an optimizer that two engines step

    def make(engine):
        torch.manual_seed(5)
        ps = params((300,), (40, 5), (7,))
        options = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
        groups = [{"params": ps[:2]}, {"params": ps[2:], "differentiable": mixed}]
        if mixed:
            ps[2].requires_grad_(False)
        fill_gradients(ps)
        return ps, getattr(fusedopt, name)(groups, lr=1e-3, engine=engine, **options)

    ps, optimizer = make(engine)
    reference, twin = make(engine)
    for each in (optimizer, twin):  # modules that the first step imports don't like to be interrupted
        each.step()
    interruptions = taken = 0
    for interrupted in interrupted_steps(optimizer, 1.5):
        interruptions += interrupted
        for _ in range(21):  # it took no more
            if all(torch.equal(p, q) for p, q in zip(ps, reference, strict=True)):
                break
            twin.step()
            taken += 1
        assert_same(snapshot(optimizer), snapshot(twin))
        torch.set_grad_enabled(True)  # torch's own guard may have been interrupted while it put it back
    assert interruptions > 5 and taken > 5


def test_interrupted_first_step_leaves_no_states(engine):
    ps = params((5,), (4,))
    fill_gradients(ps)
    optimizer = fusedopt.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5, engine=engine)

    class Boom(float):
        def __float__(self):
            raise KeyboardInterrupt

    optimizer.param_groups[0]["lr"] = Boom(0.1)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert not any(optimizer.state.values())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    for p in ps:
        assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


FORKED = """
import os, sys, torch, fusedopt
torch.set_num_threads(2)
ps = [torch.nn.Parameter(torch.ones(300_000)) for _ in range(2)] + [torch.nn.Parameter(torch.ones(3)) for _ in range(600)]
for p in ps:
    p.grad = torch.ones_like(p)
optimizer = fusedopt.AdamW(ps, engine="cpu", max_grad_norm=1.0)
optimizer.step()
p = torch.nn.Parameter(torch.ones(300_000))
p.grad = torch.ones(300_000)
other = fusedopt.AdamW([p], engine=sys.argv[1])
child = os.fork()
if not child:
    optimizer.step()
    other.step()
    assert torch.get_num_threads() == 2
    os._exit(0 if optimizer.state[ps[0]]["step"] == 2 and other.state[p]["step"] == 1 else 3)
status = os.waitpid(child, 0)[1]
optimizer.step()
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif("cpu" not in AVAILABLE or not hasattr(os, "fork"), reason="no CPU engine, or no fork")
@pytest.mark.parametrize("other", ["cpu", "eager"])
def test_step_in_a_forked_child(other):
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED, other], check=True, timeout=60)


class Steps(torch.utils.data.Dataset):
    """Items that are what a step does to a parameter."""

    def __len__(self):
        return 4

    def __getitem__(self, i):
        p = torch.nn.Parameter(torch.zeros(100_000))
        p.grad = torch.ones(100_000)
        fusedopt.SGD([p], lr=float(i)).step()
        return p.detach()[:3]


def test_step_in_a_data_loaders_worker():
    Steps()[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader(Steps(), num_workers=1, timeout=60)
        assert [float(item[0, 0]) for item in loader] == [0.0, -1.0, -2.0, -3.0]


# --------------------------------------------------------------- shared memory


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RAdam"])
def test_parameter_given_twice(engine, name):
    options = {"momentum": 0.9, "dampening": 0.3} if name == "SGD" else {}
    value = torch.randn(70)
    p, q = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.clone())
    other, another = params((5,)), params((5,))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        a = getattr(fusedopt, name)([p, *other, p], engine=engine, **options)
    assert any("duplicate" in str(w.message) for w in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b = getattr(torch.optim, name)([q, *another, q], foreach=False, **options)
    for _ in range(4):
        same_gradients([p, *other], [q, *another])
        a.step(), b.step()
        close(p.detach(), q.detach(), 1e-5)
        close(a.state[p].get("step", torch.zeros(())), b.state[q].get("step", torch.zeros(())))


def test_parameter_given_twice_while_training(engine):
    ours, a, theirs, b = stepped(engine, [(5,), (6,)])
    a.param_groups[0]["params"].append(ours[0])
    b.param_groups[0]["params"].append(theirs[0])
    for _ in range(3):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)
    assert a.state[ours[0]]["step"] == 8 and a.state[ours[1]]["step"] == 5


@pytest.mark.parametrize("size", [8, 80_000])
def test_parameters_over_the_same_memory(engine, size):
    def build():
        torch.manual_seed(3)
        flat = torch.randn(size)
        parts = [flat, flat[: size // 2], flat[size // 4 :], flat[::2], flat.view(2, -1)[:, 1]]
        return flat, [torch.nn.Parameter(part) for part in parts] + params((5,))

    (flat, ours), (reference, theirs) = build(), build()
    a, b = fusedopt.AdamW(ours, lr=0.1, engine=engine), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for _ in range(3):
        same_gradients(ours, theirs)
        a.step(), b.step()
        close(flat, reference, 1e-5)
    close(ours[-1], theirs[-1], 1e-5)


def test_interleaved_parameters_share_a_step(engine):
    """Memory that lies between another's elements is not shared: one plan does."""
    flat = torch.randn(40)
    ps = [torch.nn.Parameter(flat[i::4]) for i in range(4)]
    optimizer = fusedopt.AdamW(ps, engine=engine)
    fill_gradients(ps)
    optimizer.step()
    assert len(optimizer._plans) == 1


def test_states_over_the_same_memory(engine):
    ours, a, theirs, b = stepped(engine, [(6,), (6,)])
    a.state[ours[1]]["exp_avg"] = a.state[ours[0]]["exp_avg"]
    b.state[theirs[1]]["exp_avg"] = b.state[theirs[0]]["exp_avg"]
    for _ in range(2):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


# ---------------------------------------------------------------------- shards

SHARDED = """
import os, sys, torch, torch.distributed as dist, fusedopt
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
kind = sys.argv[2]
if kind == "fsdp1":
    from torch.distributed.fsdp import FullyShardedDataParallel
    import warnings
    warnings.simplefilter("ignore")
    model = FullyShardedDataParallel(torch.nn.Linear(4, 4), use_orig_params=len(sys.argv) > 3, device_id=torch.device("cpu"))
else:
    from torch.distributed.tensor import DTensor, init_device_mesh, distribute_tensor, Shard
    mesh = init_device_mesh("cpu", (1,))
    model = torch.nn.Linear(4, 4)
    for name, p in list(model.named_parameters()):
        setattr(model, name, torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
ps = list(model.parameters())
def gradients():
    for p in ps:
        p.grad = torch.ones_like(p)
for options in ({"max_grad_norm": 1.0}, {"skip_nonfinite": True}):
    optimizer = fusedopt.AdamW(ps, **options)
    gradients()
    before = [p.detach().clone() for p in ps]
    try:
        optimizer.step()
    except RuntimeError as error:
        assert "sharded among ranks" in str(error) and "parameter 0 of group 0" in str(error), error
    else:
        raise SystemExit("no error")
    assert not optimizer.state, optimizer.state
optimizer = fusedopt.AdamW(ps)
gradients()
optimizer.step()
optimizer.max_grad_norm = 1.0
try:
    optimizer.step()
except RuntimeError as error:
    assert "sharded among ranks" in str(error), error
else:
    raise SystemExit("no error when clipping is switched on")
optimizer.max_grad_norm = None
optimizer.step()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", [("fsdp1",), ("fsdp1", "orig"), ("dtensor",)], ids="-".join)
def test_norm_of_shards_is_refused(kind, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", SHARDED, str(tmp_path / "store"), *kind]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


# ------------------------------------------------------------------ loose ends


@pytest.mark.parametrize("refused", ["AMP", "a bad gradient", "a bad number"])
def test_step_that_did_not_happen_holds_no_gradients(engine, refused):
    ours, a, _, _ = stepped(engine)
    seen = [weakref.ref(p.grad) for p in ours]
    if refused == "AMP":
        a.grad_scale, a.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        a.step()
        del a.grad_scale, a.found_inf
    else:
        good = a.param_groups[0]["lr"]
        if refused == "a bad gradient":
            ours[2].grad = torch.zeros(6).to_sparse()
        else:
            a.param_groups[0]["lr"] = -1.0
        with pytest.raises((RuntimeError, ValueError)):
            a.step()
        a.param_groups[0]["lr"] = good
    for p in ours:
        p.grad = None
    assert [ref() for ref in seen] == [None] * len(seen)


NO_NUMBERS = ["0.1", decimal.Decimal("0.1"), b"1", 0.1j, torch.tensor(1j), None, [0.1]]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused(engine, value):
    for key in ("lr", "weight_decay", "eps"):
        with pytest.raises((TypeError, ValueError), match=key):
            fusedopt.AdamW(params((3,)), engine=engine, **{key: value})
        ours, a, _, _ = stepped(engine)
        before = snapshot(a)
        a.param_groups[0][key] = value
        with pytest.raises((TypeError, ValueError), match=key):
            a.step()
        assert_same(snapshot(a), before)


@pytest.mark.parametrize("betas", [(0.9, 0.99, 0.999), (0.9,), (0.9, "0.99"), 0.9, (decimal.Decimal("0.9"), 0.99)], ids=repr)
def test_betas_are_a_pair_of_numbers(engine, betas):
    with pytest.raises((TypeError, ValueError), match="betas"):
        fusedopt.AdamW(params((3,)), betas=betas, engine=engine)
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    a.param_groups[0]["betas"] = betas
    with pytest.raises((TypeError, ValueError), match="betas"):
        a.step()
    assert_same(snapshot(a), before)


@pytest.mark.parametrize("value", [fractions.Fraction(1, 8), np.float32(0.125), np.array(0.125), torch.tensor(0.125)], ids=repr)
def test_real_numbers_of_all_kinds(engine, value):
    ours, a, theirs, b = stepped(engine)
    a.param_groups[0]["lr"], b.param_groups[0]["lr"] = value, 0.125
    for _ in range(2):
        a.step(), b.step()
        assert_equal(ours, a, theirs, b)
        same_gradients(ours, theirs)


@pytest.mark.parametrize("key", ["lr", "weight_decay", "eps"])
def test_number_too_large_for_single_precision(engine, key):
    with pytest.raises(ValueError, match=f"{key}.*1e\\+300"):
        fusedopt.AdamW(params((3,)), engine=engine, **{key: 1e300})
    ours, a, _, _ = stepped(engine)
    before = snapshot(a)
    for value in (1e300, torch.tensor(1e300, dtype=torch.float64)):
        a.param_groups[0][key] = value
        if isinstance(value, torch.Tensor) and engine in ("cuda", "triton"):
            continue  # a tensor on the parameters' device is read there
        with pytest.raises(ValueError, match=f"{key}.*1e\\+300"):
            a.step()
        assert_same(snapshot(a), before)
    wide = params((3,), dtype=torch.float64)
    fill_gradients(wide)
    fusedopt.AdamW(wide, engine=engine, **{key: 1e300}).step()


def test_parameters_that_torch_skips():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    odd = [nested, torch.nn.UninitializedParameter(), torch.nn.Parameter(torch.ones(3).to_sparse())]
    ours = params((4,))
    a = fusedopt.AdamW([odd[0], *ours, *odd[1:]], lr=0.1, max_grad_norm=1.0)
    for _ in range(2):
        before = ours[0].detach().clone()
        fill_gradients(ours)
        a.step()
        assert not torch.equal(ours[0], before)
    assert list(a.state) == ours


def test_lazy_module_is_stepped_once_it_is_there():
    model = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.Linear(3, 2))
    a = fusedopt.AdamW(model.parameters(), lr=0.1)
    for p in model[1].parameters():
        p.grad = torch.ones_like(p)
    a.step()
    model(torch.ones(2, 4)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    a.step()
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
