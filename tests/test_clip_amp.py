"""Clipping, unscaling and skipping, against torch's own."""

import copy

import pytest
import torch
from conftest import AVAILABLE
from helpers import ALL, TORCH, assert_same, fewer, fill_gradients, fill_growing_gradients, params, snapshot

import fusedopt
from fusedopt import stepper
from fusedopt.ranks import Ranks

SHAPES = [(4097,), (33, 7), (), (0,), (5,)]
INF = float("inf")


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6, INF])
@pytest.mark.parametrize("name", TORCH)
def test_clip_is_clip_grad_norm(engine, name, max_norm):
    ours = params(*SHAPES, dtype=torch.float64)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]

    def groups(ps):
        return [{"params": ps[:2]}, {"params": ps[2:], "lr": 0.05}]

    a = getattr(fusedopt, name)(groups(ours), max_grad_norm=max_norm, engine=engine)
    b = getattr(torch.optim, name)(groups(theirs))
    for t in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) if t != 2 or p.dim() else None
            q.grad = None if p.grad is None else p.grad.clone()
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        b.step()
        torch.testing.assert_close(a.grad_norm, norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
def test_norm_of_other_dtypes(engine, dtype):
    ps = params((70_001,), (3, 5), dtype=dtype)
    fill_gradients(ps)
    optimizer = fusedopt.SGD(ps, max_grad_norm=INF, engine=engine)
    optimizer.step()
    wide = torch.complex128 if dtype.is_complex else torch.float64
    truth = torch.cat([p.grad.to(wide).flatten() for p in ps]).norm().item()
    assert optimizer.grad_norm.dtype == torch.float32 and optimizer.grad_norm.dim() == 0
    assert abs(optimizer.grad_norm.item() - truth) < 1e-6 * truth


def test_norm_is_the_same_every_time(engine):
    ps = params(*[(999,)] * fewer(engine, 300))
    fill_gradients(ps)
    optimizer = fusedopt.SGD(ps, lr=0.0, max_grad_norm=1.0, engine=engine)
    norms = set()
    for _ in range(fewer(engine, 20)):
        optimizer.step()
        norms.add(optimizer.grad_norm.item())
    assert len(norms) == 1


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="the CPU engine is not built")
def test_norm_has_the_same_bits_for_any_number_of_threads(monkeypatch):
    """A share's sum does not depend on who computes it, nor do the shares on how many they are."""
    ps = params((700_001,), (3, 5), (90_000,), *[(7,)] * 300)
    fill_growing_gradients(ps, 3)
    threads, squares = torch.get_num_threads(), []  # of which no bit is lost in a root
    among_others(monkeypatch, lambda total: squares.append(float(total)) or total)
    try:
        for n in (1, 2, 3, 7) * 10:
            torch.set_num_threads(n)
            optimizer = fusedopt.SGD(ps, lr=0.0, max_grad_norm=INF, engine="cpu")
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    assert len(squares) == 40 and len(set(squares)) == 1


def among_others(monkeypatch, add):
    """Ranks are many: ``add`` makes the sum of all of a rank's own."""

    class Others(Ranks):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.are_many = True

        def sum(self, parts):
            return add(sum(part for _, part in parts))

    monkeypatch.setattr(stepper, "Ranks", Others)


def test_ranks_add_up_between_the_passes(engine, monkeypatch):
    """They are given the sum of squares before any parameter is updated, and the step clips by their answer."""
    ps, seen = params((300,), (5, 3), dtype=torch.float64), []
    fill_gradients(ps)
    expected = [p.detach() - p.grad / (2 * sum(q.grad.square().sum() for q in ps).sqrt() + 1e-6) for p in ps]
    before = [p.detach().clone() for p in ps]

    def between(squared):
        assert all(map(torch.equal, ps, before))
        seen.append(float(squared))
        return 4 * squared

    among_others(monkeypatch, between)
    optimizer = fusedopt.SGD(ps, lr=1.0, max_grad_norm=1.0, engine=engine)
    optimizer.step()
    torch.testing.assert_close([p.detach() for p in ps], expected)
    torch.testing.assert_close(seen, [float(sum(q.grad.square().sum() for q in ps))])
    torch.testing.assert_close(optimizer.grad_norm, 2 * torch.tensor(seen[0], dtype=torch.float64).sqrt())


def test_norm_only_when_asked(engine):
    ps = params((3,))
    fill_gradients(ps)
    optimizer = fusedopt.SGD(ps, engine=engine)
    assert optimizer.grad_norm is None
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.max_grad_norm = 1.0
    optimizer.step()
    assert optimizer.grad_norm > 0


