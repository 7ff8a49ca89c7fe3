"""Diagnostics against textbook loops, explicit Hessians and figures of the theory, all in float64."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian as hessian_of
from torch.autograd.functional import jacobian as gradient_of

import fusedopt
from fusedopt.diagnostics import check_generic_adam, memory_coefficient, memory_correction

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def root(t):
    return t**-0.5


def rising(t):
    return 1 - 1 / (t + 1)


def check(lr, betas, steps, **options):
    return check_generic_adam(lr, betas, steps, quiet=True, **options)


def test_ratio_is_the_sum_of_the_definition():
    for steps, expected in ((10**2, 0.46), (10**3, 0.22), (10**4, 0.092), (10**5, 0.037)):
        found = check(root, (0.9, rising), steps)
        assert found.holds and all(reason.startswith("holds: ") for reason in found.reasons)
        assert float(f"{found.ratio:.2g}") == pytest.approx(expected, rel=0.03)
    total = math.fsum(root(t) * math.sqrt(1 - rising(t)) for t in range(1, 1001))
    found = check(root, (0.9, rising), 1000)
    assert found.ratio == pytest.approx(total / (1000 * root(1000)), rel=1e-12)
    assert found.steps == found.at[-1] == 1000 and found.curve[-1] == found.ratio and found.at[0] == 1
    assert found.curve[0] == pytest.approx(math.sqrt(0.5)) and len(found.at) == len(found.curve) <= 200


@pytest.mark.parametrize("steps", [100, 1000, 10_000])
def test_a_beta_that_warms_up_is_bounded(steps):
    for beta in (lambda t: min(0.9, 0.5 + t / 1000), lambda t: 0.85 + 0.1 * t / steps):
        found = check_generic_adam(root, (beta, rising), steps, quiet=True)
        assert found.holds, found.reasons


@pytest.mark.parametrize(
    ("lr", "betas", "wrong", "word"),
    [
        (1e-3, (0.9, 0.999), {3}, "cannot tend to 0, as theta_t does not tend to 1"),
        (root, (0.9, 0.999), {3}, "cannot tend to 0, as theta_t does not tend to 1"),
        (lambda t: 1e-2 if t <= 500 else 1e-3, (0.9, 0.999), {3}, "theta_t does not tend to 1"),
        (lambda t: 1e-3 * (0.1 + 0.9 * max(0, 1 - t / 1000)), (0.9, 0.999), {3}, "theta_t does not tend to 1"),
        (lambda t: 1e-3 * 0.999**t + 1e-4, (0.9, 0.999), {3}, "theta_t does not tend to 1"),
        (root, (rising, rising), {0}, "as if it tended to 1"),
        (lambda t: 1 / t, (0.9, lambda t: 1 - 1 / (t + 1)), {3}, "R(T) does not tend to 0"),
        (lambda t: min(t / 100, 1) * root(t), (0.9, rising), {3}, "no evidence"),
        (root, (0.9, lambda t: 0.99 - 1 / (t + 1)), {3}, "levels off"),
        (1e-3, (0.9, rising), {2}, "grows"),
        (lambda t: 0.1 / t, (0.9, lambda t: 1 - 1 / (t + 1) ** 3), {2, 3}, "grows"),
        (root, (lambda t: 1.0 if t == 7 else 0.9, rising), {0}, "1 at step 7"),
        (root, (0.9, lambda t: 0.9 if t == 500 else rising(t)), {1}, "decreases after step 499"),
        (root, (0.9, lambda t: 0.0 if t == 1 else rising(t)), {1}, "0 at step 1"),
        (lambda t: 0.0 if t == 3 else root(t), (0.9, rising), {2}, "lr_t is 0 at step 3"),
    ],
)
def test_each_condition_can_fail(lr, betas, wrong, word):
    found = check(lr, betas, 10**4)
    assert not found.holds
    failed = {i for i, reason in enumerate(found.reasons) if reason.startswith("fails: ")}
    assert failed == wrong and any(word in found.reasons[i] for i in wrong)


def test_constant_settings_keep_their_ratio():
    for steps in (100, 10**6):
        found = check(1e-3, (0.9, 0.999), steps)
        assert found.ratio == pytest.approx(math.sqrt(1 - 0.999), rel=1e-9) and not found.holds


def test_warm_up_is_no_growth():
    assert check(lambda t: min(t / 100, 1) * root(t), (0.9, rising), 10**5).holds
    assert check(root, (lambda t: min(0.9, 0.5 + t / 1000), rising), 10**4).holds


def test_the_ratio_is_not_below_the_root():
    """R(T) >= sqrt(1 - theta_T) / C, whatever falls meanwhile, with C = 1 where chi never grows."""
    random = np.random.default_rng(0)
    for theta in (0.9, 0.999):
        rates = np.sort(random.lognormal(sigma=2, size=3000))[::-1]
        found = check(lambda t, rates=rates: rates[t - 1], np.array([0.9, theta]), np.int64(3000))
        assert min(found.curve) >= math.sqrt(1 - theta) * (1 - 1e-12) and not found.holds
    assert check(root, [0.9, rising], 1000) == check(root, (0.9, rising), 1000)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1.0, (0.9, 0.999), 100), ValueError, "lr is -1 at step 1"),
        ((math.nan, (0.9, 0.999), 100), ValueError, "lr is nan at step 1"),
        ((1e-3, (0.9, lambda t: 2.0 if t == 5 else 0.5), 100), ValueError, "theta is 2 at step 5"),
        ((1e-3, (0.9,), 100), TypeError, "betas is"),
        ((1e-3, 0.9, 100), TypeError, "betas is 0.9"),
        ((1e-3, (0.9, 0.999), 9), ValueError, "steps is 9"),
        ((1e-3, (0.9, 0.999), 1e3), TypeError, "steps is 1000.0"),
        ((1e-3, (0.9, 0.999), True), TypeError, "steps is True"),
        (("fast", (0.9, 0.999), 100), TypeError, "lr is 'fast'"),
    ],
)
def test_bad_schedules_are_named(arguments, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        check(*arguments)


# ---- the coefficient


def parameter(*shape):
    return nn.Parameter(torch.zeros(shape or (2,), dtype=torch.float64))


def made(kind, **options):
    return kind([parameter()], **{"lr": 0.1, **options})


OURS, THEIRS = fusedopt, torch.optim


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((0.9, 0.999), 990),
        ((0.9, 0.95), 10),
        ((0.9, 0.9), 0),
        ([0.9, 0.95], 10),
        (np.array([0.9, 0.95]), 10),
        (made(OURS.Adam), 990),
        (made(OURS.AdamW, betas=(0.9, 0.95)), 10),
        (made(THEIRS.Adam, weight_decay=0.1), 990),
        (made(THEIRS.AdamW), 990),
        (made(OURS.NAdamW), 999 - 0.9 * 9),
        (made(OURS.SGD, momentum=0.9), 900),
        (made(THEIRS.SGD, momentum=0.9), 900),
        (made(OURS.SGD, momentum=0.9, dampening=0.9), 9),
        (made(OURS.SGD, momentum=0.9, dampening=0.5), 225),
        (made(OURS.SGD, momentum=0.9, nesterov=True), 810),
        (made(OURS.SGD), 0),
        (made(OURS.Lion), 90),
        (made(OURS.Lion, betas=(0.95, 0.95)), 19),
    ],
)
def test_coefficients(asked, expected):
    assert memory_coefficient(asked, quiet=True) == pytest.approx(expected, abs=1e-9)


def test_groups_with_other_coefficients_are_chosen():
    groups = [{"params": [parameter()], "betas": (0.9, beta2)} for beta2 in (0.95, 0.999)]
    optimizer = fusedopt.AdamW(groups)
    assert [memory_coefficient(optimizer, group=i, quiet=True) for i in (0, 1)] == pytest.approx([10, 990])
    with pytest.raises(ValueError, match=r"groups have coefficients 10, 990; choose one with group="):
        memory_coefficient(optimizer)
    assert memory_coefficient(optimizer, group=np.int64(1), quiet=True) == pytest.approx(990)
    for group, error in ((2, ValueError), (-1, ValueError), (True, TypeError), (1.0, TypeError)):
        with pytest.raises(error, match=f"group is {group}; (the optimizer has groups 0 to 1|it must be)"):
            memory_coefficient(optimizer, group=group)


class Own(torch.optim.AdamW):
    pass


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (made(OURS.Adam, amsgrad=True), ValueError, "amsgrad of group 0 is True"),
        (made(OURS.AdamW, maximize=True), ValueError, "maximize of group 0 is True"),
        (made(OURS.AdamW, average=OURS.Lookahead()), ValueError, "not derived for Lookahead"),
        (made(OURS.AdamW, gradient_noise=OURS.GradientNoise(0.1)), ValueError, "gradient_noise of group 0"),
        (made(OURS.AdamW, cautious_weight_decay=True), ValueError, "cautious_weight_decay of group 0"),
        (made(OURS.NAdam), TypeError, "NAdam; the memory of momentum is derived for"),
        (made(OURS.RMSprop), TypeError, "RMSprop"),
        (made(Own), TypeError, "Own"),
        ((0.9, 1.0), ValueError, r"betas is \(0.9, 1.0\)"),
        ((0.9,), ValueError, "betas is"),
        (0.9, TypeError, "optimizer_or_betas is float"),
    ],
)
def test_what_is_not_derived_is_refused(asked, error, message):
    with pytest.raises(error, match=message):
        memory_coefficient(asked)


# ---- the correction, against Hessians that are there

ADAMS = {"eps": 0.03, "betas": (0.8, 0.95), "weight_decay": 0.2}
CORRECTED = [
    (OURS.SGD, {"momentum": 0.8, "weight_decay": 0.2}, 0.0),
    (OURS.SGD, {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.2, "decoupled_weight_decay": True}, 0.0),
    (OURS.SGD, {"momentum": 0.8, "nesterov": True}, 0.0),
    (THEIRS.SGD, {"momentum": 0.8}, 0.0),
    (OURS.SGD, {}, 0.0),
    (OURS.Adam, ADAMS, 0.0),
    (OURS.AdamW, ADAMS, 0.0),
    (THEIRS.AdamW, ADAMS, 0.0),
    (OURS.NAdamW, ADAMS, 0.0),
    (OURS.Lion, {"betas": (0.8, 0.95), "weight_decay": 0.2}, 0.0),
    (OURS.Lion, {"betas": (0.8, 0.95), "weight_decay": 0.2}, 0.4),
]


def quartic(p, scale=1.0):
    return scale * ((p**4).sum() / 4 + (p * p.roll(1)).sum() + (p.sum() ** 3) / 6)


def by_hand(kind, o, smoothing, p, lr):
    """F, lr M and the term by section 12's table, with eps outside of the root, of an explicit Hessian."""
    decay = o.get("weight_decay", 0.0)
    is_coupled = kind in (OURS.SGD, OURS.Adam, THEIRS.SGD) and not o.get("decoupled_weight_decay")
    coupled, decay = (decay, 0.0) if is_coupled else (0.0, decay)

    def whole(x):
        return quartic(x) + coupled / 2 * (x * x).sum()

    g, hessian = gradient_of(whole, p), hessian_of(whole, p)
    loss, dot = whole(p), (g * p).sum()
    if kind in (OURS.SGD, THEIRS.SGD):
        mu, d = o.get("momentum", 0.0), o.get("dampening", 0.0)
        c, k = (1 - d) / (1 - mu), (1 - d) * mu / (1 - mu) ** 2
        if o.get("nesterov"):
            k = mu**2 / (1 - mu) ** 2
        force = c * g + decay * p
        return force, lr * k * hessian @ force, lr * k * ((g * g).sum() / 2 + decay / c * (dot - loss))
    beta1, beta2 = o["betas"]
    if kind is OURS.Lion:
        size, factor = (g * g + smoothing**2).sqrt(), beta1 / (1 - beta2)
        force = g / size + decay * p
        term = lr * factor * (size.sum() + decay * (dot - loss)) if smoothing else 0.0
        return force, lr * factor * smoothing**2 / size**3 * (hessian @ force), term
    tau1, tau2 = beta1 / (1 - beta1) * (beta1 if kind is OURS.NAdamW else 1), beta2 / (1 - beta2)
    size = g.abs() + o["eps"]
    force = g / size + decay * p
    term = lr * decay * (tau2 - tau1) * loss - lr * (tau2 - tau1) * (g.abs().sum() + decay * dot)
    return force, lr * (tau1 / size - tau2 * g.abs() / size**2) * (hessian @ force), term


