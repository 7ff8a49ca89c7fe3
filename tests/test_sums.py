"""Rules that add up, over every scope and on every engine, against textbook loops in float64."""

import math

import pytest
import rule_builds
import torch
from conftest import AVAILABLE
from helpers import close
from sum_rules import SCOPED, Channel, Concluding, Layer, Sharing, Textbook

import fusedopt
from fusedopt.context import StepRequest
from fusedopt.engines import cpu, cuda, tables
from fusedopt.passes import Pass
from fusedopt.scaling import Scaling
from fusedopt.sums import Segments

SMALL = [(6, 5), (3,), (1,), (4, 3, 2, 2), (), (0,), (0, 4), (5, 0), (2, 70), (17,)]
SHAPES = [*SMALL, (2, 3000), (700, 3), (1, 2000)]


@pytest.fixture(autouse=True)
def rules_of_tests(engine, monkeypatch):
    """The engine knows them."""
    if engine == "cpu":
        known = {**cpu.kernels(), **rule_builds.cpu_kernels()}
        monkeypatch.setattr(cpu, "kernels", lambda: known)
    elif engine == "cuda":
        extension = rule_builds.cuda_extension()
        monkeypatch.setattr(cuda, "load", lambda: extension)
        cuda.kernels.cache_clear()
        yield
        monkeypatch.undo()
        cuda.kernels.cache_clear()
        return
    elif engine == "triton":
        import triton_rules

        triton_rules.know(monkeypatch)
    yield


def parameters(shapes=SHAPES, dtype=torch.float32):
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def groups_of(params):
    """Three, the last of which has none."""
    return [{"params": params[:4]}, {"params": params[4:], "maximize": True}, {"params": []}]


def gradients(params, t):
    """Some have none, and one is zero."""
    for i, p in enumerate(params):
        p.grad = None if (t + i) % 4 == 3 else torch.randn_like(p) * (0 if (t + i) % 7 == 5 else 1)


def run(of, scope, engine, steps=5, shapes=None, dtype=torch.float32, limit=1e-5, arrange=lambda p: p, **options):
    """Ours beside the textbook."""
    steps, shapes = (3, shapes or SMALL) if engine == "triton" else (steps, shapes or SHAPES)  # interpreted, it is slow
    ours = [torch.nn.Parameter(arrange(p.detach())) for p in parameters(shapes, dtype)]
    a = of(groups_of(ours), scope=scope, engine=engine, **options)
    truth, states = [p.detach().double().clone() for p in ours], [{} for _ in ours]
    for t in range(steps):
        gradients(ours, t)
        signs = [1 if i < 4 else -1 for i in range(len(ours))]
        grads = [None if p.grad is None else sign * p.grad.double() for sign, p in zip(signs, ours, strict=True)]
        norm = math.sqrt(sum(float((g**2).sum()) for g in grads if g is not None))
        clip = options.get("max_grad_norm")
        a.step()
        Textbook(of, scope, [truth[:4], truth[4:]], grads, states, min(1.0, clip / (norm + 1e-6)) if clip else 1.0)
    for p, q, x in zip(ours, truth, states, strict=True):
        close(p.double(), q, limit)
        for name in of.rule.scalars:
            if name in x:
                close(a.state[p][name].double(), torch.tensor(float(x[name]), dtype=torch.float64), 1e-5)
    return ours, a


@pytest.mark.parametrize(("of", "scope"), SCOPED)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_steps_are_the_textbooks(engine, of, scope, clip):
    run(of, scope, engine, max_grad_norm=clip)


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_doubles(engine, of, scope):
    run(of, scope, engine, dtype=torch.float64, limit=1e-7 if of.rule.scalars.keys() - {"step"} else 1e-12)