@pytest.mark.parametrize("bad", [INF, -INF, float("nan")])
@pytest.mark.parametrize(
    ("history", "clip"),
    [(0, 1.0), (2, None), *(pytest.param(*both, marks=pytest.mark.nightly) for both in ((0, None), (2, 1.0)))],
)
@pytest.mark.parametrize("name", ALL)
def test_skip_leaves_everything(engine, name, history, clip, bad):
    ps = params((70,), (5,))
    optimizer = getattr(fusedopt, name)(ps, skip_nonfinite=True, max_grad_norm=clip, engine=engine)
    for _ in range(history):
        fill_gradients(ps)
        optimizer.step()
    before = snapshot(optimizer)
    fill_gradients(ps)
    ps[1].grad[3] = bad
    optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.skipped_steps == 1
    assert not optimizer.grad_norm.isfinite()
    for _ in range(2 if name == "ADOPT" else 1):  # whose first only sets a moment
        fill_gradients(ps)
        optimizer.step()
    assert optimizer.skipped_steps == 1 and not torch.equal(ps[0], before[0][0])


def test_first_step_after_a_skip_is_a_first_step(engine):
    results = []
    for skips in (0, 2):
        torch.manual_seed(1)
        ps = params((9,))
        optimizer = fusedopt.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True, engine=engine)
        for _ in range(skips):
            ps[0].grad = torch.full((9,), INF)
            optimizer.step()
        for _ in range(3):
            fill_gradients(ps)
            optimizer.step()
        results.append(ps[0].detach())
    assert torch.equal(*results)


def test_nonfinite_gradients_without_skip_do_as_torch(engine):
    for bad in (INF, float("nan")):
        ours, theirs = params((6,)), None
        theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
        gradient = torch.randn(6)
        gradient[2] = bad
        ours[0].grad, theirs[0].grad = gradient, gradient.clone()
        fusedopt.SGD(ours, lr=0.1, max_grad_norm=1.0, engine=engine).step()
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.optim.SGD(theirs, lr=0.1).step()
        torch.testing.assert_close(ours[0], theirs[0], equal_nan=True)


@pytest.mark.parametrize("handles_amp", [True, False])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("name", TORCH)
def test_grad_scaler(engine, name, unscale, handles_amp):
    """Ours under a GradScaler, at both of its stages, against torch's for-loop under another."""
    ours = params((31,), (6, 5))
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    clip = 0.7
    a = getattr(fusedopt, name)(ours, max_grad_norm=clip, handles_amp=handles_amp, engine=engine)
    b = getattr(torch.optim, name)(theirs, foreach=False)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) for _ in range(2)]
    for t in range(8):
        gradients = [torch.randn_like(p) for p in ours]
        if t == 4:
            gradients[0][3] = INF
        for ps, scaler in zip((ours, theirs), scalers, strict=True):
            loss = sum((p * g).sum() for p, g in zip(ps, gradients, strict=True))
            for p in ps:
                p.grad = None
            scaler.scale(loss).backward()
        before = snapshot(a)
        scales = [s.get_scale() for s in scalers]
        assert scales[0] == scales[1]
        if unscale:
            scalers[0].unscale_(a)
        scalers[0].step(a)
        scalers[1].unscale_(b)
        norm = torch.nn.utils.clip_grad_norm_(theirs, clip)
        scalers[1].step(b)
        for scaler in scalers:
            scaler.update()
        if t == 4:
            assert_same(snapshot(a), before)
            assert a.skipped_steps == handles_amp  # the scaler did not call step()
        else:
            torch.testing.assert_close(a.grad_norm, norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
    assert not hasattr(a, "grad_scale") and not hasattr(a, "found_inf")


def test_who_unscales():
    """Where the scaler does, gradients are unscaled in place, and a step that it skips is not called."""
    for handles_amp in (True, False):
        ps = params((5,))
        optimizer = fusedopt.SGD(ps, handles_amp=handles_amp)
        assert optimizer._step_supports_amp_scaling is handles_amp
        scaler, calls = torch.amp.GradScaler("cpu", init_scale=8.0), []
        optimizer.register_step_pre_hook(lambda *seen, calls=calls: calls.append(seen))
        for value in (1.0, INF):
            scaler.scale(ps[0].sum() * value).backward()
            scaler.step(optimizer)
            scaler.update()
            assert ps[0].grad[0].item() in ((8.0, INF) if handles_amp else (1.0, INF))
            ps[0].grad = None
        assert len(calls) == (2 if handles_amp else 1) and scaler.get_scale() == 4.0


def test_it_may_be_said_later_and_is_kept():
    optimizer = fusedopt.SGD(params((5,)))
    optimizer.handles_amp = False
    assert not copy.deepcopy(optimizer)._step_supports_amp_scaling
    optimizer._step_supports_amp_scaling = True  # as some programs set it
    assert optimizer.handles_amp
    optimizer.handles_amp = None
    with pytest.raises(TypeError, match="handles_amp"):
        optimizer.step()


def test_scaled_half_precision_gradients(engine):
    ps, wide = params((50,), dtype=torch.float16), params((50,), dtype=torch.float64)
    wide[0].data.copy_(ps[0].data)
    gradient = (torch.randn(50) * 1000).half()
    ps[0].grad, wide[0].grad = gradient, gradient.double() / 4096
    a, b = (fusedopt.SGD(p, lr=0.5, engine=engine) for p in (ps, wide))
    a.grad_scale, a.found_inf = torch.tensor(4096.0), torch.tensor(0.0)
    a.step(), b.step()
    assert torch.equal(ps[0], wide[0].half())
    assert torch.equal(ps[0].grad, gradient)
