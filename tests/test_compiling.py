"""Steps beside torch.compile and autograd: what they leave alone, and what they tell."""

import copy
import pickle

import pytest
import torch
from helpers import assert_same, close, fill_gradients, params, snapshot
from torch._dynamo.utils import counters

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method. is deprecated:DeprecationWarning")  # Dynamo's own

X = torch.linspace(-1, 1, 32).reshape(4, 8)


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def trained(make, *, compiled, steps=4):
    """Graph breaks and parameters of a few training steps."""
    torch._dynamo.reset()
    counters.clear()
    module = model()
    optimizer = make(module.parameters())

    def train():
        optimizer.zero_grad()
        loss = module(X).square().sum()
        loss.backward()
        optimizer.step()

    step = torch.compile(train, backend="eager") if compiled else train
    for _ in range(steps):
        step()
    return sum(counters["graph_break"].values()), list(module.parameters())


def test_a_compiled_training_step_breaks_no_more_than_with_torchs(engine):
    breaks, ours = trained(lambda ps: fusedopt.AdamW(ps, engine=engine, max_grad_norm=1.0), compiled=True)
    most, _ = trained(lambda ps: torch.optim.AdamW(ps, fused=True), compiled=True)
    _, plain = trained(lambda ps: fusedopt.AdamW(ps, engine=engine, max_grad_norm=1.0), compiled=False)
    assert breaks <= most
    assert all(map(torch.equal, ours, plain))


def test_a_compiled_step_breaks_once_at_the_call(engine):
    torch._dynamo.reset()
    ps = params((3, 4), (5,))
    optimizer = pickle.loads(pickle.dumps(fusedopt.SGD(ps, lr=0.1, momentum=0.9, engine=engine)))
    ps = optimizer.param_groups[0]["params"]
    other = copy.deepcopy(optimizer)
    qs = other.param_groups[0]["params"]
    counters.clear()
    step = torch.compile(optimizer.step, backend="eager")
    for t in range(4):
        optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 0.1 / (1 + t)
        fill_gradients(ps)
        for p, q in zip(ps, qs, strict=True):
            q.grad = p.grad.clone()
        step()
        other.step()
    assert sum(counters["graph_break"].values()) == 1 and not counters["stats"]["calls_captured"]
    assert_same(snapshot(optimizer), snapshot(other))


def test_a_closure_may_call_what_is_compiled(engine):
    torch._dynamo.reset()
    counters.clear()
    module = model()
    compiled = torch.compile(module, backend="eager")
    optimizer = fusedopt.AdamW(module.parameters(), engine=engine)

    def closure():
        optimizer.zero_grad()
        loss = compiled(X).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(3)]
    assert losses[2] < losses[0] and counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("clip", [None, 1.0])
def test_going_backward_through_what_was_stepped_is_an_error(engine, clip):
    module = model()
    optimizer = fusedopt.AdamW(module.parameters(), engine=engine, max_grad_norm=clip)
    for _ in range(3):
        module(X).sum().backward()
        stale = module(X).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.backward()
        optimizer.zero_grad()


def test_versions_move_where_something_was_written(engine):
    ps = params((3, 4), (5,), (2,))
    frozen = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.SGD([*ps, frozen], lr=0.1, skip_nonfinite=True, engine=engine)
    for t in range(4):
        fill_gradients(ps)
        ps[1].grad = None if t == 1 else ps[1].grad
        if t == 3:
            ps[0].grad[0] = torch.nan
        before = [p._version for p in (*ps, frozen)]
        optimizer.step()
        moved = [p._version > was for p, was in zip((*ps, frozen), before, strict=True)]
        if t < 3:
            assert moved == [True, t != 1, True, False]
        elif engine in ("cpu", "eager"):  # the others' host does not wait to hear whether a step was skipped
            assert moved == [False] * 4


def test_a_flag_leaves_versions_as_they_are(engine):
    if engine == "eager":
        pytest.skip("torch's own operations move them")
    ps = params((3, 4), (5,))
    optimizer = fusedopt.AdamW(ps, engine=engine)
    optimizer.increments_versions = False
    optimizer = copy.deepcopy(optimizer)
    ps = optimizer.param_groups[0]["params"]
    fill_gradients(ps)
    before = [p._version for p in ps]
    optimizer.step()
    assert [p._version for p in ps] == before
    handle = fusedopt.step_in_backward(optimizer)
    for _ in range(2):
        sum(p.sum() for p in ps).backward()
    assert [p._version for p in ps] == before
    handle.remove()