@pytest.mark.parametrize(("of", "scope"), SCOPED)
@pytest.mark.parametrize("kind", ["transposed", "strided", "misaligned"])
def test_memory_of_every_kind(engine, of, scope, kind):
    def arrange(p):
        if kind == "transposed":
            return p.transpose(0, -1).contiguous().transpose(0, -1) if p.dim() > 1 else p
        if kind == "strided":
            return torch.stack([p, p], -1)[..., 0]
        return torch.cat([torch.zeros(1), p.flatten()])[1:].view(p.shape)

    run(of, scope, engine, arrange=arrange)


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_many_small_tensors_and_large_ones(engine, of, scope):
    shapes = [(3, 4)] * 300 + [(40, 700), (3, 20011), (9000,), (2500, 2)]
    if engine == "triton":
        shapes = [(3, 4)] * 10 + [(5, 700), (3, 5011), (9000,)]
    run(of, scope, engine, steps=3, shapes=shapes)


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_shared_scalars_are_equal_in_all_states(engine, of, scope):
    _, a = run(of, scope, engine)
    names = (*of.rule.shared, *of.rule.epilogue) if scope in ("group", "all") else ()
    members = [group["params"] for group in a.param_groups]
    for params in members if scope == "group" else [[p for ps in members for p in ps]]:
        for name in names:
            assert len({float(a.state[p][name]) for p in params if a.state[p]}) == bool(params)


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_a_skipped_step_changes_nothing(engine, of, scope):
    ps = parameters(SMALL)
    a = of(groups_of(ps), scope=scope, engine=engine, skip_nonfinite=True)
    for t in range(4):
        gradients(ps, t)
        if t >= 2:
            ps[0].grad = torch.full_like(ps[0], math.inf if t == 2 else math.nan)
            before = [p.detach().clone() for p in ps]
            states = [{k: v.clone() for k, v in a.state[p].items()} for p in ps]
        a.step()
    assert a.skipped_steps == 2
    for p, q, x in zip(ps, before, states, strict=True):
        assert torch.equal(p, q) and all(torch.equal(v, x[k]) for k, v in a.state[p].items())


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_the_same_bits_every_time_and_after_a_resume(engine, of, scope):
    results = []
    for resumed in (False, False, True):
        torch.manual_seed(3)
        ps = parameters(SMALL)
        a = of(groups_of(ps), scope=scope, engine=engine)
        for t in range(4):
            gradients(ps, t)
            a.step()
            if resumed and t == 1:
                b = of(groups_of(ps), scope=scope, engine=engine)
                b.load_state_dict(a.state_dict())
                a = b
        results.append([p.detach().clone() for p in ps])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_passes_by_themselves(engine, of, scope):
    """As where ranks or plans join what was found between them."""
    results = []
    for alone in (False, True):
        torch.manual_seed(4)
        ps = parameters(SMALL)
        a = of(groups_of(ps), scope=scope, engine=engine, max_grad_norm=1.0)
        for t in range(4):
            gradients(ps, t)
            if not alone or t == 0:
                a.step()
                continue
            for plan in a._plans:
                if not plan.scan():
                    a.step()  # plans anew
                    break
                squared = plan.run(Pass.NORM, StepRequest(Scaling()), None).squared_norm
                squared = squared.clone() if isinstance(squared, torch.Tensor) else squared
                for each in (Pass.SUMS, Pass.SCOPES, Pass.UPDATE, Pass.EPILOGUE):
                    plan.run(plan.passes & each, StepRequest(Scaling(), 1.0), squared)
                plan.finish()
        results.append([p.detach().clone() for p in ps])
    for p, q in zip(*results, strict=True):
        close(p, q, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_halves(engine, of, scope, dtype):
    run(of, scope, engine, steps=1, dtype=dtype, limit=2**-7 if dtype == torch.bfloat16 else 2**-10)


@pytest.mark.parametrize(("of", "scope"), SCOPED)
def test_complex_numbers_are_pairs(engine, of, scope):
    ps = [torch.nn.Parameter(torch.randn(shape, dtype=torch.complex64)) for shape in [(4, 3), (5,), ()]]
    qs = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in ps]
    if scope == "channel":
        ps, qs = ps[:1], qs[:1]
    a, b = of(ps, scope=scope, engine=engine), of(qs, scope=scope, engine="eager")
    for _ in range(3):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = torch.view_as_real(p.grad)
        a.step(), b.step()
    for p, q in zip(ps, qs, strict=True):
        close(torch.view_as_real(p.detach()), q, 1e-5)


