"""Sparse gradients of SGD and Adagrad, as torch has them: the slices that they touch, and nothing else."""

import copy
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_same, close, copies, params, snapshot
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt.optimizer import arguments
from fusedopt.rule import RULE, Rule

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
CASES = {
    "sgd": ("SGD", {"lr": 0.1}),
    "ascent": ("SGD", {"lr": 0.1, "maximize": True}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adagrad": ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1}),
}
cases = pytest.mark.parametrize("case", CASES)


def sparse_like(p, *, dense_dims, nnz=5, coalesced=False):
    """A sparse gradient with indices that repeat."""
    sizes = p.shape[: p.dim() - dense_dims]
    indices = torch.stack([torch.randint(size, (nnz,)) for size in sizes])
    values = torch.randn(nnz, *p.shape[p.dim() - dense_dims :], dtype=p.dtype)
    g = torch.sparse_coo_tensor(indices, values, p.shape, check_invariants=True)
    return g.coalesce() if coalesced else g


def both(case, ps, **ours):
    """Our optimizer of parameters, and torch's of the same."""
    name, options = CASES[case]
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    return getattr(fusedopt, name)(ps, **options, **ours), getattr(torch.optim, name)(qs, **options, foreach=False), qs


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_steps_are_torchs(case, dtype):
    if dtype.is_complex and case == "adagrad":
        pytest.skip("torch has no sparse complex Adagrad")
    ps = [*params((7, 3), (4, 5, 2), (6,), dtype=dtype), *params((3, 3), dtype=dtype)]
    a, b, qs = both(case, ps)
    for t in range(6):
        for i, (p, q) in enumerate(zip(ps, qs, strict=True)):
            if i == 3:
                p.grad = torch.randn_like(p)
            else:
                dense_dims = (1, 1, 0)[i] if t % 2 or i != 1 else 0
                p.grad = sparse_like(p, dense_dims=dense_dims, nnz=0 if t == 2 else 5, coalesced=t == 3)
            q.grad = p.grad.clone()
        if t == 4:
            ps[0].grad = qs[0].grad = None
        a.step()
        if case in ("momentum", "nesterov"):  # torch's buffers take no other number of sparse dimensions
            for q in qs:
                q.grad = q.grad.to_dense() if q.grad is not None and q.grad.is_sparse else q.grad
        b.step()
        for p, q in zip(ps, qs, strict=True):
            close(p, q)


@cases
def test_what_a_gradient_does_not_touch_is_not_written(case):
    """Nor read: NaN there stays where it is."""
    p = torch.nn.Parameter(torch.randn(10, 4))
    optimizer = both(case, [p])[0]
    p.grad = torch.sparse_coo_tensor(torch.tensor([[2, 7, 2]]), torch.randn(3, 4), p.shape)
    optimizer.step()
    before, rests = p.detach().clone(), case not in ("momentum", "nesterov")
    p.grad = torch.sparse_coo_tensor(torch.tensor([[5]]), torch.randn(1, 4), p.shape)
    optimizer.step()
    assert [not torch.equal(was, now) for was, now in zip(before, p.detach(), strict=True)] == [
        i == 5 or (not rests and i in (2, 7)) for i in range(10)
    ]


def test_a_step_of_a_large_table_takes_what_its_slices_take():
    """Memory, not time: nothing of the table's size is made."""
    p = torch.nn.Parameter(torch.zeros(200_000, 16))
    optimizer = fusedopt.Adagrad([p], lr=0.1)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[3, 199_999]]), torch.ones(2, 16), p.shape)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True) as profile:
        optimizer.step()
    assert max(event.self_cpu_memory_usage for event in profile.events() or ()) < 100_000
    close(p.sum(), torch.tensor(-0.1 * 32 * (1 + 2**-0.5)), 1e-5)


