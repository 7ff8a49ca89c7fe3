"""Low-bit states and exact masters: every way to store, on every engine, against a slow model in double precision."""

import copy
import math

import numpy as np
import pytest
import storage_model as model
import torch
from helpers import ALL, assert_same, bits, snapshot
from storage_model import LEGAL, give_gradients, parameters
from storage_truth import Truth, check_step

import fusedopt
from fusedopt import codecs

EVERY = [(dtype, *storage) for dtype, storages in LEGAL.items() for storage in storages]
HYPER = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def name_of(value):
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "state_dtype", "master"), EVERY, ids=lambda v: name_of(v))
def test_steps_are_those_of_the_slow_model(engine, dtype, state_dtype, master):
    params = parameters(dtype)
    optimizer = fusedopt.AdamW(params, **HYPER, state_dtype=state_dtype, master=master, engine=engine)
    for t in range(3):
        give_gradients(params, t)
        truth = Truth(optimizer, params, master)
        optimizer.step()
        check_step(optimizer, params, truth, master)
    for p in params:
        is_large = p.numel() >= 4096 and state_dtype == "8bit"
        wanted = {None: torch.float32, "8bit": torch.uint8 if is_large else torch.float32}
        assert optimizer.state[p]["exp_avg"].dtype == wanted.get(state_dtype, state_dtype)
        assert optimizer.state[p]["exp_avg"].shape == p.shape


@pytest.mark.parametrize("steps", [20, pytest.param(100, marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("state_dtype", "master"), [("8bit", "split"), (torch.bfloat16, "stochastic")])
def test_many_steps_keep_to_the_model(engine, state_dtype, master, steps):
    torch.manual_seed(0)
    steps = 100 if engine != "triton" else steps
    params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((4097,), (17, 300))]
    optimizer = fusedopt.AdamW(params, **HYPER, state_dtype=state_dtype, master=master, engine=engine)
    for t in range(steps):
        give_gradients(params, t)
        truth = Truth(optimizer, params, master)
        optimizer.step()
        check_step(optimizer, params, truth, master)


HOSTILE = {
    "zeros": lambda g: g.zero_(),
    "denormal": lambda g: g.mul_(1e-39),
    "squares that vanish": lambda g: g.mul_(1e-23),
    "inf in a block": lambda g: g.view(-1)[300:301].fill_(math.inf),
    "nan in a block": lambda g: g.view(-1)[300:301].fill_(math.nan),
    "one huge value": lambda g: g.mul_(1e-6).view(-1)[77:78].fill_(1e4),
    "a block of zeros": lambda g: g.view(-1)[256:512].zero_(),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_blocks(engine, what):
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4097,), (9, 600))]
    optimizer = fusedopt.AdamW(params, **HYPER, state_dtype="8bit", engine=engine)
    for t in range(2):
        give_gradients(params, t)
        for p in params:
            HOSTILE[what](p.grad)
        truth = Truth(optimizer, params, None)
        optimizer.step()
        check_step(optimizer, params, truth, None)
    finite = [p.isfinite() for p in params]
    if what.endswith("in a block"):  # what is not finite spoils its block, and no other
        assert not finite[0][256:512].any() and finite[0][:256].all() and finite[0][512:].all()
        assert not finite[1][0, 256:512].any() and finite[1][1:].all()
    else:
        assert all(f.all() for f in finite)