@pytest.mark.skipif(len({"cpu", "eager"} & set(AVAILABLE)) < 2, reason="needs both engines")
@pytest.mark.parametrize("of", [Sharing, Concluding])
@pytest.mark.parametrize("scope", ["group", "all"])
def test_scopes_span_engines(engine, of, scope):
    """A parameter that only eager steps has the same scope as the others."""
    if engine != "cpu":
        pytest.skip("one engine will do beside eager")
    torch.manual_seed(5)
    ps = parameters()
    memory = [torch.randn(31)] * 2
    memory[1] = memory[0].clone()
    ps[0] = torch.nn.Parameter(memory[0][:30].view(6, 5))
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    qs[0] = torch.nn.Parameter(memory[1][:30].view(6, 5))
    a, b = of(groups_of(ps), scope=scope, engine="eager"), of(groups_of(qs), scope=scope)
    for t in range(4):
        gradients(ps, t)
        for p, q in zip(ps, qs, strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        ps[0].grad, qs[0].grad = (m[1:].view(6, 5) for m in memory)  # in what is written: eager alone takes that
        a.step(), b.step()
    assert len(b._plans) == 2
    for p, q in zip(ps, qs, strict=True):
        close(p, q, 1e-5)


def test_a_scope_that_a_rule_does_not_have(engine):
    with pytest.raises(ValueError, match="scope is 'channel'; it may be 'group', 'all'"):
        Sharing(parameters(), scope="channel", engine=engine)


def test_segments_of_channels():
    places = Segments("channel", [{"params": parameters([(3, 2), (5,), (4, 1, 2)])}, {"params": parameters([()])}])
    assert places.first == [0, 3, 4, 8, 9] and places.scopes == [0, 1, 2, 3] and places.n_scopes == 4


def test_tables_of_many_channels_are_small():
    """Llama 3 8B, whose 1.6 million channels have no tables of their own."""
    layer = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
    shapes = [*[*layer, (4096,), (4096,)] * 32, (128256, 4096), (128256, 4096), (4096,)]
    ps = [torch.nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    a = Channel(ps)
    for p in ps:
        a.state[p] = {"step": torch.zeros((), device="meta"), "momentum_buffer": torch.empty_like(p)}
    places = Segments("channel", a.param_groups)
    assert places.first[-1] == 1_632_833
    names = ("momentum_buffer",), ("step",)
    rows = tables.Rows(a, list(range(len(ps))), torch.device("cpu"), names, 400, 256, tables.SHARE_SIZES, places)
    standing = rows.rows, rows.tiles, rows.shares, rows.borders, rows.layouts, rows.row_sums
    assert sum(t.nbytes for t in standing) < 200_000


def test_layers_can_step_in_backward(engine):
    from fusedopt import step_in_backward

    p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
    a, b = Layer([p], engine=engine), Layer([q], engine=engine)
    handle = step_in_backward(a)
    for t in range(3):
        (p * (t + 1)).sum().backward()
        (q * (t + 1)).sum().backward()
        b.step()
        q.grad = None
    handle.remove()
    assert torch.equal(p, q)
    with pytest.raises(RuntimeError, match="adds up over 'group'"):
        step_in_backward(Sharing([p], engine=engine))
    step_in_backward(Channel([p], engine=engine)).remove()


def test_differentiable_steps_go_through_the_sums_of_tensors():
    x, g = (torch.randn(3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def stepped(value, grad):
        p = value.clone()
        p.grad = grad
        fusedopt.LAMB([p], lr=0.1, weight_decay=0.1, differentiable=True).step()
        return p

    assert torch.autograd.gradcheck(stepped, (x, g))
    with pytest.raises(ValueError, match="differentiable=True does not go through sums over 'all'"):
        Sharing([torch.ones(3)], scope="all", differentiable=True)
