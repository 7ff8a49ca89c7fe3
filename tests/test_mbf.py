"""MBF: as a loop that builds the whole block-diagonal Fisher matrix, and what a step and a state of it must do."""

import copy
import math

import pytest
import torch
from helpers import assert_same, close, copies, fill_gradients, params, snapshot

import fusedopt
from fusedopt.optimizers import blocks

# Kernels of two, one and three dimensions, and of one element; a matrix; a vector, a scalar, and nothing.
SHAPES = ((4, 3, 3, 3), (2, 3, 5), (2, 2, 2, 1, 2), (3, 4, 1, 1), (5, 7), (6,), (), (0,), (0, 3))
DENSE = {"lr": 0.05, "momentum": 0.9, "beta": 0.8, "damping": 0.1, "weight_decay": 0.03}
EVERY = 3


def mask(p):
    """Where the block-diagonal Fisher matrix of a parameter has elements; kernels, rows and elements are blocks."""
    size = p.shape[1] if p.dim() == 2 else math.prod(p.shape[2:]) if p.dim() > 2 else 1
    index = torch.arange(p.numel()) // max(size, 1)
    return (index[:, None] == index[None, :]).to(p.dtype)


class Dense:
    """Bahamou et al. 2023 on whole matrices: one tensor, one step at a time, in float64."""

    def __init__(self, p):
        self.p, n = p.detach().clone(), p.numel()
        self.fisher, self.momentum = torch.zeros(n, n, dtype=p.dtype), torch.zeros(n, dtype=p.dtype)
        self.mask, self.inverse, self.t = mask(p), None, 0

    def step(self, g, h):
        self.t += 1
        p = self.p
        products = torch.outer(g.flatten(), g.flatten()) * self.mask
        if p.dim() == 2 and p.numel():
            rows = [products[i : i + p.shape[1], i : i + p.shape[1]] for i in range(0, p.numel(), p.shape[1])]
            products = torch.block_diag(*[sum(rows) / p.shape[0]] * p.shape[0])
        self.fisher = h["beta"] * self.fisher + (1 - h["beta"]) * products
        self.momentum = h["momentum"] * self.momentum + g.flatten()
        if p.dim() < 2 or (self.t - 1) % h["inverse_every"] == 0:
            damping = h["damping"] * torch.eye(p.numel(), dtype=p.dtype)
            self.inverse = torch.linalg.inv(self.fisher / (1 - h["beta"] ** self.t) + damping)
        d = (self.inverse @ self.momentum).view(p.shape)
        self.p = p - h["lr"] * (d + h["weight_decay"] * p)


def built(ps, **options):
    return fusedopt.MBF(ps, **{**DENSE, "inverse_every": EVERY, **options})


def advance(optimizer, ps, steps, seed=1):
    torch.manual_seed(seed)
    for _ in range(steps):
        fill_gradients(ps)
        optimizer.step()


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_as_the_whole_matrix(engine, momentum):
    """Rates, damping and momentum that change, gradients that are missing, and a resume inside of a period."""
    ps = params(*SHAPES, dtype=torch.float64)
    dense = [Dense(p) for p in ps]
    optimizer = built(ps, momentum=momentum, engine=engine)
    for t in range(10):
        if t == 5:
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = built(ps, engine=engine)
            optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            group.update(lr=0.05 * 0.9**t, damping=0.1 + 0.01 * t, momentum=momentum * 0.95**t)
        for k, (p, d) in enumerate(zip(ps, dense, strict=True)):
            p.grad = None if (t + k) % 4 == 1 else torch.randn_like(p)
            if p.grad is not None:
                d.step(p.grad, optimizer.param_groups[0])
        optimizer.step()
    for p, d in zip(ps, dense, strict=True):
        torch.testing.assert_close(p.detach(), d.p, rtol=1e-10, atol=1e-10)


def test_blocks_and_inverses_are_in_the_state(engine):
    ps = params((4, 3, 3, 3), (5, 7), (6,), dtype=torch.float64)
    dense = [Dense(p) for p in ps]
    optimizer = built(ps, engine=engine)
    for _ in range(4):
        fill_gradients(ps)
        for p, d in zip(ps, dense, strict=True):
            d.step(p.grad, optimizer.param_groups[0])
        optimizer.step()
    kernels, rows = (optimizer.state[p] for p in ps[:2])
    assert kernels["fisher"].shape == (4, 3, 9, 9) and rows["fisher"].shape == (7, 7)
    for state, d, apart in ((kernels, dense[0], 9), (rows, dense[1], 7)):
        for name, whole in (("fisher", d.fisher), ("fisher_inverse", d.inverse)):
            last = whole[-apart:, -apart:]
            torch.testing.assert_close(state[name][(-1,) * (state[name].dim() - 2)], last, rtol=1e-10, atol=1e-10)
    assert "fisher" not in optimizer.state[ps[2]] and len(optimizer.param_groups) == 2
    assert [group["algorithm"] for group in optimizer.param_groups] == ["blocks", "diagonal"]


