"""Bad input gives one clear error that names the argument or tensor, and changes nothing."""

import copy
import inspect
import math

import pytest
import torch
from conftest import AVAILABLE, engine_fixture
from helpers import ALL, assert_same, fill_gradients, params, snapshot

import fusedopt
from fusedopt import planner

engine = engine_fixture(AVAILABLE, in_python=True)

NAN = float("nan")
BAD = [
    ({"lr": -1.0}, "lr"),
    ({"lr": NAN}, "lr"),
    ({"lr": math.inf}, "lr"),
    ({"lr": "fast"}, "lr"),
    ({"lr": torch.ones(2)}, "lr"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"weight_decay": NAN}, "weight_decay"),
    ({"betas": 0.9}, "betas"),
    ({"betas": (0.9,)}, "betas"),
    ({"eps": -1e-8}, "eps"),
    ({"momentum": -0.9}, "momentum"),
    ({"dampening": NAN}, "dampening"),
    ({"alpha": -0.1}, "alpha"),
    ({"lr_decay": -1.0}, "lr_decay"),
    ({"initial_accumulator_value": -1.0}, "initial_accumulator_value"),
    ({"momentum_decay": -1.0}, "momentum_decay"),
    ({"rho": 1.1}, "rho"),
    ({"lambd": -1e-4}, "lambd"),
    ({"t0": NAN}, "t0"),
    ({"etas": (0.0, 1.2)}, r"etas\[0\]"),
    ({"etas": (1.0, 1.2)}, r"etas\[0\]"),
    ({"etas": (0.5, 1.0)}, r"etas\[1\]"),
    ({"etas": 0.5}, "etas"),
    ({"step_sizes": (-1e-6, 50)}, r"step_sizes\[0\]"),
    ({"step_sizes": (1e-6, NAN)}, r"step_sizes\[1\]"),
    ({"step_sizes": (1e-6,)}, "step_sizes"),
    ({"final_lr": -1.0}, "final_lr"),
    ({"gamma": 0.0}, "gamma"),
    ({"gamma": 1.0}, "gamma"),
    ({"max_grad_norm": -1.0}, "max_grad_norm"),
    ({"max_grad_norm": NAN}, "max_grad_norm"),
    ({"max_grad_norm": 0}, "max_grad_norm"),
    ({"skip_nonfinite": "yes"}, "skip_nonfinite"),
    ({"handles_amp": "no"}, "handles_amp"),
    ({"engine": "gpu"}, "engine"),
    ({"fused": True, "foreach": True}, "fused"),
    ({"fused": True, "differentiable": True}, "fused"),
]


def accepts(name, option):
    return option in inspect.signature(getattr(fusedopt, name).__init__).parameters


BETAS = [((1.0, 0.9), 0), ((0.9, 1.0), 1), ((-0.1, 0.9), 0), ((0.9, NAN), 1)]  # and which of them is wrong


def bad(name):
    """What a class must not take of the options it has; betas of three where it has three."""
    has_three = accepts(name, "betas") and len(getattr(fusedopt, name)(params((3,))).defaults["betas"]) == 3
    betas = [((*two, 0.9) if has_three else two, rf"betas\[{wrong}\]") for two, wrong in BETAS]
    more = [((0.9, 0.99), "three numbers"), ((0.9, 0.99, 1.0), r"betas\[2\]")] if has_three else []
    return [*BAD, *(({"betas": value}, named) for value, named in betas + more)]


BAD_ARGUMENTS = [(n, o, named) for n in ALL for o, named in bad(n) if all(accepts(n, option) for option in o)]


@pytest.mark.parametrize(("name", "options", "named"), BAD_ARGUMENTS, ids=str)
def test_bad_argument(name, options, named):
    with pytest.raises((ValueError, TypeError), match=named):
        getattr(fusedopt, name)(params((3,)), **options)
    ps = params((3,), (2,))
    if not options.keys() & {"max_grad_norm", "skip_nonfinite", "handles_amp", "engine"}:
        with pytest.raises((ValueError, TypeError), match=named):
            getattr(fusedopt, name)([{"params": ps[:1]}, {"params": ps[1:], **options}])