def within_by_hand(kind, o, smoothing, p, lr):
    """The share of elements whose gradient changes by less than what it is compared with."""
    coupled = 0.0 if o.get("decoupled_weight_decay") or kind not in (OURS.SGD, OURS.Adam) else o.get("weight_decay", 0)
    g = gradient_of(lambda x: quartic(x) + coupled / 2 * (x * x).sum(), p)
    hessian = hessian_of(quartic, p) + coupled * torch.eye(4, dtype=torch.float64)
    moved = lr * hessian @ by_hand(kind, o, smoothing, p, lr)[0]
    if kind in (OURS.SGD, THEIRS.SGD):  # steps that the velocity is behind
        mu = o.get("momentum", 0.0)
        change, size = (mu**2 if o.get("nesterov") else mu) / (1 - mu) * moved.abs(), g.abs()
    elif kind is OURS.Lion:
        change, size = 0.8 / 0.05 * moved.abs(), (g * g + smoothing**2).sqrt()
    else:
        change, size = 19 * moved.abs(), g.abs() + o["eps"]
    return (change < size).double().mean().item()


@pytest.mark.parametrize(("kind", "options", "smoothing"), CORRECTED)
def test_correction_is_that_of_the_explicit_hessian(kind, options, smoothing):
    start = torch.tensor([0.5, -0.9, 1.2, 0.3], dtype=torch.float64)
    p, lr = nn.Parameter(start.clone()), 0.01
    optimizer = kind([p], lr=lr, **options)
    smooth = {"smoothing": smoothing} if smoothing else {}
    found = memory_correction(optimizer, lambda scale: quartic(p, scale), 1.0, quiet=True, **smooth)
    force, correction, term = by_hand(kind, options, smoothing, start, lr)
    torch.testing.assert_close(found.force, [force], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.correction, [correction], rtol=1e-12, atol=1e-14)
    assert found.loss == pytest.approx(quartic(start).item(), rel=1e-14)
    assert found.term == pytest.approx(float(term), rel=1e-12, abs=1e-14)
    assert found.within == within_by_hand(kind, options, smoothing, start, lr)
    assert not found.force[0].requires_grad and not found.correction[0].requires_grad


