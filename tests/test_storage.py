"""Low-bit states and exact masters: every way to store, on every engine, against a slow model in double precision."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import storage_model as model
import torch
from helpers import assert_same, bits, snapshot

import fusedopt
from fusedopt import codecs, operands

STATE_DTYPES = (None, torch.bfloat16, "8bit")
MASTERS = (None, "fp32", "split", "stochastic")
LEGAL = {
    torch.float32: list(itertools.product(STATE_DTYPES, [None])),
    torch.bfloat16: list(itertools.product(STATE_DTYPES, MASTERS)),
    torch.float16: list(itertools.product(STATE_DTYPES, [None, "fp32"])),
}
EVERY = [(dtype, *storage) for dtype, storages in LEGAL.items() for storage in storages]
HYPER = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def name_of(value):
    return str(value).removeprefix("torch.")


def tensors(dtype, seed=0):
    """Of one slice and of many, also such as are no multiples of blocks; strided; with gaps; too small for 8 bits."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return [
        randn(4097),  # a tail of one element
        randn(16, 512),
        randn(5, 911),
        randn(12, 30, 4, 4).to(memory_format=torch.channels_last),
        randn(300, 16).t(),
        randn(70, 140)[:, ::2],
        randn(64, 65),
        randn(31),
        randn(4095),
        randn(0, 5),
    ]


def parameters(dtype):
    return [torch.nn.Parameter(t) for t in tensors(dtype)]