def test_steps_in_backward_move_versions(engine):
    ps = params((3, 4), (5,))
    optimizer = fusedopt.AdamW(ps, engine=engine)
    fusedopt.step_in_backward(optimizer)
    for _ in range(3):
        before = [p._version for p in ps]
        sum(p.sum() for p in ps).backward()
        assert all(p._version > was for p, was in zip(ps, before, strict=True))


def test_parameters_of_inference_mode_have_no_version(engine):
    with torch.inference_mode():
        ps = [torch.randn(3, 4), torch.randn(5)]
        optimizer = fusedopt.SGD(ps, lr=0.5, engine=engine)
        fill_gradients(ps)
        before = [p.clone() for p in ps]
        optimizer.step()
        for p, was in zip(ps, before, strict=True):
            close(p, was - 0.5 * p.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grad_norm_is_one_tensor_that_steps_fill(engine, dtype):
    ps = params((3, 4), (5,), dtype=dtype)
    optimizer = fusedopt.AdamW(ps, engine=engine, max_grad_norm=1.0)
    norm = optimizer.grad_norm
    assert norm.dtype == dtype and norm.device == ps[0].device and not norm.dim() and not norm.requires_grad
    address = norm.data_ptr()
    for t in range(4):
        fill_gradients(ps)
        optimizer.step()
        close(norm, torch.nn.utils.get_total_norm([p.grad for p in ps]))
        assert optimizer.grad_norm is norm and norm.data_ptr() == address
        if t == 1:  # plans are made anew, and states are loaded
            optimizer.add_param_group({"params": params((2, 2), dtype=dtype)})
            ps.append(optimizer.param_groups[1]["params"][0])
            optimizer.load_state_dict(optimizer.state_dict())
    optimizer.max_grad_norm = None
    assert optimizer.grad_norm is norm  # of the last step
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.skip_nonfinite = True
    assert optimizer.grad_norm is norm


def test_grad_norm_outlives_copies(engine):
    ps = params((3, 4))
    optimizer = fusedopt.AdamW(ps, engine=engine, max_grad_norm=1.0)
    fill_gradients(ps)
    optimizer.step()
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.grad_norm is not optimizer.grad_norm and torch.equal(other.grad_norm, optimizer.grad_norm)
        other.param_groups[0]["params"][0].grad = torch.zeros(3, 4)
        other.step()
        assert other.grad_norm == 0 and optimizer.grad_norm > 0


def test_grad_norm_follows_parameters_that_become_others(engine):
    ps = params((3, 4))
    optimizer = fusedopt.SGD(ps, lr=0.1, engine=engine, max_grad_norm=1.0)
    fill_gradients(ps)
    optimizer.step()
    narrow = optimizer.grad_norm
    wide = torch.nn.Parameter(ps[0].detach().double())
    wide.grad = torch.full_like(wide, 2.0)
    optimizer.param_groups[0]["params"][0] = wide
    optimizer.step()
    assert optimizer.grad_norm.dtype == torch.float64 and optimizer.grad_norm is not narrow
    close(optimizer.grad_norm, torch.tensor(48.0, dtype=torch.float64).sqrt())


def test_the_next_step_alone_clips(engine):
    ps = params((3, 4), (5,))
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    ours, theirs = fusedopt.SGD(ps, lr=0.1, engine=engine), torch.optim.SGD(qs, lr=0.1)
    for t, limit in enumerate([0.5, None, torch.inf, 0.5]):
        fill_gradients(ps)
        for p, q in zip(ps, qs, strict=True):
            q.grad = p.grad.clone()
        if limit is not None:
            norm = ours.clip_next_step(limit)
            truth = torch.nn.utils.clip_grad_norm_(qs, limit)
        if t == 3:
            ours.max_grad_norm = 0.1  # the stricter one holds
            torch.nn.utils.clip_grad_norm_(qs, 0.1)
        ours.step()
        theirs.step()
        assert (ours.grad_norm is norm) if limit else ours.grad_norm is None
        close(norm, truth)
        for p, q in zip(ps, qs, strict=True):
            close(p, q)


@pytest.mark.parametrize(
    ("limit", "kind"), [(0, ValueError), (-1.0, ValueError), (torch.nan, ValueError), ("1", TypeError)]
)
def test_the_next_step_clips_to_something_positive(limit, kind):
    optimizer = fusedopt.SGD(params((3,)), lr=0.1)
    with pytest.raises(kind, match="max_norm"):
        optimizer.clip_next_step(limit)
    assert optimizer.grad_norm is None
    fusedopt.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="steps in backward"):
        optimizer.clip_next_step(1.0)