@pytest.mark.parametrize(
    "options",
    [{}, {"state_dtype": torch.bfloat16}, {"average": fusedopt.EMA(0.9)}, {"max_grad_norm": 1.0}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("after", [2, 3])
def test_resumes_to_the_last_bit(engine, options, after):
    a = params((4, 3, 3, 3), (5, 7), (6,))
    b = copies(a)
    ours, other = built(a, engine=engine, **options), built(b, engine=engine, **options)
    advance(ours, a, 7)
    advance(other, b, after)
    saved = copy.deepcopy(other.state_dict())
    other = built(b, engine=engine, **options)
    other.load_state_dict(saved)
    torch.manual_seed(1)
    for _ in range(after):
        fill_gradients(b)
    for _ in range(7 - after):
        fill_gradients(b)
        other.step()
    assert_same([p.detach() for p in a], [p.detach() for p in b])
    assert_same(snapshot(ours), snapshot(other))


def test_an_earlier_state_can_be_gone_back_to(engine):
    """By the optimizer that has gone on since."""
    ps = params((4, 3, 3, 3), (5, 7), (6,))
    optimizer = built(ps, engine=engine)
    advance(optimizer, ps, 2)
    saved, values = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for p in ps]
    advance(optimizer, ps, 4)
    after = snapshot(optimizer)
    with torch.no_grad():
        for p, value in zip(ps, values, strict=True):
            p.copy_(value)
    optimizer.load_state_dict(saved)
    advance(optimizer, ps, 4)
    assert_same(snapshot(optimizer), after)


@pytest.mark.parametrize("storage", [{}, {"master": "fp32"}, {"master": "split", "state_dtype": "8bit"}], ids=str)
def test_halves_are_near_the_whole_matrix(engine, storage):
    """Blocks are float32; momenta in as many bits as asked for."""
    ps = params((16, 8, 3, 3), (40, 128), dtype=torch.bfloat16)
    dense = [Dense(p.double()) for p in ps if p.numel() < 2000]
    optimizer = built(ps, engine=engine, **storage)
    for _ in range(5):
        fill_gradients(ps)
        for p, d in zip(ps, dense, strict=False):
            d.step(p.grad.double(), optimizer.param_groups[0])
        optimizer.step()
    for p, d in zip(ps, dense, strict=False):
        close(p.detach().double(), d.p, 4e-2)
    assert all(optimizer.state[p]["fisher"].dtype == torch.float32 for p in ps)


def test_clipped_and_unscaled_gradients_are_what_blocks_are_made_of(engine):
    a = params((4, 3, 3, 3), (5, 7), (6,))
    b = copies(a)
    ours, plain = built(a, max_grad_norm=0.5, engine=engine), built(b, engine=engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad * 1024.0
        torch.nn.utils.clip_grad_norm_(b, 0.5)
        scaler.scale(torch.zeros(()))
        scaler.step(ours)
        scaler.update()
        plain.step()
    close([p.detach() for p in a], [p.detach() for p in b], 1e-5)
    close(ours.state[a[1]]["fisher"], plain.state[b[1]]["fisher"], 1e-6)


@pytest.mark.parametrize("history", [0, 2])
def test_a_skipped_step_leaves_blocks_too(engine, history):
    ps = params((4, 3, 3, 3), (5, 7), (6,))
    optimizer = built(ps, skip_nonfinite=True, engine=engine)
    advance(optimizer, ps, history)
    before = snapshot(optimizer)
    fill_gradients(ps)
    ps[1].grad[0, 0] = math.inf
    optimizer.step()
    assert_same(snapshot(optimizer), before)
    assert optimizer.skipped_steps == 1
    other = copies(ps)
    clean = built(other, engine=engine)
    clean.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(optimizer, ps, 3), advance(clean, other, 3)
    assert_same([p.detach() for p in ps], [p.detach() for p in other])


def test_a_step_that_a_device_skipped_leaves_averages():
    p, g = torch.empty(5, 4, 1, 3), torch.rand(5, 4, 1, 3)
    fisher = torch.rand(5, 4, 3, 3)
    kept, expected = fisher.clone(), 0.9 * fisher + 0.1 * g[:, :, 0, :, None] * g[:, :, 0, None, :]
    blocks.update_average(p, kept, g * math.nan, 0.9, torch.ones(()))
    assert_same(kept, fisher)
    blocks.update_average(p, kept, g, 0.9, torch.zeros(()))
    close(kept, expected)


def test_what_cannot_be_inverted_keeps_its_inverse(monkeypatch):
    inverse, before = torch.full((3, 2, 2), 7.0), torch.full((2, 2), 7.0)
    singular = torch.tensor([[[1.0, 0], [0, 1]], [[1, 4], [4, 1]], [[math.nan, 0], [0, 1]]])
    monkeypatch.setattr(blocks, "MOST_ELEMENTS", 8)  # two at a time
    blocks.invert(singular, 2.0, 0.5, inverse)
    close(inverse[0], torch.eye(2))
    assert_same(inverse[1], before)
    assert_same(inverse[2], before)


def test_wide_blocks_become_diagonal_and_a_warning_says_so(engine):
    ps = params((3, 9), (4, 5), (2, 2, 3, 3), dtype=torch.float64)
    said = "parameter 0 'wide' of group 0 .*blocks of 9, more than max_block_size 8; it is stepped by the diagonal"
    named = list(zip(("wide", "narrow", "kernels"), ps, strict=True))
    with pytest.warns(UserWarning, match=said), pytest.warns(UserWarning, match="parameter 2 'kernels'"):
        optimizer = built(named, max_block_size=8, engine=engine)
    groups = {group["algorithm"]: group["params"] for group in optimizer.param_groups}
    assert groups["blocks"][0] is ps[1] and len(groups["blocks"]) == 1 and len(groups["diagonal"]) == 2
    flat = [Dense(ps[0].flatten()), Dense(ps[2].flatten())]
    for _ in range(4):
        fill_gradients(ps)
        for p, d in zip((ps[0], ps[2]), flat, strict=True):
            d.step(p.grad.flatten(), optimizer.param_groups[0])
        optimizer.step()
    for p, d in zip((ps[0], ps[2]), flat, strict=True):
        torch.testing.assert_close(p.detach().flatten(), d.p, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3,), {"algorithm": "blocks"}, r"parameter 0 of group 0 .*has no blocks.*say 'diagonal' of its group"),
        ((3, 9), {"algorithm": "blocks", "max_block_size": 8}, "blocks of 9, more than max_block_size 8"),
        ((3, 9), {"algorithm": "diag"}, "algorithm .group 0. is 'diag'; it may be 'blocks', 'diagonal' or None"),
        ((3, 9), {"damping": 0.0}, "damping"),
        ((3, 9), {"beta": 1.0}, "beta"),
        ((3, 9), {"inverse_every": 0}, "inverse_every"),
        ((3, 9), {"inverse_every": 2.5}, "inverse_every .group 0. is 2.5; it must be a whole number"),
        ((3, 9), {"differentiable": True}, "differentiable=True is not for parameters with blocks"),
    ],
)
def test_refuses(shape, options, message):
    with pytest.raises(ValueError, match=message):
        fusedopt.MBF([{"params": params(shape), **options}])


