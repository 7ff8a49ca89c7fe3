"""Low-bit states and masters: what is legal, what stays, what is saved and converted."""

import io
import itertools
import math

import numpy as np
import pytest
import storage_model as model
import torch
from helpers import assert_same, snapshot
from storage_model import LEGAL, MASTERS, STATE_DTYPES, give_gradients, parameters

import fusedopt
from fusedopt import host, operands
from fusedopt.bench import memory
from fusedopt.engines import cpu


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


def test_parameters_that_hold_averages_are_no_masters():
    params = parameters(torch.bfloat16)
    optimizer = fusedopt.AdamW(params, lr=0.01, average=fusedopt.EMA(0.9), master="split")
    give_gradients(params, 0)
    optimizer.step()
    before = snapshot(optimizer)
    with optimizer.averaged():
        for call in (fusedopt.master_weights, fusedopt.convert_state):
            with pytest.raises(RuntimeError, match=r"\(\) inside of averaged"):
                call(optimizer)
    assert_same(snapshot(optimizer), before)


STORAGES = [storage for storage in LEGAL[torch.bfloat16] if storage != (None, None)]


@pytest.mark.parametrize(("state_dtype", "master"), STORAGES)
def test_steps_in_the_backward_pass(engine, state_dtype, master):
    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(torch.nn.Sequential(torch.nn.Linear(80, 64), torch.nn.Linear(64, 70)).bfloat16())
        options = {"state_dtype": state_dtype, "master": master, "engine": engine}
        optimizers.append(fusedopt.AdamW(models[-1].parameters(), lr=0.01, **options))
    fusedopt.step_in_backward(optimizers[0])
    for t in range(3):
        for module, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(t)
            module(torch.randn(4, 80).bfloat16()).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*map(snapshot, optimizers))


@pytest.mark.skipif(cpu.available() is not None, reason="needs the CPU engine")
@pytest.mark.parametrize(("state_dtype", "master"), STORAGES)
@pytest.mark.parametrize("name", ["AdamW", "LAMB"])
def test_a_step_takes_no_memory_for_itself(name, state_dtype, master):
    p = torch.nn.Parameter(torch.randn(2**11, 2**11).bfloat16())
    p.grad = torch.randn_like(p)
    optimizer = getattr(fusedopt, name)([p], engine="cpu", state_dtype=state_dtype, master=master, max_grad_norm=1.0)
    for _ in range(2):
        optimizer.step()
    taken = memory.peak(optimizer.step, torch.device("cpu"))
    if taken is None:
        pytest.skip("this system does not tell")
    assert taken < p.numel() / 4  # not even a byte for every fourth element
