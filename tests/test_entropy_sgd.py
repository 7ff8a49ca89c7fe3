"""EntropySGD: as a textbook loop with injected noise, and how its loops begin, end and go on."""

import copy
import math

import pytest
import torch
from helpers import assert_same, copies, fewer, fill_gradients, params, snapshot

import fusedopt
from fusedopt import noise

OPTIONS = {
    "lr": 0.9, "L": 4, "inner_lr": 0.1, "gamma0": 0.3, "gamma1": 0.5, "alpha": 0.6, "noise": 0.02, "seed": 5,
    "weight_decay": 0.01,
}  # fmt: skip
SHAPES = ((31,), (5, 4), (), (0,))


def built(ps, **options):
    return fusedopt.EntropySGD(ps, **{**OPTIONS, **options})


class Problem:
    """A smooth loss whose gradient is known, of parameters and of numbers that stand for them."""

    def __init__(self, ps):
        self.ps, self.targets, self.calls = ps, [torch.randn_like(p) for p in ps], 0

    def gradient(self, k, w):
        return w - self.targets[k] + 0.04 * w**3

    def closure(self):
        self.calls += 1
        for p in self.ps:
            p.grad = None
        loss = sum(((p - t) ** 2 / 2 + 0.01 * p**4).sum() for p, t in zip(self.ps, self.targets, strict=True))
        loss.backward()
        return loss


def textbook(problem, loops, momentum, within, nesterov, h):
    """Algorithm 1 of the paper, momenta as in the authors' code; from where the parameters are."""
    ws = [p.detach().clone() for p in problem.ps]
    outer, drawn = [torch.zeros_like(w) for w in ws], 0
    for t in range(loops):
        xs, mus, inner = list(ws), list(ws), [torch.zeros_like(w) for w in ws]
        gamma = h["gamma0"] * (1 + h["gamma1"]) ** t
        for _ in range(h["L"]):
            for k, w in enumerate(ws):
                n = noise.normal(noise.elements(w), k, drawn, (h["seed"], 0))
                g = problem.gradient(k, w) + h["weight_decay"] * w + h["noise"] / math.sqrt(h["inner_lr"]) * n
                inner[k] = within * inner[k] + g
                g = g + within * inner[k] if nesterov else inner[k]
                ws[k] = w - h["inner_lr"] * (g - gamma * (xs[k] - w))
                mus[k] = h["alpha"] * mus[k] + (1 - h["alpha"]) * ws[k]
            drawn += 1
        for k, x in enumerate(xs):
            d = x - mus[k]
            outer[k] = momentum * outer[k] + d
            d = d + momentum * outer[k] if nesterov else outer[k]
            ws[k] = x - h["lr"] * d
    return ws


