"""Lanczos against eigenvalues of explicit Hessians, and what its suggestions do; plots and tables of diagnostics."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian

import fusedopt
from fusedopt import diagnostics
from fusedopt.diagnostics import lanczos_lr, show


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Quadratic(nn.Module):
    """Half p'Ap, with these curvatures."""

    def __init__(self, *curvatures):
        super().__init__()
        turned, _ = torch.linalg.qr(torch.randn(len(curvatures), len(curvatures), dtype=torch.float64))
        self.matrix = turned @ torch.tensor(curvatures, dtype=torch.float64).diag() @ turned.T
        self.p = nn.Parameter(torch.ones(len(curvatures), dtype=torch.float64))


def half(model, batch):
    return model.p @ model.matrix @ model.p / 2


def fit(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    return model, (torch.randn(16, 3, dtype=torch.float64), torch.randn(16, 2, dtype=torch.float64))


def eigenvalues(model, batch):
    """Of the explicit Hessian, the largest first."""
    names, values = zip(*model.named_parameters(), strict=True)

    def loss(flat):
        parts = [v.reshape(p.shape) for v, p in zip(flat.split([p.numel() for p in values]), values, strict=True)]
        output = torch.func.functional_call(model, dict(zip(names, parts, strict=True)), batch[0])
        return (output - batch[1]).square().mean()

    return torch.linalg.eigvalsh(hessian(loss, torch.cat([p.detach().flatten() for p in values]))).flip(0)


@pytest.mark.parametrize("iterations", [32, 100])
def test_all_iterations_give_the_spectrum(iterations):
    model, batch = small()
    expected = eigenvalues(model, batch)
    found = lanczos_lr(fit, model, batch, iterations=iterations, quiet=True)
    assert len(found.values) == len(expected) == 32
    torch.testing.assert_close(torch.tensor(found.values, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)
    assert max(found.bounds) < 1e-9


def test_bounds_hold_before_the_end():
    model, batch = small()
    expected = eigenvalues(model, batch)
    found = lanczos_lr(fit, model, batch, iterations=8, quiet=True)
    assert len(found.values) == 8
    for value, bound in zip(found.values, found.bounds, strict=True):
        assert (expected - value).abs().min() <= bound + 1e-12
    assert found.values[0] == pytest.approx(expected[0].item(), rel=1e-3) and found.values[0] <= expected[0] + 1e-12


def test_in_float32():
    model, batch = small()
    expected = eigenvalues(model, batch)
    model, batch = model.float(), tuple(t.float() for t in batch)
    found = lanczos_lr(fit, model, batch, iterations=20, quiet=True)
    assert found.values[0] == pytest.approx(expected[0].item(), rel=1e-5)


def test_the_seed_is_the_start():
    model, batch = small()
    first, again, other = (lanczos_lr(fit, model, batch, iterations=4, seed=s, quiet=True) for s in (0, 0, 1))
    assert first == again and first.values != other.values


def test_suggestions_are_polyaks():
    """With them a quadratic's error shrinks as theory says; beyond the limit it grows."""
    torch.manual_seed(0)
    model = Quadratic(9.0, 4.0, 2.0, 1.0)
    found = lanczos_lr(half, model, None, quiet=True)
    assert found.values == pytest.approx((9, 4, 2, 1)) and found.reason == ""
    assert (found.lr, found.momentum) == pytest.approx((4 / 16, 1 / 4))
    assert (found.plain_lr, found.stability_limit) == pytest.approx((0.2, 2 / 9))

    def ends(lr, momentum=0.0, steps=60):
        with torch.no_grad():
            model.p.fill_(1)
        optimizer = torch.optim.SGD([model.p], lr=lr, momentum=momentum)
        for _ in range(steps):
            optimizer.zero_grad()
            half(model, None).backward()
            optimizer.step()
        return model.p.norm().item()

    assert ends(found.lr, found.momentum) < 60 * 8 * 0.5**60  # (sqrt L - sqrt l) / (sqrt L + sqrt l) a step
    assert ends(found.plain_lr) == pytest.approx(2 * 0.8**60, rel=1)  # (L - l) / (L + l) a step
    assert ends(1.01 * found.stability_limit) > 2


def test_batch_sizes():
    torch.manual_seed(0)
    found = lanczos_lr(half, Quadratic(9.0, 1.0), None, batch_size=64, quiet=True)
    assert found.scaled(256) == pytest.approx(4 * found.lr) and found.scaled(64) == found.lr
    assert found.scaled(256, "adam") == pytest.approx(2 * found.lr)
    assert found.scaled(16, "adam", lr=1e-3) == pytest.approx(5e-4)
    for arguments, message in (((256, "lion"), "optimizer is 'lion'"), ((0,), "batch_size is 0")):
        with pytest.raises(ValueError, match=message):
            found.scaled(*arguments)
    unknown = lanczos_lr(half, Quadratic(9.0, 1.0), None, quiet=True)
    with pytest.raises(ValueError, match="give lanczos_lr batch_size="):
        unknown.scaled(128)


def test_curvature_that_is_not_positive():
    torch.manual_seed(0)
    found = lanczos_lr(half, Quadratic(4.0, 1.0, 0.0, -2.0), None, batch_size=8, quiet=True)
    assert (found.plain_lr, found.lr) == pytest.approx((0.4, 4 / 9)) and "smallest curvature is -2" in found.reason
    for curvatures in ((-1.0, -2.0), (0.0, 0.0)):
        found = lanczos_lr(half, Quadratic(*curvatures), None, batch_size=8, quiet=True)
        assert (found.lr, found.momentum, found.plain_lr, found.stability_limit) == (None,) * 4
        assert "no curvature is positive" in found.reason
        with pytest.raises(ValueError, match="no learning rate to scale: no curvature is positive"):
            found.scaled(16)


class Everything(nn.Module):
    """BatchNorm, dropout, attention, a frozen and an unused parameter."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.unused, self.frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        x = torch.dropout(self.norm(x), 0.5, train=True)[None, None]
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x)[0, 0]
        return self.head(x) * self.frozen


def test_nothing_is_left_behind():
    model = Everything()
    batch = torch.randn(8, 4), torch.randn(8, 1)
    fit(model, batch).backward()
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    before = {name: t.clone() for name, t in own.items()}
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    found = lanczos_lr(fit, model, batch, iterations=5, quiet=True)
    assert torch.equal(torch.get_rng_state(), drawn) and math.isfinite(found.values[0])
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(now[name] is own[name] and torch.equal(now[name], before[name]) for name in own)
    for name, p in model.named_parameters():
        assert p.grad is None if grads[name] is None else torch.equal(p.grad, grads[name])
    assert model.training


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": 0}, ValueError, "iterations is 0"),
        ({"iterations": 2.0}, TypeError, "iterations is 2.0"),
        ({"batch_size": -1}, ValueError, "batch_size is -1"),
        ({"model": nn.Linear(1, 1).bfloat16()}, TypeError, "parameter 0"),
        ({"model": nn.Identity()}, RuntimeError, "no parameter that requires grad"),
        ({"model": 3}, TypeError, "model is int"),
        ({"loss_fn": lambda model, batch: None}, TypeError, "loss_fn returned None"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    model, batch = small()
    taken = {"loss_fn": fit, "model": model, "batch": batch, **options}
    with pytest.raises(error, match=message):
        lanczos_lr(**taken)


# ---- tables and plots of all


def calls():
    model, batch = small()
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)
    return {
        "Generic Adam over 100 steps": lambda **o: diagnostics.check_generic_adam(1e-3, (0.9, 0.999), 100, **o),
        "Memory of momentum, in steps": lambda **o: diagnostics.memory_coefficient(optimizer, **o),
        "on this batch": lambda **o: diagnostics.memory_correction(optimizer, lambda b: fit(model, b), batch, **o),
        "Lanczos iterations": lambda **o: lanczos_lr(fit, model, batch, **o),
    }


@pytest.mark.parametrize("title", list(calls()))
def test_tables_and_plots(title, tmp_path, capsys):
    call = calls()[title]
    call(plot=tmp_path / "a.png")
    assert title in capsys.readouterr().out and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    call(plot=str(tmp_path / "b.png"), quiet=True)
    assert (tmp_path / "b.png").exists() and not capsys.readouterr().out


@pytest.mark.parametrize("title", list(calls()))
def test_bad_plots_come_first(title, tmp_path, monkeypatch, capsys):
    call = calls()[title]
    for plot, error, message in (
        (3, TypeError, "plot is int"),
        (tmp_path / "no" / "a.png", FileNotFoundError, "there is no folder"),
        (tmp_path, IsADirectoryError, "a folder"),
    ):
        with pytest.raises(error, match=message):
            call(plot=plot)
    monkeypatch.setattr(show, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'fusedopt\[demo\]'"):
        call(plot=tmp_path / "a.png")
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "asked", [fusedopt.SGD([torch.zeros(1)], momentum=0.9), fusedopt.Lion([torch.zeros(1)]), (0.9, 0.95)]
)
def test_coefficients_are_drawn(asked, tmp_path):
    diagnostics.memory_coefficient(asked, quiet=True, plot=tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