@pytest.mark.parametrize("options", [{"momentum": 0.8}, {"momentum": 0.8, "nesterov": True, "weight_decay": 0.3}])
def test_the_term_of_sgd_is_the_potential_of_its_correction(options):
    """The gradient of loss and term, times what momentum multiplies the rate by, is F + lr M."""
    p, lr, step = nn.Parameter(torch.tensor([0.5, -0.9, 1.2, 0.3], dtype=torch.float64)), 0.01, 1e-6
    optimizer = fusedopt.SGD([p], lr=lr, **options)

    def at(shift):
        with torch.no_grad():
            kept = p.clone()
            p.add_(shift)
        found = memory_correction(optimizer, quartic, p, quiet=True)
        loss = found.loss + options.get("weight_decay", 0) / 2 * (p * p).sum().item() + found.term
        with torch.no_grad():
            p.copy_(kept)
        return found, loss

    slopes = [(at(step * e)[1] - at(-step * e)[1]) / (2 * step) for e in torch.eye(4, dtype=torch.float64)]
    found, _ = at(0.0)
    expected = (found.force[0] + found.correction[0]) * (1 - options["momentum"])
    torch.testing.assert_close(torch.tensor(slopes, dtype=torch.float64), expected, rtol=1e-6, atol=1e-8)


