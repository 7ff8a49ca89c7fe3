"""Lanczos against eigenvalues of explicit Hessians, and what its suggestions do; plots and tables of diagnostics."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.functional import hessian

import fusedopt
from fusedopt import diagnostics
from fusedopt.diagnostics import lanczos_lr, memory_correction, show


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
    for lr in (-1.0, 0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"lr is {lr}; it must be positive and finite"):
            found.scaled(64, lr=lr)
    unknown = lanczos_lr(half, Quadratic(9.0, 1.0), None, quiet=True)
    with pytest.raises(ValueError, match="give lanczos_lr batch_size="):
        unknown.scaled(128)


class Diagonal(nn.Module):
    """Half of h p^2, from a random start."""

    def __init__(self, h, seed=0):
        super().__init__()
        self.h, self.p = h, nn.Parameter(torch.randn(len(h), generator=torch.Generator().manual_seed(seed)).to(h))

    def loss(self, batch):
        return (self.h * self.p**2).sum() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bounds_hold_with_rounding(dtype):
    for n, seed in ((10, 0), (100, 1), (1000, 2)):
        for h in (torch.logspace(-6, 0, n), torch.linspace(-1, 1, n) ** 3, torch.ones(n) + 999 * (torch.arange(n) < 1)):
            h = h.to(dtype)
            found = lanczos_lr(Diagonal.loss, Diagonal(h), None, iterations=100, seed=seed, quiet=True)
            values, bounds = (torch.tensor(t, dtype=torch.float64) for t in (found.values, found.bounds))
            assert ((values[:, None] - h.double()).abs().amin(1) <= bounds).all()
            assert n > 10 or bounds.max() <= 11 * torch.finfo(dtype).eps * h.abs().max()


def test_what_counts_as_zero_is_said():
    h = torch.tensor([1e6] + [1.0] * 49)
    found = lanczos_lr(Diagonal.loss, Diagonal(h), None, quiet=True)
    assert found.momentum == 0 and "1 positive up to 1" in found.reason and "float64" in found.reason
    found = lanczos_lr(Diagonal.loss, Diagonal(h.double()), None, quiet=True)
    assert found.momentum == pytest.approx((999 / 1001) ** 2) and not found.reason
    found = lanczos_lr(Diagonal.loss, Diagonal(h.double()), None, iterations=1, quiet=True)
    assert "one curvature was found, and the model has 50 elements" in found.reason and found.momentum == 0
    found = lanczos_lr(lambda model, batch: model.p.sum(), Diagonal(h), None, quiet=True)
    assert found.lr is None and "the Hessian is 0" in found.reason


def test_curvature_that_is_not_positive():
    torch.manual_seed(0)
    found = lanczos_lr(half, Quadratic(4.0, 1.0, 0.0, -2.0), None, batch_size=8, quiet=True)
    assert (found.plain_lr, found.lr) == pytest.approx((0.4, 4 / 9)) and "smallest curvature is -2" in found.reason
    for curvatures in ((-1.0, -2.0), (0.0, 0.0)):
        found = lanczos_lr(half, Quadratic(*curvatures), None, batch_size=8, quiet=True)
        assert (found.lr, found.momentum, found.plain_lr, found.stability_limit) == (None,) * 4
        assert "no curvature is positive" in found.reason and ("Hessian is 0" in found.reason) == (curvatures[0] == 0)
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


@pytest.mark.parametrize("which", ["curvature", "correction"])
def test_random_numbers_of_all_are_kept(which):
    model, batch = small()
    optimizer = fusedopt.AdamW(model.parameters())

    def drawing(model, batch):
        return fit(model, batch) * (1 + torch.rand(()) + random.random() + np.random.rand())

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    with torch.inference_mode():
        if which == "curvature":
            lanczos_lr(drawing, model, batch, iterations=3, quiet=True)
        else:
            memory_correction(optimizer, lambda batch: drawing(model, batch), batch, quiet=True)
    assert states() == before


def test_inference_mode_is_no_other_place():
    model, batch = small()
    expected = lanczos_lr(fit, model, batch, iterations=3, quiet=True)
    with torch.inference_mode():
        assert lanczos_lr(fit, model, batch, iterations=3, quiet=True) == expected


def test_buffers_that_were_none_are_none():
    model, batch = small()
    model.register_buffer("seen", None)

    def loss(model, batch):
        model.seen = torch.ones(1)
        return fit(model, batch)

    lanczos_lr(loss, model, batch, iterations=2, quiet=True)
    assert model.seen is None and "seen" in model._buffers


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * 3 * ctx.saved_tensors[0] ** 2


def test_a_loss_without_a_second_derivative_says_so():
    model, batch = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def cubed(model, batch):
        return Once.apply(model(batch[0])).square().mean()

    with pytest.raises(RuntimeError, match="cannot be differentiated twice: a function of it is once_differentiable"):
        lanczos_lr(cubed, model, batch)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice: a function of it is once_differentiable"):
        memory_correction(optimizer, lambda batch: cubed(model, batch), batch)


def test_loss_fn_is_called_as_its_error_says():
    model, batch = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def failing(*arguments):
        raise TypeError("own")

    with pytest.raises(TypeError, match="positional") as caught:
        lanczos_lr(lambda batch: fit(model, batch), model, batch)
    assert caught.value.__notes__ == ["loss_fn is called as loss_fn(model, batch)"]
    with pytest.raises(TypeError, match="positional") as caught:
        memory_correction(optimizer, fit, batch)
    assert caught.value.__notes__ == ["loss_fn is called as loss_fn(batch)"]
    with pytest.raises(TypeError, match="own") as caught:
        lanczos_lr(failing, model, batch)
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize(("rate", "is_said"), [(1e-6, False), (10.0, True)])
def test_where_the_expansion_says_little(rate, is_said, capsys):
    model, batch = small()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    found = memory_correction(optimizer, lambda batch: fit(model, batch), batch)
    assert (found.within < 0.5) == is_said == ("says little here" in capsys.readouterr().out)


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
    ("asked", "word"),
    [
        (fusedopt.Lion([torch.zeros(1)]), "nothing; of a smoothed sign: regularises"),
        (fusedopt.SGD([torch.zeros(1)], momentum=0.9), "  regularises"),
        (fusedopt.SGD([torch.zeros(1)]), "nothing "),
        ((0.9, 0.95), "  anti-regularises"),
        ((0.95, 0.9), "  regularises"),
    ],
)
def test_the_effect_is_said(asked, word, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    diagnostics.memory_coefficient(asked)
    assert word in capsys.readouterr().out


@pytest.mark.parametrize(
    "asked", [fusedopt.SGD([torch.zeros(1)], momentum=0.9), fusedopt.Lion([torch.zeros(1)]), (0.9, 0.95)]
)
def test_coefficients_are_drawn(asked, tmp_path):
    diagnostics.memory_coefficient(asked, quiet=True, plot=tmp_path / "a.png")
    assert (tmp_path / "a.png").exists()