class Sizes(TorchDispatchMode):
    """The sizes of what operations make, and of what they read otherwise than by index."""

    def __init__(self):
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        indexes = func in (
            torch.ops.aten.index.Tensor,
            torch.ops.aten.index_put_.default,
            torch.ops.aten.detach.default,
        )
        used = [x for x in args if not indexes] + [result for _ in "1" if all(result is not x for x in args)]
        self.most = max(self.most, *(x.numel() for x in used if isinstance(x, torch.Tensor) and not x.is_sparse), 0)
        return result


@pytest.mark.parametrize(
    ("name", "dtype", "options"),
    [
        ("SGD", torch.bfloat16, {"master": "split"}),
        ("SGD", torch.complex64, {"max_grad_norm": 1.0}),
        ("Adagrad", torch.float32, {"state_dtype": torch.bfloat16}),
        ("Adagrad", torch.float32, {"state_dtype": "8bit"}),
        ("Adagrad", torch.float16, {"master": "fp32"}),
    ],
    ids=str,
)
def test_other_slices_are_neither_read_nor_written_however_stored(name, dtype, options):
    (p,) = ps = params((500, 256), dtype=dtype)
    optimizer = getattr(fusedopt, name)(ps, lr=0.1, **options)
    p.grad = sparse_like(p, dense_dims=1)
    optimizer.step()
    before, touched = p.detach().clone(), torch.zeros(500, dtype=torch.bool)
    p.grad = sparse_like(p, dense_dims=1)
    touched[p.grad._indices()[0]] = True
    with Sizes() as sizes:
        optimizer.step()
    assert sizes.most <= 5 * 256 * 2
    assert torch.equal(p[~touched], before[~touched]) and not torch.equal(p[touched], before[touched])