def give_gradients(params, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        tails = torch.randn(p.shape, generator=generator) * torch.randn(p.shape, generator=generator).exp()
        p.grad = torch.empty_like(p).copy_(tails) if dtype is None else tails.to(dtype)


class Truth:
    """One step of AdamW in double, from what an optimizer's state holds before it."""

    def __init__(self, optimizer, params, master):
        self.master, self.before = master, []
        for i, p in enumerate(params):
            state = optimizer.state.get(p, {})
            has = "exp_avg" in state
            m = model.read(state["exp_avg"], state, "exp_avg", True) if has else np.zeros(p.shape)
            v = model.read(state["exp_avg_sq"], state, "exp_avg_sq", False) if has else np.zeros(p.shape)
            # A master that is yet to be made is the parameter.
            value = model.read_param(p, state, master if has else None)
            step = int(state["step"]) if has else 0
            words = {
                name: model.words(optimizer, i, p, name, step)
                for name in ("param", "exp_avg", "exp_avg_sq")
                if master == "stochastic"
            }
            self.before.append((value, m, v, p.grad.double().numpy(), step + 1, words))

    def after(self, i):
        """Of a parameter: its value and both moments, each with what rounding errors are relative to; and words."""
        p, m, v, g, t, words = self.before[i]
        b1, b2 = HYPER["betas"]
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            of_m = np.abs(m) + np.abs(g)
            m = m + (1 - b1) * (g - m)
            v = b2 * v + (1 - b2) * g * g
            divisor = (1 - b1**t) * (np.sqrt(v) / math.sqrt(1 - b2**t) + HYPER["eps"])
            of_p = np.abs(p) + HYPER["lr"] * of_m / divisor
            p = p * (1 - HYPER["lr"] * HYPER["weight_decay"]) - HYPER["lr"] * m / divisor
            return (p, of_p), (m, of_m), (v, v), words


def error_of(magnitude):
    """Some roundings of float32, which has nothing below 1e-45."""
    return 4e-6 * np.nan_to_num(magnitude, nan=0, posinf=0) + 4e-45


def close(found, truth, magnitude):
    found = np.asarray(found, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        gap = np.abs(found - truth)
    return ((gap <= error_of(magnitude)) | (np.isnan(found) & np.isnan(truth)) | (found == truth)).all()


def around(value, magnitude):
    """What may be had in place of a value."""
    error = error_of(magnitude)
    return value - error, value, value + error


def check_half(t, value, magnitude, words):
    """A half is the value rounded; where the value may be another, any of them is."""
    rounding = model.nearest_even if words is None else lambda x: model.by_words(x, words)
    found = model.from_bits(model.bf16(t)[1] << 16)
    either = np.stack([model.from_bits(rounding(np.float32(x)) << 16) for x in around(value, magnitude)])
    assert ((found >= either.min(0)) & (found <= either.max(0)) | np.isnan(found) & np.isnan(value)).all()


def check_param(p, state, master, truth, words):
    value, magnitude = truth
    if p.dtype == torch.float32:
        assert close(p.detach().numpy(), value, magnitude)
    if master in ("fp32", "split"):
        kept = model.read_param(p, state, master)
        assert close(kept, value, magnitude)
        rounded = model.half_away(np.float32(kept))
        assert p.dtype == torch.float16 or (model.bf16(p)[1] == rounded).all()
        assert p.dtype == torch.bfloat16 or torch.equal(p.detach(), state["master"].half())
    elif p.dtype == torch.bfloat16:
        check_half(p, value, magnitude, words.get("param"))


def check_state(state, name, signed, truth, words):
    t, (value, magnitude) = state[name], truth
    if t.dtype == torch.float32:
        assert close(t.numpy(), value, magnitude)
    elif t.dtype == torch.bfloat16:
        check_half(t, value, magnitude, words.get(name))
    else:
        scales = state[f"{name}_scale"]
        expected = model.scales_of(value)
        assert scales.dtype == torch.float32 and scales.numel() == len(expected)
        scales = scales.double().numpy().ravel()
        assert close(scales, expected, model.scales_of(magnitude))
        codes = t.numpy().astype(np.float64)
        either = np.stack([model.quantize(x, scales, signed) for x in around(value, magnitude)])
        assert (codes >= either.min(0) - 0.501).all() and (codes <= either.max(0) + 0.501).all()
        assert signed or (codes[value > 1e-44] >= 1).all()


def check_step(optimizer, params, truth, master):
    for i, p in enumerate(params):
        state = optimizer.state[p]
        value, m, v, words = truth.after(i)
        check_param(p, state, master, value, words)
        check_state(state, "exp_avg", True, m, words)
        check_state(state, "exp_avg_sq", False, v, words)


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


@pytest.mark.parametrize(("state_dtype", "master"), [("8bit", "split"), (torch.bfloat16, "stochastic")])
def test_a_hundred_steps_keep_to_the_model(engine, state_dtype, master):
    torch.manual_seed(0)
    steps = 100 if engine != "triton" else 20
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


# --------------------------------------------------------------------------------------------- options and checkpoints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.complex64, torch.bfloat16])
def test_one_table_says_what_is_legal(dtype):
    p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    legal = {**LEGAL, torch.complex64: LEGAL[torch.float32]}.get(dtype, [(None, None)])
    for state_dtype, master in itertools.product(STATE_DTYPES, MASTERS):
        if (state_dtype, master) in legal:
            fusedopt.AdamW([p], state_dtype=state_dtype, master=master)
        else:
            with pytest.raises(ValueError, match=r"parameter 0 of group 0 .* it may be None"):
                fusedopt.AdamW([p], state_dtype=state_dtype, master=master)


def test_other_values_are_refused():
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    for state_dtype in (torch.float16, "4bit", 8):
        with pytest.raises(ValueError, match=r"state_dtype .* it may be None, torch.bfloat16 or '8bit'"):
            fusedopt.AdamW([p], state_dtype=state_dtype)
    with pytest.raises(ValueError, match=r"master .* it may be None, 'fp32', 'split' or 'stochastic'"):
        fusedopt.AdamW([p], master="fp16")
    with pytest.raises(ValueError, match="cannot be differentiable"):
        fusedopt.AdamW([p.detach().clone()], master="split", differentiable=True)
    with pytest.raises(ValueError, match="centered"):
        fusedopt.RMSprop([p], centered=True, state_dtype="8bit")


def stepped(engine="auto", dtype=torch.bfloat16, name="AdamW", **storage):
    params = parameters(dtype)
    optimizer = getattr(fusedopt, name)(params, lr=0.01, engine=engine, **storage)
    give_gradients(params, 0)
    optimizer.step()
    return params, optimizer


def test_storage_is_fixed_once_there_is_a_state(engine):
    params, optimizer = stepped(engine, state_dtype="8bit", master="split")
    before = snapshot(optimizer)
    for key, value in (("state_dtype", None), ("state_dtype", torch.bfloat16), ("master", None), ("master", "fp32")):
        old = optimizer.param_groups[0][key]
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match="fusedopt.convert_state"):
            optimizer.step()
        optimizer.param_groups[0][key] = old
    assert_same(snapshot(optimizer), before)
    optimizer.step()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("storage", [("8bit", "split"), (torch.bfloat16, "stochastic"), ("8bit", "fp32")], ids=str)
def test_a_resumed_run_is_the_same_bit_for_bit(engine, storage):
    state_dtype, master = storage
    params, optimizer = stepped(engine, state_dtype=state_dtype, master=master)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = fusedopt.AdamW(others, lr=0.5, engine=engine)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert_same(snapshot(resumed), snapshot(optimizer))
    for which in (params, others):
        give_gradients(which, 1)
    optimizer.step()
    resumed.step()
    assert_same(snapshot(resumed), snapshot(optimizer))


def test_loaded_states_are_never_cast():
    params, optimizer = stepped(state_dtype="8bit", master="split")
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    theirs = torch.optim.AdamW(others, lr=0.01)
    give_gradients(others, 0)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    assert all(optimizer.state[p]["exp_avg"].dtype == torch.bfloat16 for p in params)
    with pytest.raises(ValueError, match=r"state 'exp_avg' of parameter 0 .* fusedopt.convert_state"):
        optimizer.step()
    fusedopt.convert_state(optimizer, state_dtype="8bit", master="split")
    optimizer.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.uint8 and "param_low" in optimizer.state[params[0]]


def test_states_convert_between_all_ways_to_store(engine):
    ways = LEGAL[torch.bfloat16]
    params, optimizer = stepped(engine)
    exact = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in params}
    for state_dtype, master in [*ways, *reversed(ways)]:
        visible = [p.detach().clone() for p in params]
        fusedopt.convert_state(optimizer, state_dtype=state_dtype, master=master)
        assert_same([p.detach() for p in params], visible)
        assert optimizer.param_groups[0].get("state_dtype") == state_dtype
        for p in params:
            state = optimizer.state[p]
            assert ("master" in state, "param_low" in state) == (master == "fp32", master == "split")
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                truth = exact[p][name].double().numpy()
                gap = np.abs(model.read(state[name], state, name, signed) - truth)
                assert (gap <= 0.06 * np.abs(truth).max(initial=0)).all()
        give_gradients(params, 3)
        kept = snapshot(optimizer)
        optimizer.step()
        for (p, before), state in zip(zip(params, kept[0], strict=True), kept[1], strict=True):
            with torch.no_grad():
                p.copy_(before)
            for key, value in state.items():
                optimizer.state[p][key].copy_(value)