@pytest.mark.parametrize(
    ("momentum", "within", "nesterov"),
    [(0.0, 0.0, True), (0.8, 0.0, False), (0.8, 0.0, True), (0.0, 0.6, True), (0.8, 0.6, False)],
)
def test_as_the_textbook(engine, momentum, within, nesterov):
    ps = params(*SHAPES, dtype=torch.float64)
    problem = Problem(ps)
    expected = textbook(problem, 3, momentum, within, nesterov, OPTIONS)
    optimizer = built(ps, momentum=momentum, inner_momentum=within, nesterov=nesterov, engine=engine)
    for _ in range(3):
        loss = optimizer.step(problem.closure)
    assert problem.calls == 12 and loss.ndim == 0 and optimizer.state[ps[0]]["step"] == 12
    for p, w in zip(ps, expected, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
    assert optimizer.param_groups[0]["outer"] == 3 and optimizer.param_groups[0]["inner"] == 0


def test_steps_without_a_closure_are_those_of_loops(engine):
    a = params(*SHAPES, dtype=torch.float64)
    b = copies(a)
    one, other = Problem(a), Problem(b)
    other.targets = one.targets
    ours, by_hand = built(a, engine=engine), built(b, engine=engine)
    ours.step(one.closure), ours.step(one.closure)
    for _ in range(3):
        other.closure()
        by_hand.step()
    by_hand.step(other.closure)  # what is left of the first
    assert other.calls == 4 and by_hand.param_groups[0]["outer"] == 1
    by_hand.step(other.closure)
    assert_same([p.detach() for p in a], [p.detach() for p in b])
    assert_same(snapshot(ours), snapshot(by_hand))


@pytest.mark.parametrize("after", [2, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_to_the_last_bit(engine, after, dtype):
    """Inside of loops too, with the noise that would have come."""
    a = params(*SHAPES, dtype=dtype)
    b = copies(a)
    ours, other = (built(ps, inner_momentum=0.5, engine=engine) for ps in (a, b))
    gradients = [[torch.randn_like(p) for p in a] for _ in range(9)]

    def step(optimizer, ps, step):
        for p, g in zip(ps, step, strict=True):
            p.grad = g.clone()
        optimizer.step()

    for g in gradients:
        step(ours, a, g)
    for g in gradients[:after]:
        step(other, b, g)
    saved = copy.deepcopy(other.state_dict())
    assert not {"gamma", "begins", "ends", "gradient_noise"} & saved["param_groups"][0].keys()
    other = built(b, inner_momentum=0.5, engine=engine)
    other.load_state_dict(saved)
    for g in gradients[after:]:
        step(other, b, g)
    assert_same([p.detach() for p in a], [p.detach() for p in b])
    assert_same(snapshot(ours), snapshot(other))


def test_noise_has_the_papers_deviation(engine):
    """``sqrt(inner_lr) noise``, not ``sqrt(2 inner_lr) noise`` as in the authors' code."""
    (p,) = params((fewer(engine, 200_000),), dtype=torch.float64)
    before = p.detach().clone()
    optimizer = built([p], momentum=0.0, gamma0=0.0, weight_decay=0.0, inner_lr=0.25, noise=0.3, engine=engine)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = p.detach() - before
    error = 5 / math.sqrt(2 * p.numel())
    assert abs(moved.std() / (0.5 * 0.3) - 1) < error and abs(moved.mean() / (0.5 * 0.3)) < 2 * error


def test_gamma_grows_with_loops(engine):
    """The public code never counts them. Without gradients and noise, loops begin at x, and gamma is not seen."""
    (p,) = params((7,), dtype=torch.float64)
    optimizer = built([p], momentum=0.0, noise=0.0, engine=engine)
    gammas = []
    for _ in range(9):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        gammas.append(optimizer.param_groups[0]["gamma"])
    assert gammas == pytest.approx([0.3] * 4 + [0.45] * 4 + [0.675])


def test_half_precision_goes_on_from_what_is_exact(engine):
    """Anchor and average are float32, and with masters a run of halves is one of float32."""
    a = [torch.nn.Parameter(p.detach().bfloat16().float()) for p in params((40,), (5, 4))]
    b = [torch.nn.Parameter(p.detach().bfloat16()) for p in a]
    ours, halves = built(a, engine=engine), built(b, master="fp32", engine=engine)
    for _ in range(9):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.float()
        ours.step(), halves.step()
    for p, q in zip(a, b, strict=True):
        state = halves.state[q]
        assert_same(state["master"], p.detach())
        assert state["anchor"].dtype == state["inner_average"].dtype == torch.float32


@pytest.mark.parametrize("which", ["begins", "ends", "both"])
def test_a_parameter_without_gradient_stays_where_it_is(engine, which):
    """Loops are counted for all: one that lacks the last step goes on around where it is."""
    ps = params((6,), (4,), dtype=torch.float64)
    options = {"momentum": 0.5, "inner_momentum": 0.5, "noise": 0.0, "weight_decay": 0.0, "gamma1": 0.0}
    optimizer = built(ps, **options, engine=engine)
    lacks = {"begins": (4,), "ends": (3,), "both": (3, 4)}[which]
    x = mu = w = ps[1].detach().clone()
    inner, outer = torch.zeros_like(w), torch.zeros_like(w)
    for t in range(8):
        fill_gradients(ps)
        if t % 4 == 0:
            x = mu = w
            inner = torch.zeros_like(w)
        if t in lacks:
            ps[1].grad = None
        else:
            inner = 0.5 * inner + ps[1].grad
            w = w - 0.1 * (ps[1].grad + 0.5 * inner + 0.3 * (w - x))
            mu = 0.6 * mu + 0.4 * w
            if t % 4 == 3:
                outer = 0.5 * outer + x - mu
                w = x - 0.9 * (x - mu + 0.5 * outer)
        optimizer.step()
        torch.testing.assert_close(ps[1].detach(), w, rtol=1e-12, atol=1e-12)


def test_a_skipped_step_is_done_again(engine):
    a = params(*SHAPES, dtype=torch.float64)
    b = copies(a)
    one, other = Problem(a), Problem(b)
    other.targets = one.targets
    ours, clean = built(a, skip_nonfinite=True, engine=engine), built(b, engine=engine)

    def closure():
        loss = one.closure()
        if one.calls in (3, 8):
            a[0].grad[0] = math.nan
        return loss

    ours.step(closure)  # the last of its steps is left
    if engine in ("cuda", "triton"):  # by the device alone: the loop had a step less
        shorter = built(b, L=3, engine=engine)
        shorter.step(other.closure)
        assert ours.param_groups[0]["outer"] == 1
        assert_same([p.detach() for p in a], [p.detach() for p in b])
        return
    assert ours.param_groups[0]["inner"] == 3 and ours.skipped_steps == 1
    before = snapshot(ours)
    clean.step(other.closure)
    ours.step(closure)  # which is all of it that is done now
    assert ours.param_groups[0]["inner"] == 0 and ours.param_groups[0]["outer"] == 1
    assert_same([p.detach() for p in a], [p.detach() for p in b])
    assert not torch.equal(before[0][0], a[0].detach())


def test_a_loop_begins_where_a_device_skipped_its_first_step(engine):
    """The host has counted it; parameters are around where the loop before ended all the same."""
    if engine not in ("cuda", "triton"):
        pytest.skip("the host knows of it")
    a = params(*SHAPES, dtype=torch.float64)
    b = copies(a)
    one, other = Problem(a), Problem(b)
    other.targets = one.targets
    ours = built(a, inner_momentum=0.5, skip_nonfinite=True, engine=engine)
    clean = built(b, inner_momentum=0.5, engine=engine)

    def closure():
        loss = one.closure()
        if one.calls == 5:
            a[0].grad[0] = math.nan
        return loss

    ours.step(closure), clean.step(other.closure)
    clean.param_groups[0]["L"] = 3
    assert "inner_momentum_buffer" in ours.state[a[0]]
    ours.step(closure), clean.step(other.closure)
    assert one.calls == 8 and other.calls == 7
    assert_same([p.detach() for p in a], [p.detach() for p in b])


def test_groups_are_in_the_same_loop(engine):
    a, b = params((6,), (4,), dtype=torch.float64)
    optimizer = built([a], engine=engine)
    a.grad = torch.ones_like(a)
    optimizer.step()
    optimizer.add_param_group({"params": [b], "lr": 0.5})
    assert optimizer.param_groups[1]["inner"] == 1
    with pytest.raises(ValueError, match="L is 3 and 4; it must be the same in all groups"):
        optimizer.add_param_group({"params": params((2,)), "L": 3})
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[1]["L"] = 7
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="L is 4 and 7"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"L": 0}, "L"),
        ({"L": 2.5}, "L .group 0. is 2.5; it must be a whole number"),
        ({"alpha": 1.5}, "alpha"),
        ({"noise": -1.0}, "noise"),
        ({"noise": 1e30}, "noise is 1e[+]30, too large for an inner_lr of 0.1"),
        ({"seed": 2**32}, "seed"),
        ({"gamma0": math.inf}, "gamma0"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        built(params((2,)), **options)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("L", 0, "L .group 0. is 0.0"),
        ("L", 2.5, "L .group 0. is 2.5; it must be a whole number"),
        ("L", None, "L .group 0. is None"),
        ("noise", -1.0, "noise .group 0. is -1.0"),
        ("noise", math.nan, "noise .group 0. is nan"),
        ("noise", "x", "noise .group 0. is 'x'"),
        ("inner_lr", -1.0, "inner_lr .group 0. is -1.0"),
        ("gamma0", "x", "gamma0 .group 0. is 'x'"),
        ("gamma1", -1.0, "gamma1 .group 0. is -1.0"),
        ("seed", 1.5, "seed .group 0. is 1.5; it must be a whole number"),
        ("inner", -1, "inner .group 0. is -1.0"),
        ("gamma1", 1e300, r"gamma0 \(1 [+] gamma1\)\^3 is too large, where gamma0 is 0.3 and gamma1 1e[+]300"),
    ],
)
def test_options_that_become_wrong_are_named(engine, key, value, message):
    """Whatever the engine reads itself; nothing has changed then."""
    ps = params((3,), dtype=torch.float64)
    optimizer = built(ps, L=1, engine=engine)
    for _ in range(3):
        fill_gradients(ps)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0][key] = value
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_gamma_of_nothing_stays_nothing(engine):
    """However it would have grown by now."""
    ps = params((3,))
    optimizer = built(ps, L=1, gamma0=0.0, gamma1=1.0, engine=engine)
    optimizer.param_groups[0]["outer"] = 5000
    fill_gradients(ps)
    optimizer.step()
    assert optimizer.param_groups[0]["gamma"] == 0