@pytest.mark.parametrize(("shape", "dense_dims"), [((70, 80), 1), ((70, 80), 0), ((5000,), 0)], ids=str)
def test_blocks_of_eight_bits_stay_whole(shape, dense_dims):
    (p,) = ps = params(shape)
    (q,) = qs = copies(ps)
    a, b = (fusedopt.Adagrad(r, lr=0.1, engine="eager", state_dtype="8bit") for r in (ps, qs))
    for _ in range(3):
        p.grad = sparse_like(p, dense_dims=dense_dims)
        q.grad = p.grad.to_dense()
        a.step(), b.step()
    assert a.state[p]["sum"].dtype == torch.uint8
    for x, y in zip(snapshot(a), snapshot(b), strict=True):
        assert_same(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_added_up_in_single_precision(dtype):
    """Bfloat16 counts no further than 256, and float16 to 65504."""
    (p,) = ps = params((3, 1), dtype=dtype)
    p.data.zero_()
    value = 1.0 if dtype == torch.bfloat16 else 300.0
    p.grad = torch.sparse_coo_tensor(torch.ones(1, 300).long(), torch.full((300, 1), value, dtype=dtype), (3, 1))
    optimizer = fusedopt.SGD(ps, lr=1 / value, max_grad_norm=1e9)
    optimizer.step()
    assert optimizer.grad_norm == 300 * value
    assert p.flatten().tolist() == [0, -300, 0]


def test_scalars_and_odd_memory():
    """No sparse dimension, gaps between elements, lazily conjugated ones, and the same parameter twice."""
    scalar, wide = params((), (7, 6))
    odd = torch.nn.Parameter(wide.detach()[:, ::2])
    lazy = torch.nn.Parameter(torch.randn(5, 2, dtype=torch.complex64).conj())
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer = fusedopt.SGD([scalar, odd, lazy, odd], lr=1.0)
    scalar.grad = torch.tensor(2.0).to_sparse()
    odd.grad, lazy.grad = sparse_like(odd, dense_dims=1), sparse_like(lazy, dense_dims=1)
    before = wide.detach().clone()
    expected = [scalar - 2, odd - 2 * odd.grad.to_dense(), lazy - lazy.grad.to_dense()]
    optimizer.step()
    for p, value in zip((scalar, odd, lazy), expected, strict=True):
        close(p.detach(), value.detach())
    assert torch.equal(wide[:, 1::2], before[:, 1::2])


@cases
def test_gradients_that_change_between_sparse_and_dense(case):
    """And with them the engine."""
    ps = params((7, 3), (4,))
    a, b, qs = both(case, ps)
    for kind in ("dense", "sparse", "sparse", "dense", "none", "sparse", "dense", "none", "dense"):
        g = {"dense": torch.randn(7, 3), "sparse": sparse_like(ps[0], dense_dims=1), "none": None}[kind]
        ps[0].grad, qs[0].grad = g, None if g is None else g.to_dense()
        ps[1].grad = qs[1].grad = torch.randn(4)
        a.step(), b.step()
        for p, q in zip(ps, qs, strict=True):
            close(p, q)


@pytest.mark.parametrize("case", ["sgd", "adagrad"])
@pytest.mark.parametrize(
    "options",
    [
        {"state_dtype": torch.bfloat16},
        {"state_dtype": "8bit"},
        {"master": "fp32"},
        {"master": "split"},
        {"master": "stochastic"},
        {"average": fusedopt.EMA(0.9)},
        {"average": fusedopt.Lookahead(2)},
        {"gradient_noise": fusedopt.GradientNoise(0.1, seed=1)},
    ],
    ids=str,
)
def test_with_options_it_is_the_step_of_a_dense_gradient(case, options):
    dtype = torch.bfloat16 if "master" in options else torch.float32
    ps = params((40, 8), (30, 20), dtype=dtype)
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    a, b = (getattr(fusedopt, CASES[case][0])(r, lr=0.1, engine="eager", **options) for r in (ps, qs))
    for _ in range(4):
        for p, q in zip(ps, qs, strict=True):
            p.grad = sparse_like(p, dense_dims=1, coalesced=True)
            q.grad = p.grad.to_dense()
        a.step()
        b.step()
        assert_same(snapshot(a), snapshot(b))


@cases
def test_the_norm_clips_and_dense_parameters_stay_with_their_engine(case):
    ps = params((7, 3), (50, 4))
    a, b, qs = both(case, ps, max_grad_norm=0.5)
    for _ in range(3):
        gradients = sparse_like(ps[0], dense_dims=1), torch.randn(50, 4)
        for p, q, g in zip(ps, qs, gradients, strict=True):
            p.grad, q.grad = g, g.to_dense().clone()
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(qs, 0.5)
        b.step()
        close(a.grad_norm, norm)
        for p, q in zip(ps, qs, strict=True):
            close(p, q)
    from fusedopt.engines import cpu

    kinds = {stepping.name for stepping in a.engines}
    assert kinds == ({"eager"} if cpu.available() else {"cpu", "eager"})


@pytest.mark.parametrize("handles_amp", [True, False])
def test_a_scaler_unscales_and_skips(handles_amp):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    ps = params((7, 3))
    a, b, qs = both("adagrad", ps, handles_amp=handles_amp)
    for t in range(4):
        g = sparse_like(ps[0], dense_dims=1, coalesced=True)
        ps[0].grad, qs[0].grad = scaler.scale(torch.ones(())) * g, g.clone()
        before = ps[0].detach().clone()
        if t == 2:
            ps[0].grad._values()[0, 0] = torch.inf
        scaler.step(a)
        scaler.update()
        if t == 2:
            assert torch.equal(ps[0], before) and scaler.get_scale() == 2.0
            continue
        b.step()
        close(ps[0], qs[0])


@cases
def test_resumes_from_torchs_and_ours(case):
    ps = params((7, 3))
    a, b, qs = both(case, ps)

    def step(*optimizers):
        for optimizer in optimizers:
            for p in optimizer.param_groups[0]["params"]:
                torch.manual_seed(5)
                p.grad = sparse_like(p, dense_dims=1)
            optimizer.step()

    step(a, b)
    c = getattr(fusedopt, CASES[case][0])(copy.deepcopy(qs), lr=0.1)
    c.load_state_dict(b.state_dict())
    d = fusedopt.fuse(copy.deepcopy(b))
    e = pickled = copy.deepcopy(a)
    e.load_state_dict(a.state_dict())
    step(a, b, c, d, pickled)
    for other in (c, d, pickled):
        close(other.param_groups[0]["params"][0], ps[0])


def test_steps_in_backward():
    table = torch.nn.Embedding(9, 3, sparse=True)
    other = copy.deepcopy(table)
    ours, theirs = fusedopt.SGD(table.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    fusedopt.step_in_backward(ours)
    for _ in range(3):
        at = torch.randint(9, (4,))
        theirs.zero_grad()
        table(at).square().sum().backward()
        other(at).square().sum().backward()
        theirs.step()
        assert table.weight.grad is None
        close(table.weight, other.weight)


def test_differentiable():
    start = torch.randn(6, 2, requires_grad=True)
    p = start.clone()
    p.grad = sparse_like(p, dense_dims=1).requires_grad_(False)
    fusedopt.SGD([p], lr=0.5, differentiable=True).step()
    p.square().sum().backward(inputs=[start])
    close(start.grad, 2 * p.detach())


def bad_decay(p):
    return {"weight_decay": 0.1}, sparse_like(p, dense_dims=1)


def bad_index(p):
    return {}, torch.sparse_coo_tensor(torch.tensor([[99]]), torch.ones(1, 3), p.shape, check_invariants=False)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (bad_decay, "gradient is sparse, and weight_decay=0.1"),
        (bad_index, "indices outside of its shape"),
    ],
)
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_bad_ones_change_nothing(name, bad, says):
    ps = params((5,), (7, 3))
    options, g = bad(ps[1])
    optimizer = getattr(fusedopt, name)(
        [{"params": [("bias", ps[0])]}, {"params": [("table", ps[1])], **options}], lr=0.1
    )
    ps[0].grad, ps[1].grad = torch.ones(5), g
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"parameter 0 'table' of group 1.*{says}"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("name", ["SGD", "Adagrad"])
def test_decay_that_begins_while_training_changes_nothing(name, steps):
    ps = params((5,), (7, 3))
    optimizer = getattr(fusedopt, name)(ps, lr=0.1, weight_decay=torch.tensor(0.0))
    ps[0].grad, ps[1].grad = torch.ones(5), sparse_like(ps[1], dense_dims=1)
    for _ in range(steps):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"].fill_(0.1)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0.*gradient is sparse, and weight_decay="):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize("where", ["sparse", "on meta"])
