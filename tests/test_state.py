"""state_dict, both ways with torch.optim; resuming; pickling; fuse()."""

import copy
import io
import pickle

import pytest
import torch
from helpers import ALL, BY_NAME, TORCH, assert_same, fewer, fill_gradients, params, snapshot

import fusedopt
from fusedopt.verification import oracles
from fusedopt.verification.cases import CASES
from fusedopt.verification.trajectory import run

SHAPES = [(31,), (), (4, 5), (0,)]
OPTIONS = {
    "SGD": {"momentum": 0.9, "dampening": 0.2},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Adam": {"amsgrad": True},
}


def through_file(state, **load):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **load)


def advance(optimizer, ps, steps, seed):
    torch.manual_seed(seed)
    for _ in range(steps):
        fill_gradients(ps)
        optimizer.step()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_resume_is_bit_exact(engine, case):
    steps = {"triton": 8, "cuda": 24, "eager": 24}.get(engine, 80)  # as many as each has time for
    straight, a = run(lambda p: case.build(p, engine=engine), torch.float32, steps=steps, replicas=case.replicas)
    resumed, b = run(
        lambda p: case.build(p, engine=engine), torch.float32, steps=steps, resume=True, replicas=case.replicas
    )
    assert_same(straight, resumed)
    assert_same(snapshot(a), snapshot(b))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_resume_of_half_precision_is_bit_exact(engine, name, half):
    def build(ps):
        return getattr(fusedopt, name)(ps, engine=engine, **OPTIONS.get(name, {}))

    ps = params(*SHAPES, dtype=half)
    optimizer = build(ps)
    advance(optimizer, ps, 3, 1)
    copies = copy.deepcopy(ps)
    state = through_file(optimizer.state_dict())
    advance(optimizer, ps, 3, 2)
    resumed = build(copies)
    resumed.load_state_dict(state)
    advance(resumed, copies, 3, 2)
    assert_same([p.detach() for p in ps], [p.detach() for p in copies])


@pytest.mark.parametrize("map_location", [None, "cpu"])
@pytest.mark.parametrize("name", TORCH)
def test_state_from_torch(engine, name, map_location):
    theirs = params(*SHAPES, dtype=torch.float64)
    b = getattr(torch.optim, name)(theirs, lr=0.02, **OPTIONS.get(name, {}))
    advance(b, theirs, 4, 1)
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    a = getattr(fusedopt, name)(ours, engine=engine)
    a.load_state_dict(through_file(b.state_dict(), map_location=map_location))
    assert a.param_groups[0]["lr"] == 0.02
    advance(a, ours, 4, 2), advance(b, theirs, 4, 2)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("implementation", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("name", TORCH)
def test_state_to_torch(engine, name, implementation):
    if "fused" in implementation and name not in ("SGD", "Adagrad", "Adam", "AdamW"):
        implementation = {}
    ours = params(*SHAPES, dtype=torch.float64)
    a = getattr(fusedopt, name)(ours, lr=0.02, engine=engine, **OPTIONS.get(name, {}), **implementation)
    advance(a, ours, 4, 1)
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    b = getattr(torch.optim, name)(theirs, **implementation)
    b.load_state_dict(through_file(a.state_dict()))
    advance(a, ours, 4, 2), advance(b, theirs, 4, 2)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-8)


def test_load_keeps_dtypes(engine):
    ps = params((5,), dtype=torch.bfloat16)
    optimizer = fusedopt.AdamW(ps, engine=engine)
    advance(optimizer, ps, 2, 1)
    assert optimizer.state[ps[0]]["exp_avg"].dtype == torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        state = optimizer.state_dict()
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"].to(dtype)
        other = fusedopt.AdamW(copy.deepcopy(ps), engine=engine)
        other.load_state_dict(state)
        (p,) = other.param_groups[0]["params"]
        assert other.state[p]["exp_avg"].dtype == dtype
        p.grad = torch.ones_like(p)
        other.step()
        assert other.state[p]["exp_avg"].dtype == dtype


@pytest.mark.parametrize(
    "step", [3, 3.0, torch.tensor(3), torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor([3.0])], ids=str
)
def test_any_step_counter_loads(engine, step):
    ps = params((5,))
    optimizer = fusedopt.AdamW(ps, engine=engine)
    advance(optimizer, ps, 1, 1)
    state = optimizer.state_dict()
    state["state"][0]["step"] = step
    optimizer.load_state_dict(state)
    more = fewer(engine, 300)
    advance(optimizer, ps, more, 1)
    assert optimizer.state[ps[0]]["step"] == 3 + more


def test_loaded_state_is_a_copy(engine):
    ps = params((5,))
    optimizer = fusedopt.AdamW(ps, engine=engine)
    advance(optimizer, ps, 2, 1)
    state = optimizer.state_dict()
    before = copy.deepcopy(state["state"])
    other = fusedopt.AdamW(copy.deepcopy(ps), engine=engine)
    other.load_state_dict(state)
    advance(other, other.param_groups[0]["params"], 2, 1)
    assert_same(dict(state["state"]), dict(before))


def test_old_group_lacks_newer_options(engine):
    ps = params((5,))
    optimizer = fusedopt.AdamW(ps, engine=engine, maximize=True)
    state = optimizer.state_dict()
    for key in ("maximize", "fused", "decoupled_weight_decay", "differentiable"):
        del state["param_groups"][0][key]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["maximize"] is True
    advance(optimizer, ps, 1, 1)