def test_a_skipped_step_leaves_those_without_gradient(engine):
    """Where a loop begins, too."""
    ps = params((2, 2), (3,))
    optimizer = built(ps, L=2, skip_nonfinite=True, engine=engine)
    for lacking in ((), (1,)):
        fill_gradients(ps)
        for k in lacking:
            ps[k].grad = None
        optimizer.step()
    before = snapshot(optimizer)
    ps[0].grad = torch.full_like(ps[0], math.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    if engine in ("cpu", "eager"):  # else the host does not know of it, and the loop has begun
        assert_same(snapshot(optimizer), before)


def test_noise_is_its_own():
    with pytest.raises(ValueError, match="gradient_noise is not for EntropySGD, which has noise and seed"):
        built([{"params": params((2,)), "gradient_noise": fusedopt.GradientNoise(0.1)}])


def test_cannot_step_in_backward(engine):
    optimizer = built(params((3,)), engine=engine)
    with pytest.raises(RuntimeError, match="counts the steps of loops for all parameters together"):
        fusedopt.step_in_backward(optimizer)


@pytest.mark.parametrize("rate", ["lr", "inner_lr"])
def test_a_rate_of_zero_moves_nothing(engine, rate):
    """As those expect who make states by a step; without noise and decay, too."""
    ps = params((5,))
    before = ps[0].detach().clone()
    optimizer = built(ps, **{rate: 0.0}, engine=engine)
    for _ in range(5):
        fill_gradients(ps)
        optimizer.step()
    assert_same(ps[0].detach(), before)