def test_masters_convert_exactly():
    params, optimizer = stepped(master="split")
    exact = fusedopt.master_weights(optimizer)
    for master in ("fp32", "split"):
        fusedopt.convert_state(optimizer, master=master)
        assert_same(fusedopt.master_weights(optimizer), exact)
    with pytest.raises(ValueError, match="it may be None"):
        fusedopt.convert_state(fusedopt.AdamW([torch.nn.Parameter(torch.zeros(3))]), master="split")
    with pytest.raises(TypeError, match=r"fusedopt\.fuse"):
        fusedopt.convert_state(torch.optim.SGD(params, lr=0.1), state_dtype="8bit")
    with pytest.raises(ValueError, match="groups has 1"):
        fusedopt.convert_state(optimizer, master=None, groups=[1])


def test_other_programs_get_float32():
    params, optimizer = stepped(state_dtype="8bit", master="split")
    saved = optimizer.state_dict(dequantized=True)
    assert not {"state_dtype", "master"} & saved["param_groups"][0].keys()
    theirs = torch.optim.AdamW([torch.nn.Parameter(p.detach().float()) for p in params])
    theirs.load_state_dict(saved)
    for k, p in enumerate(params):
        state = optimizer.state[p]
        assert saved["state"][k].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            found = saved["state"][k][name]
            assert found.dtype == torch.float32
            np.testing.assert_allclose(found.numpy(), model.read(state[name], state, name, signed), rtol=1e-6)
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.uint8