def test_nesterov_needs_momentum():
    with pytest.raises(ValueError, match="nesterov"):
        fusedopt.SGD(params((3,)), nesterov=True)
    with pytest.raises(ValueError, match="nesterov"):
        fusedopt.SGD(params((3,)), momentum=0.9, dampening=0.1, nesterov=True)
    with pytest.raises(ValueError, match="nesterov"):
        fusedopt.SGD([{"params": params((3,)), "nesterov": True}])


def test_adabound_needs_a_base():
    with pytest.raises(ValueError, match="base_lr"):
        fusedopt.AdaBound(params((3,)), lr=0.0)


def test_duplicate_parameter():
    (p,) = params((3, 2))
    with pytest.warns(UserWarning, match="duplicate"):  # torch's; what becomes of it: test_shared_memory.py
        fusedopt.AdamW([p, p])
    with pytest.raises(ValueError, match="group 1 is also parameter 0 of group 0"):
        fusedopt.AdamW([{"params": [p]}, {"params": [p]}])
    optimizer = fusedopt.AdamW([p])
    with pytest.raises(ValueError, match="group 0"):
        optimizer.add_param_group({"params": [p]})
    assert len(optimizer.param_groups) == 1


def test_bad_group_is_not_added():
    optimizer = fusedopt.AdamW(params((3,)))
    with pytest.raises(ValueError, match="lr"):
        optimizer.add_param_group({"params": params((2,)), "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "bad",
    [[{"params": set(params((1,)))}], [torch.nn.Module()], [], torch.ones(3)],
    ids=["set", "module", "empty", "tensor"],
)
def test_bad_params(bad):
    with pytest.raises((TypeError, ValueError)):
        fusedopt.AdamW(bad)


def stepped(engine, *, steps=2, **options):
    """An optimizer with a history, whose second parameter is about to get a bad gradient."""
    ps = params((4, 3), (5, 2), (6,))
    optimizer = fusedopt.AdamW(ps, engine=engine, **options)
    for _ in range(steps):
        fill_gradients(ps)
        optimizer.step()
    fill_gradients(ps)
    return ps, optimizer


def sparse(p):
    p.grad = torch.eye(5)[:, :2].to_sparse()


def moved(convert):
    def spoil(p):
        p.data = convert(p.data)

    return spoil


BAD_GRADIENTS = [
    (sparse, "sparse"),
    (moved(lambda t: t.double()), "dtype"),
    (moved(lambda t: t[:3]), "shape"),
    (moved(lambda t: t.reshape(2, 5)), "shape"),
    (moved(lambda t: t.t()), "shape"),
]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(("spoil", "named"), BAD_GRADIENTS, ids=["sparse", "dtype", "slice", "reshape", "transpose"])
def test_bad_gradient(engine, spoil, named, steps, clip):
    ps, optimizer = stepped(engine, steps=steps, max_grad_norm=clip)
    others = [ps[0], ps[2]]
    before = [p.detach().clone() for p in others], [dict(optimizer.state.get(p, {})) for p in ps], ps[1].data.clone()
    counts = [optimizer.state[p]["step"].clone() if steps else None for p in ps]
    old = ps[1].data
    spoil(ps[1])
    with pytest.raises(RuntimeError, match=rf"parameter 1 of group 0.*{named}") as caught:
        optimizer.step()
    assert "\n" not in str(caught.value)
    for p, q in zip(others, before[0], strict=True):
        assert torch.equal(p, q)
    if not steps:
        assert not optimizer.state
    ps[1].data = old
    fill_gradients(ps)
    for p, n in zip(ps, counts, strict=True):
        assert not steps or torch.equal(optimizer.state[p]["step"], n)
    optimizer.step()  # and all is well again


class Elsewhere(torch.nn.Parameter):
    """torch keeps gradients on the parameter's device; a subclass may not."""

    @property
    def grad(self):
        return torch.ones(self.shape, device="meta")


def test_gradient_of_another_device(engine):
    odd, p = Elsewhere(torch.ones(3)), params((2,))[0]
    fill_gradients([p])
    before = p.detach().clone()
    optimizer = fusedopt.AdamW([p, odd], engine=engine)
    with pytest.raises(RuntimeError, match="parameter 1 of group 0.*gradient is on meta, the parameter on cpu"):
        optimizer.step()
    assert torch.equal(p, before) and not optimizer.state


def test_parameter_that_no_engine_steps(engine):
    fixed, p = torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False), params((3,))[0]
    optimizer = fusedopt.SGD([fixed, p], engine=engine)
    for _ in range(2):  # it may stand by as long as it has no gradient
        fill_gradients([p])
        optimizer.step()
    before = p.detach().clone()
    fixed.grad = torch.ones(2, dtype=torch.int64)
    with pytest.raises(TypeError, match="parameter 0 of group 0.*int64"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("lr", NAN, "lr"),
        ("lr", -1.0, "lr"),
        ("betas", (0.9, 1.0), r"betas\[1\]"),
        ("betas", None, "betas"),
        ("eps", "small", "eps"),
        ("weight_decay", NAN, "weight_decay"),
    ],
)
def test_bad_value_while_training(engine, key, value, named):
    ps, optimizer = stepped(engine)
    before = snapshot(optimizer)
    good = optimizer.param_groups[0][key]
    optimizer.param_groups[0][key] = value
    with pytest.raises((ValueError, TypeError), match=named):
        optimizer.step()
    assert_same(snapshot(optimizer), before)
    optimizer.param_groups[0][key] = good
    optimizer.step()