@pytest.mark.parametrize(
    ("which", "name", "value", "message"),
    [
        (1, "fisher", torch.zeros(5, 5), r"state 'fisher' of parameter 1 .*\(5, 5\); it must have shape \(7, 7\)"),
        (1, "fisher", torch.zeros(7, 7, dtype=torch.int64), "state 'fisher' of parameter 1 .*has dtype torch.int64"),
        (
            0,
            "fisher_inverse",
            3.0,
            r"'fisher_inverse' of parameter 0 .*is float; it must have shape \(4, 3, 9, 9\)",
        ),
        (0, "fisher", None, "the state of parameter 0 of group 0 .*lacks 'fisher', which a parameter that was stepped"),
        (2, "fisher", torch.zeros(6), "state 'fisher' of parameter 0 of group 1 .*the parameter has no blocks"),
    ],
)
@pytest.mark.parametrize("how", ["loaded", "set"])
def test_states_that_do_not_fit_are_refused(engine, which, name, value, message, how):
    ps = params((4, 3, 3, 3), (5, 7), (6,))
    optimizer = built(ps, engine=engine)
    advance(optimizer, ps, 2)
    fill_gradients(ps)
    before, saved = snapshot(optimizer), copy.deepcopy(optimizer.state_dict())
    if how == "loaded":
        saved["state"][which][name] = value
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
    elif which < 2:
        kept, optimizer.state[ps[which]][name] = optimizer.state[ps[which]][name], value
        with pytest.raises(ValueError, match=message):
            optimizer.step()
        optimizer.state[ps[which]][name] = kept
    assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("average", "foo", "average"),
        ("master", "bar", "master"),
        ("master", "fp32", "master='fp32' is not for parameters of torch.float32"),
        ("cautious_weight_decay", "x", "cautious_weight_decay"),
        ("inverse_every", 0, "inverse_every .group 0. is 0.0"),
        ("inverse_every", 2.5, "inverse_every .group 0. is 2.5; it must be a whole number"),
        ("inverse_every", "a", "inverse_every .group 0. is 'a'"),
        ("max_block_size", "q", "max_block_size .group 0. is 'q'"),
        ("differentiable", True, "differentiable=True is not for parameters with blocks"),
        ("algorithm", "foo", "algorithm is 'foo'; it may be 'blocks' or 'diagonal'"),
        ("algorithm", "after", "algorithm is 'after'; it may be 'blocks' or 'diagonal'"),
        ("damping", 0.0, "damping"),
    ],
)
def test_options_that_become_wrong_are_named(engine, key, value, message):
    """By whichever launch; nothing has changed then, and what is right again goes on."""
    ps = params((4, 3, 3, 3), (5, 7), (6,))
    optimizer = built(ps, engine=engine)
    advance(optimizer, ps, 2)
    before, kept = snapshot(optimizer), dict(optimizer.param_groups[0])
    optimizer.param_groups[0][key] = value
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    optimizer.param_groups[0].clear()
    optimizer.param_groups[0].update(kept)
    optimizer.step()
    assert not torch.equal(ps[0].detach(), before[0][0])