BAD = {
    "has 8 bits without 'exp_avg_scale'": lambda s: s.pop("exp_avg_scale"),
    "'exp_avg_scale' .* has shape": lambda s: s.update(exp_avg_scale=torch.zeros(3)),
    "'exp_avg_scale' .* has dtype torch.float64": lambda s: s.update(exp_avg_scale=s["exp_avg_scale"].double()),
    "'param_low' .* has shape": lambda s: s.update(param_low=s["param_low"][:5]),
    "'param_low' .* has dtype torch.float32": lambda s: s.update(param_low=s["param_low"].float()),
}


@pytest.mark.parametrize("message", BAD)
def test_states_that_do_not_fit(engine, message):
    params, optimizer = stepped(engine, state_dtype="8bit", master="split")
    BAD[message](optimizer.state[params[1]])
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{message}"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_a_skipped_step_leaves_nothing(engine):
    params = parameters(torch.bfloat16)
    options = {"state_dtype": "8bit", "master": "split", "skip_nonfinite": True}
    optimizer = fusedopt.AdamW(params, lr=0.01, engine=engine, **options)
    before = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    params[0].grad[0] = math.inf
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert_same([p.detach() for p in params], before)
    assert all(
        not state or (state["exp_avg"].float() - (128 if state["exp_avg"].dtype == torch.uint8 else 0) == 0).all()
        for state in optimizer.state.values()
    )


@pytest.mark.parametrize(("name", "most"), [("AdamW", 6.1), ("Lion", 5.1)])
def test_bytes(engine, name, most):
    p = torch.nn.Parameter(torch.randn(256, 1024).bfloat16())
    optimizer = getattr(fusedopt, name)([p], lr=1e-3, state_dtype="8bit", master="split", engine=engine)
    p.grad = torch.randn_like(p)
    optimizer.step()
    held = [p, *(t for t in optimizer.state[p].values() if t.dim())]
    assert sum(t.untyped_storage().nbytes() for t in held) / p.numel() <= most


@pytest.mark.parametrize("name", sorted(set(fusedopt.optimizers.__all__) - {"KoalaM", "KoalaV"}))
def test_every_optimizer_takes_every_storage(engine, name):
    if engine == "cuda" and name == "SWATS":
        pytest.skip("has no CUDA kernel")
    for state_dtype, master in [("8bit", "split"), (torch.bfloat16, "stochastic"), ("8bit", "fp32")]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((20, 300), (65,))]
        optimizer = getattr(fusedopt, name)(params, state_dtype=state_dtype, master=master, engine=engine)
        wide = [torch.nn.Parameter(p.detach().float()) for p in params]
        twin = getattr(fusedopt, name)(wide)
        for t in range(2):
            give_gradients(params, t)
            for p, q in zip(params, wide, strict=True):
                q.grad = p.grad.float()
            optimizer.step()
            twin.step()
        for p, q in zip(params, wide, strict=True):
            moved = (q.detach() - p.detach().float()).abs().mean()
            assert p.isfinite().all() and moved <= 0.02 + 0.5 * q.detach().abs().mean()
            kinds = {k: t.dtype for k, t in optimizer.state[p].items() if k in {s.name for s in twin.rule.states}}
            exact = {s.name for s in optimizer.rule.states if s.exact}
            assert all(kinds[k] == torch.float32 for k in exact & kinds.keys())


def test_codecs_are_in_the_order_of_the_extensions():
    from fusedopt import host

    extension = host.load()
    assert list(extension.codecs()) == [codec.name for codec in operands.CODECS]


@pytest.mark.parametrize("scan", ["", "python"])
def test_what_was_moved_is_seen(engine, scan, monkeypatch):
    if scan and engine in ("cpu", "eager"):
        pytest.skip("has none in Python")
    monkeypatch.setenv("FUSEDOPT_HOST", scan or "abi")
    (params, optimizer), (others, twin) = (stepped(engine, state_dtype="8bit", master="split") for _ in range(2))
    for t, key in enumerate(("exp_avg_scale", "exp_avg_sq", "param_low", "exp_avg_sq_scale")):
        for i, p in enumerate(params):
            kept = optimizer.state[p].get(key)
            if kept is None:
                continue
            if i % 2:
                optimizer.state[p][key] = kept.clone()
                kept.zero_()  # nobody must look there any more
            else:
                kept.data = kept.clone()
        for which in (params, others):
            give_gradients(which, t)
        optimizer.step()
        twin.step()
        assert_same(snapshot(optimizer), snapshot(twin))