def test_groups_have_their_own_rates():
    """H is applied to each group's own displacement."""
    a, b = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in ([0.5, -0.9], [1.2]))
    optimizer = fusedopt.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.01}], momentum=0.5)
    found = memory_correction(optimizer, lambda _: quartic(torch.cat([a, b])), None, quiet=True)
    whole, rates = torch.cat([a, b]).detach(), torch.tensor([0.1, 0.1, 0.01], dtype=torch.float64)
    g, hessian = gradient_of(quartic, whole), hessian_of(quartic, whole)
    torch.testing.assert_close(torch.cat(found.correction), 2 * hessian @ (rates * 2 * g))
    assert found.term is None


def test_parameters_without_gradient_stay():
    p, unused, frozen = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW([unused, p, frozen], lr=0.1)
    found = memory_correction(optimizer, lambda _: (p * frozen).square().sum(), None, quiet=True)
    assert not found.force[0].any() and not found.force[2].any() and found.force[1].any()
    assert not found.correction[0].any() and math.isfinite(found.term)


def test_nothing_is_left_behind():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double()
    optimizer = fusedopt.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(8, 3, dtype=torch.float64)
    model(x).square().mean().backward()
    optimizer.step()
    before = [t.clone() for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    drawn = torch.get_rng_state()
    with torch.no_grad():
        memory_correction(optimizer, lambda batch: model(batch).square().mean(), x, quiet=True)
    assert torch.equal(torch.get_rng_state(), drawn)
    after = [t for p in model.parameters() for t in (p, p.grad, *optimizer.state[p].values())]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.grad.requires_grad for p in model.parameters())