@pytest.mark.parametrize("master", [None, "split", "fp32"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_nan_of_all_bits_is_not_rounded_to_a_number(engine, master, grad_dtype):
    param = torch.nn.Parameter(torch.ones(600, dtype=torch.bfloat16))
    param.grad_dtype = None
    param.grad = torch.ones(600, dtype=grad_dtype)
    options = {"master": master} if master else {}
    optimizer = fusedopt.AdamW([param], state_dtype=torch.bfloat16, engine=engine, **options)
    ones = torch.int32 if grad_dtype == torch.float32 else torch.int16
    param.grad.view(ones)[300] = -1
    for _ in range(2):
        optimizer.step()
    for tensor in (param.detach(), optimizer.state[param]["exp_avg"], optimizer.state[param]["exp_avg_sq"]):
        assert tensor.isnan().nonzero().tolist() == [[300]]


@pytest.mark.parametrize("state_dtype", ["8bit", torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", ALL)
def test_gradients_of_either_type_step_alike(engine, name, state_dtype):
    """To the last bit, whatever way an engine takes where all are narrow."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((9, 700), (4097,))]
        optimizer = getattr(fusedopt, name)(params, lr=0.01, state_dtype=state_dtype, engine=engine)
        for _ in range(2 if engine == "triton" else 4):
            for p in params:
                p.grad_dtype = None
                p.grad = torch.randn(p.shape).bfloat16().to(dtype)
            optimizer.step()
        found.append(snapshot(optimizer))
    assert_same(*found)


# ------------------------------------------------------------------------------------------------------------ masters


def twins(engine, name, grad_dtype, **options):
    """bfloat16 parameters with both kinds of masters, and float32 ones, all with the same gradients."""
    found = []
    for dtype, master in ((torch.float32, None), (torch.bfloat16, "fp32"), (torch.bfloat16, "split")):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(torch.bfloat16)]
        optimizer = getattr(fusedopt, name)(params, engine=engine, **options | ({"master": master} if master else {}))
        found.append((params, optimizer))
        for p in params:
            p.grad_dtype = None
    steps = 2 if engine == "triton" else 5
    for t in range(steps):
        for params, optimizer in found:
            give_gradients(params, t, grad_dtype)
            optimizer.step()
    return found


RULES = {
    "AdamW": {"lr": 0.01, "weight_decay": 0.1, "amsgrad": True},
    "Lion": {"lr": 0.001, "weight_decay": 0.1},
    "SGD": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
    "LAMB": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.9},
}


@pytest.mark.parametrize("more", [{}, {"average": fusedopt.EMA(0.9)}], ids=["plain", "EMA"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("name", RULES)
def test_masters_follow_a_float32_run_bit_for_bit(engine, name, grad_dtype, more):
    (wide, one), *others = twins(engine, name, grad_dtype, **RULES[name], **more)
    for params, optimizer in others:
        masters = fusedopt.master_weights(optimizer)
        for p, q in zip(params, wide, strict=True):
            assert torch.equal(masters[p], q.detach())
            assert torch.equal(p.detach(), codecs.visible_of(q.detach(), torch.bfloat16))
            for key, value in one.state[q].items():
                assert torch.equal(bits(optimizer.state[p][key]), bits(value)), key


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_masters_that_are_clipped_follow_too(engine, master):
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        params = [torch.nn.Parameter(p.detach().to(dtype)) for p in parameters(torch.bfloat16)]
        more = {"master": master} if dtype == torch.bfloat16 else {}
        optimizer = fusedopt.AdamW(params, lr=0.01, max_grad_norm=0.5, engine=engine, **more)
        for p in params:
            p.grad_dtype = None
        for t in range(3):
            give_gradients(params, t, torch.float32)
            optimizer.step()
        found.append((params, optimizer))
    (wide, one), (params, optimizer) = found
    masters = fusedopt.master_weights(optimizer)
    torch.testing.assert_close(optimizer.grad_norm, one.grad_norm, rtol=1e-6, atol=0)
    if engine != "cuda":  # whose lanes have other elements beside halves, and add up in another order
        assert all(torch.equal(masters[p], q.detach()) for p, q in zip(params, wide, strict=True))


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_a_parameter_that_was_written_since_is_stepped_as_it_is(engine, master):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(600).bfloat16())
    optimizer = fusedopt.SGD([p], lr=1e-3, master=master, engine=engine)
    p.grad = torch.randn(600).bfloat16()
    optimizer.step()
    with torch.no_grad():
        p[:100] = 0.0
        p[100:200] = 3.0
        p[200:300] = math.inf
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p[:100].abs() < 1e-38).all() and torch.equal(p[100:200], torch.full((100,), 3.0).bfloat16())
    assert not p[200:300].isfinite().any() and p[300:].isfinite().all()
    kept = fusedopt.master_weights(optimizer)[p]
    assert (kept[100:200] - 3).abs().max() <= (0.0 if master == "fp32" else 0.008)


def test_masters_of_every_pattern_of_bits():
    patterns = torch.arange(0, 1 << 32, 65_537 // 3, dtype=torch.int64)
    values = (patterns - (patterns >= 1 << 31) * (1 << 32)).to(torch.int32).view(torch.float32)
    visible, low = codecs.split(values)
    joined = codecs.joined(visible, low)
    is_nan = values.isnan()
    assert torch.equal(joined[~is_nan].view(torch.int32), values[~is_nan].view(torch.int32))
    assert joined[is_nan].isnan().all() and visible[is_nan].isnan().all()
    expected = torch.from_numpy(model.half_away(values.numpy()).astype(np.uint16).astype(np.int16))
    assert torch.equal(visible.view(torch.int16), expected)


# ------------------------------------------------------------------------------------------------ stochastic rounding


def test_stochastic_rounding_is_unbiased(engine):
    p = torch.nn.Parameter(torch.full((20_000,), 1.0).bfloat16())
    optimizer = fusedopt.SGD([p], lr=1.0, master="stochastic", engine=engine)
    p.grad = torch.full_like(p, -(2.0**-9)).bfloat16()  # a quarter of the distance to the next
    optimizer.step()
    assert set(p.detach().float().unique().tolist()) == {1.0, 1.0 + 2.0**-7}
    assert abs((p.detach().float() > 1).float().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 20_000)


def test_random_words_are_the_same_however_a_step_is_done(engine):
    def run(threads, order):
        torch.set_num_threads(threads)
        params = parameters(torch.bfloat16)
        optimizer = fusedopt.AdamW(params, **HYPER, state_dtype=torch.bfloat16, master="stochastic", engine=engine)
        for t in range(2):
            give_gradients(params, t)
            if order == "resumed" and t:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = fusedopt.AdamW(params, **HYPER, engine=engine)
                optimizer.load_state_dict(saved)
            optimizer.step()
        return snapshot(optimizer)

    threads = torch.get_num_threads()
    try:
        first = run(1, "straight")
        assert_same(run(2, "straight"), first)
        assert_same(run(2, "resumed"), first)
    finally:
        torch.set_num_threads(threads)