def test_lr_may_end_a_rounding_error_below_zero(engine):
    ps, optimizer = stepped(engine)
    optimizer.param_groups[0]["lr"] = -1e-19
    optimizer.step()


def test_overlapping_parameter(engine):
    p = torch.nn.Parameter(torch.zeros(1).expand(4))
    optimizer = fusedopt.SGD([p], engine=engine)
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="overlap"):
        optimizer.step()


def test_engine_that_cannot_step_a_parameter():
    if "cpu" not in [e for e in fusedopt.engines.ENGINES if fusedopt.engines.ENGINES[e].available() is None]:
        pytest.skip("the CPU engine is not built")
    with pytest.raises(ValueError, match="differentiable"):
        fusedopt.SGD(params((3,)), differentiable=True, engine="cpu")
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = fusedopt.SGD([p], engine="cpu")
    p.grad = torch.zeros(3, device="meta")
    with pytest.raises(RuntimeError, match="parameter 0 of group 0.*meta"):
        optimizer.step()


def bad_states(saved):
    def changed(change):
        state = copy.deepcopy(saved)
        change(state)
        return state

    yield "shape", changed(lambda s: s["state"][1].update(exp_avg=torch.zeros(7))), "exp_avg.*parameter 1.*shape"
    yield "missing", changed(lambda s: s["state"][1].pop("exp_avg_sq")), "parameter 1.*lacks exp_avg_sq"
    yield "not a tensor", changed(lambda s: s["state"][1].update(exp_avg=[1.0])), "exp_avg.*parameter 1"
    yield "step", changed(lambda s: s["state"][1].update(step="three")), "step.*parameter 1"
    yield "step shape", changed(lambda s: s["state"][1].update(step=torch.zeros(2))), "step.*parameter 1"
    yield "groups", changed(lambda s: s["param_groups"].append(s["param_groups"][0])), "2 param groups"
    yield "sizes", changed(lambda s: s["param_groups"][0]["params"].pop()), "has 2 parameters"
    yield "hyper", changed(lambda s: s["param_groups"][0].update(betas=(0.9, 2.0))), "betas"
    yield "empty", {}, "no 'state'"
    yield (
        "dtype",
        changed(lambda s: s["state"][1].update(exp_avg=torch.zeros(5, 2, dtype=torch.int32))),
        "exp_avg.*parameter 1",
    )


@pytest.mark.parametrize(
    "kind", ["shape", "missing", "not a tensor", "step", "step shape", "groups", "sizes", "hyper", "empty", "dtype"]
)
def test_bad_state_dict(engine, kind):
    ps, optimizer = stepped(engine)
    state, named = {k: (s, n) for k, s, n in bad_states(optimizer.state_dict())}[kind]
    before = snapshot(optimizer)
    with pytest.raises((ValueError, TypeError), match=named):
        optimizer.load_state_dict(state)
    assert_same(snapshot(optimizer), before)
    optimizer.step()