def one(p):
    return p.square().sum()


@pytest.mark.parametrize(
    ("kind", "options", "loss", "smoothing", "error", "message"),
    [
        (OURS.AdamW, {}, one, 0.1, ValueError, "smoothing is 0.1, and AdamW has none"),
        (OURS.Lion, {}, one, -1.0, ValueError, "smoothing is -1.0"),
        (OURS.AdamW, {"max_grad_norm": 1.0}, one, 0.0, ValueError, "max_grad_norm is 1.0"),
        (OURS.AdamW, {}, lambda p: p, 0.0, TypeError, r"loss_fn returned a tensor of shape \(2,\)"),
        (OURS.AdamW, {}, lambda p: 1.0, 0.0, TypeError, "loss_fn returned 1.0"),
        (OURS.AdamW, {}, lambda p: torch.tensor(1.0), 0.0, RuntimeError, "depends on none"),
        (OURS.AdamW, {}, lambda p: p.sum() * math.nan, 0.0, ValueError, "the loss is nan"),
        (OURS.AdamW, {}, lambda p: p.sqrt().sum(), 0.0, ValueError, "the gradient of parameter 0"),
        (OURS.AdamW, {"eps": 0.0}, one, 0.0, ValueError, "eps is 0"),
    ],
)
def test_what_cannot_be_corrected_is_named(kind, options, loss, smoothing, error, message):
    p = parameter()
    with pytest.raises(error, match=message):
        memory_correction(kind([p], lr=0.1, **options), loss, p, smoothing=smoothing)


def test_half_precision_is_refused():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"parameter 0 \(shape \(2,\)\) is torch.bfloat16"):
        memory_correction(fusedopt.AdamW([p]), one, p)


@pytest.fixture(scope="module")
def memory_order():
    spec = importlib.util.spec_from_file_location("memory_order", ROOT / "examples" / "memory_order.py")
    module = sys.modules["memory_order"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", range(7))
def test_memory_is_of_second_order(memory_order, case):
    """What momentum does is what F + h M does, to h^2; F alone to h."""
    memory_order.STEPS = 8
    row = memory_order.measure(memory_order.CASES[case], halvings=1)
    assert row["order of F"] == pytest.approx(1, abs=0.15) and row["order of F + h M"] == pytest.approx(2, abs=0.15)
    assert row["F + h M"][-1] < row["F"][-1] / 20
