"""The Triton engine: its rules against the eager ones, its kernels against odd sizes, and its launches counted."""

import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import AVAILABLE
from helpers import ALL, BY_NAME, RULES, close, fill_gradients, pair, params, same_gradients
from sum_rules import SCOPED

import fusedopt
from fusedopt import state
from fusedopt.engines import triton as engine

pytestmark = pytest.mark.skipif("triton" not in AVAILABLE, reason="needs triton, interpreting on the CPU")

if "triton" in AVAILABLE:
    import triton_rules

    from fusedopt.triton_kernels import norm, rules, step


def test_every_rule_is_there_under_the_same_names():
    found = rules.by_name()
    assert found.keys() == RULES.keys()
    for rule in RULES.values():
        ours = found[rule.name]
        assert ours.states == tuple(s.name for s in rule.states)
        assert ours.scalars == tuple(rule.scalars)
        assert sorted(ours.hyper) == sorted(h.name for h in rule.hyper)


def views(sizes, offset):
    """Parameters that begin so many elements into their memory."""
    return [torch.nn.Parameter(torch.randn(n + offset)[offset:]) for n in sizes]


SIZES = [0, 1, 3, 63, 64, 65, 255, 256, 257, 300, 511, 512, 1023, 1024, 1025, 4097]


@pytest.mark.parametrize("programs", [1, 3, pytest.param(64, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("offset", [0, 1, 4])
@pytest.mark.parametrize(
    "case", ["AdamW amsgrad", "SGD", *(pytest.param(c, marks=pytest.mark.nightly) for c in ("RMSprop both", "Lion"))]
)
def test_tiles_and_programs(monkeypatch, case, offset, programs):
    """Full tiles, what is left of them, tensors that are not aligned, and any share of tiles."""
    monkeypatch.setattr(engine, "INTERPRETED_TILE", 256)
    monkeypatch.setattr(engine, "INTERPRETED_PROGRAMS", programs)
    ours = views(SIZES, offset)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = BY_NAME[case].build(ours, engine="triton", max_grad_norm=1.0)
    b = BY_NAME[case].build(theirs, engine="eager", max_grad_norm=1.0)
    for t in range(2):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            p.grad = None if (t + i) % 5 == 4 else torch.randn(p.numel() + offset)[offset:]
            q.grad = None if p.grad is None else p.grad.clone()
        a.step(), b.step()
        close(a.grad_norm, b.grad_norm)
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        for key, value in b.state[q].items():
            close(a.state[p][key], value)


@pytest.mark.parametrize("programs", [1, 7])
def test_programs_beyond_a_row_touch_nothing(monkeypatch, programs):
    monkeypatch.setattr(engine, "INTERPRETED_TILE", 256)
    monkeypatch.setattr(engine, "INTERPRETED_PROGRAMS", programs)
    memory = torch.full((4000,), 7.0)
    p = torch.nn.Parameter(memory[1000:2999])
    optimizer = fusedopt.SGD([p], lr=0.5, engine="triton")
    p.grad = torch.ones(1999)
    optimizer.step()
    assert (memory[:1000] == 7).all() and (memory[2999:] == 7).all() and (memory[1000:2999] == 6.5).all()


def summed():
    """Parameters whose segments end within tiles, at their ends and in several shares; some in memory of odd kinds."""
    shapes = [(7,), (3, 700), (5, 64), (0,), (2, 3, 130), (0, 4), (4, 1), (300,), (2, 0)]
    values = [torch.randn(shape) for shape in shapes]
    values += [torch.randn(130, 3).t(), torch.randn(391)[1:].view(3, 130), torch.randn(3, 260)[:, ::2]]
    return [torch.nn.Parameter(value) for value in values]


def in_groups(ps):
    return [{"params": ps[:5], "lr": 0.1}, {"params": ps[5:9]}, {"params": ps[9:], "maximize": True}]


def give_gradients(t, *lists):
    """The same to all; some have none, and one is zero."""
    for i, ps in enumerate(zip(*lists, strict=True)):
        g = None if (t + i) % 5 == 4 else torch.randn(ps[0].shape) * (i != 6)
        for p in ps:
            p.grad = None if g is None else g.clone()


@pytest.mark.parametrize("programs", [1, 3, pytest.param(7, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_sums_of_tiles_and_programs(monkeypatch, of, scope, programs):
    triton_rules.know(monkeypatch)
    monkeypatch.setattr(engine, "INTERPRETED_TILE", 128)
    monkeypatch.setattr(engine, "INTERPRETED_PROGRAMS", programs)
    ours = summed()
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = of(in_groups(ours), scope=scope, engine="triton", max_grad_norm=1.0)
    b = of(in_groups(theirs), scope=scope, engine="eager", max_grad_norm=1.0)
    for t in range(3):
        give_gradients(t, ours, theirs)
        a.step(), b.step()
        close(a.grad_norm, b.grad_norm)
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in b.state[q].items():
            close(a.state[p][key], value)


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_sums_have_the_same_bits_whoever_adds_them_up(monkeypatch, of, scope):
    """As many programs as there are, for the same shares."""
    triton_rules.know(monkeypatch)
    monkeypatch.setattr(engine, "INTERPRETED_TILE", 128)
    monkeypatch.setattr(engine, "INTERPRETED_PROGRAMS", 6)
    results = []
    for n in (1, 2, 6):

        class Kernel(engine.Kernel):
            def __init__(self, function, constants, more, programs, most, device, n=n):
                super().__init__(function, constants, more, min(programs, n), most, device)

        with monkeypatch.context() as patch:
            patch.setattr(engine, "Kernel", Kernel)
            torch.manual_seed(1)
            ps = summed()
            optimizer = of(in_groups(ps), scope=scope, engine="triton", max_grad_norm=1.0)
            give_gradients(0, ps)
            optimizer.step()
        results.append([p.detach().clone() for p in ps])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_sums_that_single_precision_cannot_hold():
    ours, theirs = ([torch.nn.Parameter(torch.full((n,), 1e18)) for n in (40_000, 9)] for _ in range(2))
    a, b = (fusedopt.LARS(ps, weight_decay=0.01, engine=name) for ps, name in ((ours, "triton"), (theirs, "eager")))
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.full_like(p, 1e15)
        q.grad = p.grad.clone()
    a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        assert p.isfinite().all()
        close(p, q)


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were launched, by name."""
    found = []
    run = type(step.step).run

    def counted(self, *args, **kwargs):
        found.append(self.__name__)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(type(step.step), "run", counted)
    assert type(norm.norm) is type(step.step)
    return found


@pytest.mark.parametrize("name", ALL)
def test_one_launch_of_each_kernel_for_all_groups_and_dtypes(launches, name):
    ps = [p for dtype in (torch.float32, torch.bfloat16, torch.float64) for p in params((5,), (3, 2), dtype=dtype)]
    groups = [{"params": ps[k::3], "lr": 0.1 * (k + 1), "weight_decay": 0.1 * k} for k in range(3)]
    optimizer = getattr(fusedopt, name)(groups, engine="triton")
    if "amsgrad" in optimizer.defaults:
        optimizer.param_groups[1]["amsgrad"] = True
    before = ["sums"] * bool(optimizer.rule.measures)
    if optimizer.rule.has_sums() and optimizer.scope != "tensor":
        before += ["fold"] * bool(optimizer.rule.measures) + ["scopes"]
    expected = [*before, "step", *["epilogue"] * bool(optimizer.rule.epilogue)]
    for _ in range(3):
        fill_gradients(ps)
        optimizer.step()
    assert launches == expected * 3
    optimizer.max_grad_norm = 1.0
    fill_gradients(ps)
    optimizer.step()
    assert launches == expected * 3 + ["norm", *expected]


def test_status_stays_on_the_device():
    """Only a first step waits; later ones leave the norm and the skips to be read by whoever wants them."""
    ps = params((5,))
    optimizer = fusedopt.AdamW(ps, engine="triton", skip_nonfinite=True)
    fill_gradients(ps)
    optimizer.step()
    (plan,) = optimizer._plans
    for expected in (1, 2):
        ps[0].grad = torch.full((5,), math.inf)
        optimizer.step()
        assert optimizer._stepper.skipped == 0 and int(plan.status.skipped_steps) == expected == optimizer.skipped_steps
    assert optimizer.grad_norm is plan.status.narrow_norm and optimizer.state[ps[0]]["step"] == 1
    optimizer.param_groups[0]["amsgrad"] = True  # needs another plan; what was counted stays
    fill_gradients(ps)
    optimizer.step()
    assert optimizer.skipped_steps == 2 and optimizer._plans != [plan]


def test_skips_are_counted_once_with_a_first_step():
    ps = params((5,))
    optimizer = fusedopt.AdamW(ps, engine="triton", skip_nonfinite=True)
    for expected in (1, 2):
        ps[0].grad = torch.full((5,), math.nan)
        optimizer.step()
        assert optimizer.skipped_steps == expected and not optimizer.state


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("where", ["lr", "betas"])
def test_tensor_hyperparameters_are_read_by_the_kernel(where, kind):
    """They may change between launches that the host takes no part in."""
    value = torch.tensor(0.25, dtype=kind)
    options = {"lr": value} if where == "lr" else {"betas": (value, 0.99)}
    ours, a, theirs, b = pair([(40,)], "AdamW", engine="triton")
    for optimizer in (a, b):
        optimizer.param_groups[0].update({k: v if optimizer is a else 0.25 for k, v in options.items()})
    if where == "betas":
        b.param_groups[0]["betas"] = (0.25, 0.99)
    same_gradients(ours, theirs)
    for _ in range(2):
        a.step(), b.step()
    (plan,) = a._plans
    words = plan.step_table.words.clone()
    value.fill_(0.125)
    b.param_groups[0].update({"lr": 0.125} if where == "lr" else {"betas": (0.125, 0.99)})
    a.step(), b.step()
    assert torch.equal(plan.step_table.words, words)
    close(ours[0], theirs[0])


def test_a_norm_that_single_precision_cannot_square():
    ps = params((300,), (40,))
    for p in ps:
        p.grad = torch.full_like(p, 1e25)
    optimizer = fusedopt.SGD(ps, engine="triton", max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    assert optimizer.skipped_steps == 0
    close(optimizer.grad_norm, torch.tensor(math.sqrt(340) * 1e25))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 1.00390625, 1.01171875, -3.3e38, 1e-40, math.inf, math.nan])
def test_bfloat16_is_rounded_to_the_nearest(value):
    """The interpreter cuts off; kernels must not."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    p.grad = torch.full((3,), -value)
    fusedopt.SGD([p], lr=1.0, engine="triton").step()
    assert torch.equal(p.nan_to_num(nan=5.0), torch.full((3,), value).bfloat16().nan_to_num(nan=5.0))


def test_gradients_with_other_strides_every_step():
    ours, a, theirs, b = pair([(6, 5), (4, 3)], engine="triton")
    for t in range(6):
        first = (torch.randn(6, 5), torch.randn(5, 6).t(), torch.randn(12, 5)[::2])[t % 3]
        same_gradients(ours, theirs, [first, torch.randn(4, 3)])
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)


def test_not_available_without_a_gpu():
    program = "import torch, fusedopt; fusedopt.SGD([torch.nn.Parameter(torch.ones(1))], engine='triton')"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode and "engine 'triton' is not available: torch sees no GPU" in run.stderr


@pytest.fixture
def far(monkeypatch):
    """Counters are treated as those on a GPU: read together, at a plan only."""
    monkeypatch.setattr(state, "is_far", lambda t: isinstance(t, torch.Tensor))


def test_parameters_that_join_late_have_counts_of_their_own(far):
    ours, a, theirs, b = pair([(5,), (6,), (7,)], engine="triton")
    for t in range(6):
        same_gradients(ours, theirs)
        for k in (1, 2):
            if t < 2 * k:
                ours[k].grad = theirs[k].grad = None
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        assert a.state[p]["step"] == b.state[q]["step"]


def test_states_without_gradients_wait_for_theirs(far):
    """Loaded states, or Adagrad's, which are there from the start, of parameters that get no gradient yet."""
    for name in ("Adagrad", "AdamW"):
        ours, a, theirs, b = pair([(5,), (6,)], name, engine="triton")
        if name == "AdamW":
            same_gradients(ours, theirs)
            b.step()
            for p, q in zip(ours, theirs, strict=True):
                p.data.copy_(q)
            a.load_state_dict(b.state_dict())
        for t in range(4):
            same_gradients(ours, theirs)
            if t < 2:
                ours[1].grad = theirs[1].grad = None
            a.step(), b.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p, q)


def test_far_counters_pass_two_to_the_24(far):
    ps = params((3,))
    optimizer = fusedopt.AdamW(ps, engine="triton")
    fill_gradients(ps)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["step"].fill_(2**24 - 2)
    optimizer.load_state_dict(saved)
    for t in range(4):
        optimizer.step()
        assert optimizer.state[ps[0]]["step"] == 2**24 - 1 + t


@pytest.mark.parametrize("first", ["triton", "eager"])
def test_the_norm_spans_plans(first):
    """One plan reports on its device, one to the host; both clip by the norm of all, and count a skip once."""
    ps = params((1,), (1,))
    groups = [{"params": ps[:1], "differentiable": first == "eager"}, {"params": ps[1:]}]
    groups[1]["differentiable"] = first == "triton"
    with torch.no_grad():
        for p in ps:
            p.zero_()
    optimizer = fusedopt.SGD(groups, lr=1.0, max_grad_norm=1.0, skip_nonfinite=True)
    engines_of = optimizer._plans
    assert engines_of is None
    for group in optimizer.param_groups:
        if group["differentiable"]:
            group["params"][0].requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fusedopt.engines.cpu, "available", lambda: "not in this test")
        patch.setattr(fusedopt.engines.cuda, "available", lambda: "not in this test")
        for gradients, norm, skips in (((3.0, 4.0), 5.0, 0), ((math.nan, 1.0), math.nan, 1)):
            for p, g in zip(ps, gradients, strict=True):
                p.grad = torch.tensor([g])
            optimizer.step()
            close(optimizer.grad_norm.nan_to_num(nan=-1.0), torch.tensor(norm).nan_to_num(nan=-1.0))
            assert optimizer.skipped_steps == skips
    assert {plan.asynchronous for plan in optimizer._plans} == {True, False}
    close(torch.cat(ps).detach(), torch.tensor([-0.6, -0.8]))


def test_a_default_device_is_not_where_tables_are_written():
    ps = params((3,))
    fill_gradients(ps)
    torch.set_default_device("meta")
    try:
        optimizer = fusedopt.AdamW(ps, engine="triton", max_grad_norm=1.0)
        optimizer.step()
    finally:
        torch.set_default_device(None)
    assert optimizer.state[ps[0]]["step"] == 1


def test_adabound_with_an_overflowing_second_moment():
    ours, theirs = params((3,)), params((3,))
    for ps, name in ((ours, "triton"), (theirs, "eager")):
        ps[0].data.fill_(1.0)
        ps[0].grad = torch.full((3,), 1e25)
        fusedopt.AdaBound(ps, engine=name).step()
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