@pytest.mark.filterwarnings("ignore:.*duplicate parameters")
def test_what_is_given_twice_is_refused():
    (p,) = params((5, 7))
    with pytest.raises(ValueError, match="parameter 1 of group 0 is given twice, which what has blocks cannot be"):
        fusedopt.MBF([p, p])


def test_a_warning_points_to_who_called():
    with pytest.warns(UserWarning) as told:
        optimizer = built(params((3, 9)), max_block_size=8)
        optimizer.add_param_group({"params": params((3, 9))})
    assert [warning.filename for warning in told] == [__file__] * 2


def test_blocks_of_another_dtype_and_layout_are_taken_over(engine):
    ps = params((5, 7))
    optimizer = built(ps, engine=engine)
    advance(optimizer, ps, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for name in ("fisher", "fisher_inverse"):
        saved["state"][0][name] = saved["state"][0][name].double().T.contiguous().T
    other = copies(ps)
    again = built(other, engine=engine)
    again.load_state_dict(saved)
    advance(optimizer, ps, 3), advance(again, other, 3)
    assert_same([p.detach() for p in ps], [p.detach() for p in other])


def test_a_missing_inverse_is_made_at_once(engine):
    """As of a state that was saved without it; not only where it is time."""
    ps = params((5, 7))
    optimizer = built(ps, engine=engine)
    advance(optimizer, ps, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["fisher_inverse"]
    optimizer.load_state_dict(saved)
    before = ps[0].detach().clone()
    advance(optimizer, ps, 1)
    assert optimizer.state[ps[0]]["fisher_inverse"].diagonal().min() > 0
    assert not torch.equal(ps[0].detach(), before)


def test_kernels_may_be_laid_out_otherwise(engine):
    a = params((4, 3, 3, 3))
    b = [torch.nn.Parameter(a[0].detach().clone(memory_format=torch.channels_last))]
    ours, other = built(a, engine=engine), built(b, engine=engine)
    for _ in range(4):
        a[0].grad = torch.randn_like(a[0])
        b[0].grad = a[0].grad.clone(memory_format=torch.channels_last)
        ours.step(), other.step()
    close(a[0].detach(), b[0].detach())


def test_options_of_the_step_are_those_of_every_optimizer(engine):
    """Ascent is descent of the opposite; decay is decoupled; an average is one of parameters."""
    a = params((5, 7), (6,))
    b = copies(a)
    ours, other = built(a, maximize=True, average=fusedopt.EMA(0.5), engine=engine), built(b, engine=engine)
    average = [q.detach().clone() for q in b]
    for t in range(4):
        for p, q in zip(a, b, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = -q.grad
        ours.step(), other.step()
        average = [q.detach().clone() if t == 0 else (m + q.detach()) / 2 for m, q in zip(average, b, strict=True)]
    close([p.detach() for p in a], [q.detach() for q in b])
    close([ours.average_of(p) for p in a], average)


def test_it_learns(engine):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 6, 3), torch.nn.Tanh(), torch.nn.Conv2d(6, 6, 3), torch.nn.Flatten(), torch.nn.Linear(96, 3)
    )
    x, y = torch.randn(60, 1, 8, 8), torch.randint(3, (60,))
    optimizer = fusedopt.MBF(net.parameters(), lr=2e-3, engine=engine)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