def test_a_table_that_is_sparse_itself_or_nowhere(where):
    (p,) = params((5,))
    device = "meta" if where == "on meta" else "cpu"
    index = torch.zeros(1, 1, dtype=torch.int64, device=device)
    g = torch.sparse_coo_tensor(index, torch.ones(1, 3, device=device), (7, 3), check_invariants=False)
    q = torch.nn.Parameter(g if where == "sparse" else torch.zeros(7, 3, device=device))
    p.grad, q.grad = torch.ones(5), g
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match=f"parameter 1 of group 0.*the parameter cannot be {where}"):
        fusedopt.SGD([p, q]).step()
    assert torch.equal(p, before)


def test_a_rule_of_ones_own_without_weight_decay():
    class Plain(Rule):
        name, decay, sparse = "plain", RULE, True
        prepare = staticmethod(lambda h, s, new_state: SimpleNamespace())
        direction = staticmethod(lambda p, g, state, c: (g, {}))

    class Own(fusedopt.FusedOptimizer):
        rule = Plain

        def __init__(self, params, lr=1.0, maximize=False, foreach=None, fused=None, differentiable=False):
            super().__init__(params, **arguments(locals(), capturable=False))

    (p,) = ps = params((7, 3))
    p.grad = sparse_like(p, dense_dims=1)
    expected = p.detach() - p.grad.to_dense()
    Own(ps).step()
    close(p.detach(), expected)


def test_engines_that_were_asked_for_refuse(engine):
    if engine == "eager":
        return
    (p,) = params((7, 3))
    p.grad = sparse_like(p, dense_dims=1)
    with pytest.raises(RuntimeError, match=f"engine '{engine}' cannot step it.*sparse"):
        fusedopt.SGD([p], lr=0.1, engine=engine).step()