def test_state_of_another_optimizer(engine):
    ps, lion = params((3,)), None
    lion = fusedopt.Lion(ps, engine=engine)
    fill_gradients(ps)
    lion.step()
    with pytest.raises(ValueError, match="lacks"):
        fusedopt.AdamW(params((3,)), engine=engine).load_state_dict(lion.state_dict())


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("exp_avg", torch.zeros(7), "exp_avg.*parameter 1.*shape"),
        ("exp_avg", torch.zeros(5, 2, dtype=torch.int64), "exp_avg.*parameter 1.*dtype"),
        ("exp_avg_sq", torch.zeros(5, 2, device="meta"), "exp_avg_sq.*parameter 1.*meta"),
        ("exp_avg_sq", torch.zeros(1).expand(5, 2), "exp_avg_sq.*parameter 1.*memory"),
        ("exp_avg", 3.0, "exp_avg.*parameter 1.*float"),
        ("step", "many", "step.*parameter 1"),
    ],
    ids=str,
)
def test_bad_state_entry(engine, key, value, named):
    ps, optimizer = stepped(engine)
    good = optimizer.state[ps[1]][key]
    optimizer.state[ps[1]][key] = value
    before = [p.detach().clone() for p in ps]
    with pytest.raises((ValueError, RuntimeError, TypeError), match=named):
        optimizer.step()
    assert_same([p.detach() for p in ps], before)
    optimizer.state[ps[1]][key] = good
    optimizer.step()


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor([7.0])], ids=str)
def test_any_step_counter_is_understood(engine, step):
    ps, optimizer = stepped(engine)
    optimizer.state[ps[1]]["step"] = step
    optimizer.step()
    assert optimizer.state[ps[1]]["step"] == 8 and optimizer.state[ps[0]]["step"] == 3


@pytest.mark.parametrize("bad", [-1.0, NAN, 0, "much"])
def test_bad_max_grad_norm_while_training(engine, bad):
    ps, optimizer = stepped(engine)
    before = snapshot(optimizer)
    optimizer.max_grad_norm = bad
    with pytest.raises((ValueError, TypeError), match="max_grad_norm"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_no_memory_for_states(engine, monkeypatch):
    ps = params((4,), (5,))
    fill_gradients(ps)
    optimizer = fusedopt.SGD(ps, lr=0.1, momentum=0.9, dampening=0.5, engine=engine)
    make = planner.initial_state

    def fail_at_second(rule, p, group):
        if p is ps[1]:
            raise MemoryError("no memory")
        return make(rule, p, group)

    before = [p.detach().clone() for p in ps]
    with monkeypatch.context() as patch:
        patch.setattr(planner, "initial_state", fail_at_second)
        with pytest.raises(MemoryError):
            optimizer.step()
    assert not optimizer.state and all(torch.equal(p, q) for p, q in zip(ps, before, strict=True))
    optimizer.step()
    for p in ps:  # a first step: the buffer is the whole gradient
        assert torch.equal(optimizer.state[p]["momentum_buffer"], p.grad)


def odd(tensor):
    """The same numbers at an address that is not a multiple of their size."""
    memory = bytearray(tensor.numel() * 4 + 8)
    moved = torch.frombuffer(memory, dtype=torch.float32, offset=2, count=tensor.numel())
    return moved.copy_(tensor)


@pytest.mark.parametrize("steps", [0, 2])
def test_misaligned_gradient(engine, steps):
    ps, optimizer = stepped(engine, steps=steps)
    before = snapshot(optimizer)
    p = next(p for p in ps if p.dim() == 1 and p.numel())
    p.grad = odd(p.detach())
    with pytest.raises(RuntimeError, match="not a multiple of its elements' size"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_misaligned_parameter(engine):
    p = torch.nn.Parameter(odd(torch.randn(9)))
    p.grad = torch.ones(9)
    optimizer = fusedopt.AdamW([p], engine=engine)
    if engine == "eager":
        return optimizer.step()
    with pytest.raises(RuntimeError, match="not a multiple of its elements' size"):
        optimizer.step()