def test_adamw_stays_decoupled_whatever_it_loads(engine):
    results = []
    for package, more in ((fusedopt, {"engine": engine}), (torch.optim, {})):
        torch.manual_seed(3)
        ps = params((9,))
        adam = package.Adam(ps, weight_decay=0.5, **more)
        advance(adam, ps, 2, 1)
        optimizer = package.AdamW(ps, **more)
        optimizer.load_state_dict(adam.state_dict())
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
        advance(optimizer, ps, 3, 2)
        results.append(ps[0].detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_load_hooks(engine):
    optimizer = fusedopt.SGD(params((3,)), engine=engine)
    calls = []
    optimizer.register_load_state_dict_pre_hook(lambda o, s: calls.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append("post"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post"]


def test_foreign_entries_survive(engine):
    ps = params((3,))
    optimizer = fusedopt.AdamW(ps, engine=engine)
    advance(optimizer, ps, 1, 1)
    optimizer.state[ps[0]]["note"] = "kept"
    optimizer.param_groups[0]["tag"] = 7
    state = through_file(optimizer.state_dict())
    other = fusedopt.AdamW(copy.deepcopy(ps), engine=engine)
    other.load_state_dict(state)
    assert other.state[other.param_groups[0]["params"][0]]["note"] == "kept" and other.param_groups[0]["tag"] == 7
    advance(other, other.param_groups[0]["params"], 1, 1)


def test_named_parameters(engine):
    model = torch.nn.Linear(3, 2)
    optimizer = fusedopt.AdamW(model.named_parameters(), engine=engine)
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    model.weight.grad = torch.ones(2, 3).to_sparse()
    with pytest.raises(RuntimeError, match="'weight'"):
        optimizer.step()


@pytest.mark.parametrize("name", ALL)
def test_pickle(engine, name):
    ps = params((5,), (2, 3))
    optimizer = getattr(fusedopt, name)(ps, engine=engine, max_grad_norm=1.0, skip_nonfinite=True)
    advance(optimizer, ps, 2, 1)
    other = pickle.loads(pickle.dumps(optimizer))
    assert (other.max_grad_norm, other.skip_nonfinite, other.engine) == (1.0, True, engine)
    assert_same(snapshot(optimizer), snapshot(other))
    for one in (optimizer, other):
        advance(one, [p for group in one.param_groups for p in group["params"]], 2, 2)
    assert_same(snapshot(optimizer), snapshot(other))


def test_adagrad_has_its_state_from_the_start(engine):
    ps = params((3,))
    optimizer = fusedopt.Adagrad(ps, initial_accumulator_value=0.5, engine=engine)
    assert torch.equal(optimizer.state[ps[0]]["sum"], torch.full((3,), 0.5))
    optimizer.share_memory()
    advance(optimizer, ps, 2, 1)
    assert optimizer.state[ps[0]]["sum"].is_shared() and optimizer.state[ps[0]]["step"] == 2


OTHERS = ("none:", "pytorch-optimizer:")  # has options of its own that are not off by default
FUSABLE = [c for c in CASES if c.oracle.partition(":")[2] == c.optimizer and not c.oracle.startswith(OTHERS)]


@pytest.mark.parametrize("case", FUSABLE, ids=lambda case: case.name)
def test_fuse_goes_on_where_the_other_was(engine, case):
    cls = oracles.find(case.oracle)
    options = oracles.options(cls, case.build(params((3,))).defaults)
    theirs = params(*SHAPES, dtype=torch.float64)
    ours = [torch.nn.Parameter(p.detach().clone()) for p in theirs]
    b, live = cls(theirs, **options), cls(ours, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(live, 0.9)
    other = torch.optim.lr_scheduler.ExponentialLR(b, 0.9)

    def go(optimizer, ps, schedule):
        torch.manual_seed(5)
        for _ in range(3):
            fill_gradients(ps)
            oracles.step(optimizer)
            schedule.step()

    go(b, theirs, other), go(live, ours, scheduler)
    before = {k: v.data_ptr() for k, v in live.state[ours[0]].items() if isinstance(v, torch.Tensor) and v.dim()}
    fused = fusedopt.fuse(live, engine=engine)
    assert type(fused) is getattr(fusedopt, case.optimizer)
    go(b, theirs, other), go(fused, ours, scheduler)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-7)
    for key, address in before.items():
        assert fused.state[ours[0]][key].data_ptr() == address  # no copies were made


def test_fuse_refuses():
    ps = params((3,))
    with pytest.raises(TypeError, match="LBFGS has no fused counterpart"):
        fusedopt.fuse(torch.optim.LBFGS(ps))

    class Mine(torch.optim.AdamW):
        pass

    with pytest.raises(TypeError, match="Mine"):
        fusedopt.fuse(Mine(ps))
    with pytest.raises(TypeError, match="already"):
        fusedopt.fuse(fusedopt.AdamW(ps))
    timm = oracles.find("timm:NAdamW")
    with pytest.raises(ValueError, match="caution"):
        fusedopt.fuse(timm(ps, caution=True))


def test_fuse_takes_options_and_hooks():
    ps = params((3,))
    live = torch.optim.SGD(ps, lr=1.0)
    calls = []
    live.register_step_post_hook(lambda *_: calls.append(1))
    fused = fusedopt.fuse(live, max_grad_norm=1e-3, skip_nonfinite=True)
    ps[0].grad = torch.full((3,), 10.0)
    before = ps[0].detach().clone()
    fused.step()
    assert calls == [1] and (ps[0] - before).norm() < 1.1e-3
    assert BY_NAME["SGD"] and fused.skip_nonfinite
