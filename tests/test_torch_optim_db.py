"""Torch's own list of what its optimizers take and refuse, put to our classes of the same names.

It ships in torch's wheel (torch.testing._internal.common_optimizers). ``DIFFERENCES`` are all that are known, each with
its reason; one that is none any more fails, too.
"""

import copy
import io
import pickle
import re
import warnings
from functools import cache

import numpy as np
import pytest
import torch
from helpers import close

import fusedopt

common = pytest.importorskip("torch.testing._internal.common_optimizers", reason="this torch does not ship its list")

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning", "ignore:Note that in CPU")

TENSOR_WITH_FOREACH = "torch's foreach=True is another implementation, which cannot; here it chooses nothing"
MIXED_BETAS = "numbers and tensors can be read in any mixture"
DIFFERENCES = {
    **{
        (name, desc): reason
        for name in ("Adam", "AdamW")
        for desc, reason in {
            "lr as Tensor doesn't work with foreach & not capturable": TENSOR_WITH_FOREACH,
            r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": TENSOR_WITH_FOREACH,
            "betas must be either both floats or both Tensors": MIXED_BETAS,
        }.items()
    },
}
NOT_OURS = {
    "Adafactor": "its state is factored: other kernels",
    "LBFGS": "it evaluates the model many times in a step",
    "Muon": "torch's refuses what is no matrix; test_muon.py",
    "SparseAdam": "SGD and Adagrad take sparse gradients; Adam's momenta move all elements",
}
INFOS = {info.name: info for info in common.optim_db}
SHAPES = ((3, 4), (5,), (), (0, 2), (2, 1, 3))


@cache
def inputs(name):
    """Arguments by description."""
    return {i.desc: i.kwargs for i in INFOS[name].optim_inputs_func(device="cpu")}


OURS = sorted(INFOS.keys() - NOT_OURS.keys())
each_input = pytest.mark.parametrize(("name", "desc"), [(name, desc) for name in OURS for desc in inputs(name)])
each = pytest.mark.parametrize("name", OURS)


def model(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def closure_of(optimizer, t=0):
    """Losses of all parameters, and their gradients: of other targets in each step."""

    def closure():
        optimizer.zero_grad()
        loss = torch.zeros(())
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                target = torch.full((), 0.3 * i - 0.1 * t)
                loss = loss + ((p - target).abs().pow(3).sum() + p.abs().sum()).float()
        loss.backward()
        return loss

    return closure


def train(optimizer, steps=5, schedules=()):
    losses = []
    for t in range(steps):
        losses.append(optimizer.step(closure_of(optimizer, t)).detach())
        for schedule in schedules:
            takes_loss = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
            schedule.step(losses[-1]) if takes_loss else schedule.step()
    return torch.stack(losses)


def pair(name, params, others=None, **kwargs):
    """Our optimizer and torch's, of equal parameters."""
    others = copy.deepcopy(params) if others is None else others
    kwargs = copy.deepcopy(kwargs)
    return getattr(fusedopt, name)(params, **kwargs), getattr(torch.optim, name)(others, foreach=False, **kwargs)


def parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same_training(a, b, tolerance=2e-6):
    close(train(a), train(b), tolerance)
    for p, q in zip(parameters(a), parameters(b), strict=True):
        close(p, q, tolerance)


def test_every_class_of_the_list_is_ours_or_said_not_to_be():
    assert {name for name in INFOS if hasattr(fusedopt, name)} == {*OURS, "Muon"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@each_input
def test_trains_as_torchs(name, desc, dtype):
    if dtype.is_complex and not INFOS[name].supports_complex:
        pytest.skip("torch's takes no complex parameters")
    assert_same_training(*pair(name, model(dtype), **inputs(name)[desc]))


@each_input
def test_saves_and_resumes_both_ways(name, desc):
    kwargs = inputs(name)[desc]
    a, b = pair(name, model(), **kwargs)
    train(a, 3), train(b, 3)
    c, d = pair(name, copy.deepcopy(parameters(a)), copy.deepcopy(parameters(b)), **kwargs)
    stored = io.BytesIO()
    torch.save(a.state_dict(), stored)
    stored.seek(0)
    d.load_state_dict(torch.load(stored, weights_only=True))
    c.load_state_dict(b.state_dict())
    e, f = copy.deepcopy(a), pickle.loads(pickle.dumps(a))
    for other in (b, c, d, e, f):
        train(other, 3)
    train(a, 3)
    for other in (b, c, d):
        for p, q in zip(parameters(a), parameters(other), strict=True):
            close(p, q)
    for other in (e, f):
        assert all(map(torch.equal, parameters(a), parameters(other)))


@each_input
def test_loads_what_older_versions_saved(name, desc):
    """Without the flags that came later."""
    kwargs = inputs(name)[desc]
    if any(flag in kwargs for flag in INFOS[name].not_og_supported_flags):
        pytest.skip("it is about one of these flags")
    a, b = pair(name, model(), **kwargs)
    for optimizer in (a, b):
        train(optimizer, 2)
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            for flag in INFOS[name].not_og_supported_flags:
                group.pop(flag, None)
        optimizer.load_state_dict(saved)
        optimizer.__setstate__({"param_groups": optimizer.param_groups, "state": optimizer.state})
    assert_same_training(a, b)


@each
def test_steps_counted_in_python_are_loaded(name):
    """As the oldest versions have saved them."""
    a, b = pair(name, model())
    for optimizer in (a, b):
        train(optimizer, 2)
        saved = copy.deepcopy(optimizer.state_dict())
        for state in saved["state"].values():
            if "step" in state:
                state["step"] = float(state["step"])
        optimizer.load_state_dict(saved)
    assert_same_training(a, b)


def _schedules(name):
    return [(name, i) for i in range(len(INFOS[name].scheduler_inputs))]


@pytest.mark.parametrize(("name", "which"), [case for name in OURS for case in _schedules(name)])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_schedules(name, which, as_tensor):
    a, b = pair(name, model())
    for optimizer in (a, b):
        rate = 0.05
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(rate) if as_tensor and optimizer is a else rate
    schedules = [[make(optimizer) for make in INFOS[name].scheduler_inputs[which]] for optimizer in (a, b)]
    close(train(a, 12, schedules[0]), train(b, 12, schedules[1]), 1e-5)
    close(torch.tensor(float(a.param_groups[0]["lr"])), torch.tensor(b.param_groups[0]["lr"]))


@each
def test_groups_with_options_of_their_own(name):
    def groups():
        ps = model()
        weight_decay = {} if name == "Rprop" else {"weight_decay": 0.1}
        return [
            {"params": ps[:2], "lr": 0.05, **weight_decay},
            {"params": ps[2:4]},
            {"params": ps[4], "maximize": True},
        ]

    assert_same_training(*pair(name, groups(), groups(), lr=0.01))


@each
def test_parameters_of_several_dtypes(name):
    dtypes = torch.float32, torch.float64, torch.complex64
    a, b = pair(name, *([*model(), *model(torch.float64), *model(torch.complex64)] for _ in range(2)))
    assert {p.dtype for p in parameters(a)} == {*dtypes}
    assert_same_training(a, b)


@each
@pytest.mark.parametrize("value", [None, False, True])
@pytest.mark.parametrize("flag", ["foreach", "fused", "differentiable"])
def test_flags_that_choose_an_implementation(name, flag, value):
    a = getattr(fusedopt, name)(model(), **{flag: bool(value) if flag == "differentiable" else value})
    assert a.param_groups[0][flag] is (bool(value) if flag == "differentiable" else value)
    if flag != "differentiable":
        assert_same_training(a, getattr(torch.optim, name)(model(), foreach=False))


@cache
def inputs_on_gpus(name):
    """What torch's list has for GPUs alone, where steps can be captured."""
    return {i.desc: i.kwargs for i in INFOS[name].optim_inputs_func(device="cuda") if i.desc not in inputs(name)}


@pytest.mark.parametrize(("name", "desc"), [(name, desc) for name in OURS for desc in inputs_on_gpus(name)])
def test_capturable_trains_as_without(name, desc):
    kwargs = dict(inputs_on_gpus(name)[desc])
    a = getattr(fusedopt, name)(model(), **kwargs)
    assert kwargs.pop("capturable") is True
    assert_same_training(a, getattr(torch.optim, name)(model(), foreach=False, **kwargs))


@each
def test_nothing_moves_without_a_gradient(name):
    found = []
    for make in (getattr(fusedopt, name), getattr(torch.optim, name)):
        ps = model()
        optimizer = make(ps)
        optimizer.step()
        before = [p.detach().clone() for p in ps]
        ps[0].grad = torch.zeros_like(ps[0])
        optimizer.step()
        moved = [not torch.equal(p, was) for p, was in zip(ps, before, strict=True)]
        assert not any(moved[1:])
        assert set(optimizer.state[ps[1]]) == (set(optimizer.state[ps[0]]) if name == "Adagrad" else set())
        found.append(moved[0])
    assert found[0] == found[1]  # some decay


@each
def test_the_state_has_torchs_names_types_and_shapes(name):
    a, b = pair(name, model())
    train(a, 2), train(b, 2)
    for p, q in zip(parameters(a), parameters(b), strict=True):
        ours, theirs = ({k: v for k, v in o.state[r].items() if v is not None} for o, r in ((a, p), (b, q)))
        assert ours.keys() == theirs.keys()
        assert all(ours[k].shape == v.shape and ours[k].dtype == v.dtype for k, v in theirs.items())


@each
@pytest.mark.parametrize("module", [fusedopt, torch.optim], ids=["ours", "theirs"])
def test_hooks(name, module):
    optimizer, seen = getattr(module, name)(model()), []

    def loading(_, saved):
        seen.append("loads")
        return {key: saved[key] for key in saved if key != "more"}

    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: seen.append("saves"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(loading)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    train(optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saves", "loads", "loaded"]


KINDS = {
    "float": lambda v: v,
    "float32": np.float32,
    "float64": np.float64,
    "array of none": np.array,
    "array of one": lambda v: np.array([v]),
    "tensor": lambda v: torch.tensor(v, dtype=torch.float64),
    "tensor of one": lambda v: torch.tensor([v], dtype=torch.float64),
}
PAIRS = {
    "list": list,
    "array": np.array,
    "tensor": lambda v: torch.tensor(v, dtype=torch.float64),
    "float64s": lambda v: tuple(map(np.float64, v)),
    "tensors": lambda v: tuple(torch.tensor(x, dtype=torch.float64) for x in v),
}


@each
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_every_kind(name, kind):
    """Of which torch takes most, some by chance."""
    numbers = {k: v for k, v in getattr(fusedopt, name)(model()).defaults.items() if type(v) is float}
    ours = getattr(fusedopt, name)(model(), **{key: KINDS[kind](value) for key, value in numbers.items()})
    assert_same_training(ours, getattr(torch.optim, name)(model(), foreach=False))


@each
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_of_every_kind(name, kind):
    pairs = {k: v for k, v in getattr(fusedopt, name)(model()).defaults.items() if isinstance(v, tuple)}
    if not pairs:
        pytest.skip("it has none")
    ours = getattr(fusedopt, name)(model(), **{key: PAIRS[kind](value) for key, value in pairs.items()})
    theirs = getattr(torch.optim, name)(model(), foreach=False)
    assert_same_training(ours, theirs)
    if kind == "tensor":
        for key in pairs:
            ours.param_groups[0][key] = PAIRS[kind](theirs.param_groups[0][key])
        assert_same_training(ours, theirs)
    ours.load_state_dict(copy.deepcopy(ours.state_dict()))


@pytest.mark.parametrize("wrong", [np.array([0.9, 0.9, 0.9]), torch.zeros(3), "ab", np.array([2.0, 0.9])])
def test_what_is_no_pair(wrong):
    with pytest.raises((TypeError, ValueError), match=r"betas.*group 0.*must"):
        fusedopt.AdamW(model(), betas=wrong)


@pytest.mark.parametrize("name", [name for name in OURS if INFOS[name].supports_sparse])
@pytest.mark.parametrize("maximize", [False, True])
def test_sparse_gradients(name, maximize):
    """Rosenbrock's function of two numbers, of whose gradient a step has one half."""
    kwargs, schedules = INFOS[name].metadata_for_sparse

    def trained(make):
        x = torch.nn.Parameter(torch.tensor([1.5, 1.5]))
        optimizer = make([x], **{**kwargs, "maximize": maximize})
        made = [schedule(optimizer) for schedule in schedules]
        for t in range(60):
            a, b = x.detach().tolist()
            slope = torch.tensor([-400 * a * (b - a * a) - 2 * (1 - a), 200 * (b - a * a)])[t % 2] * (
                -1 if maximize else 1
            )
            index = torch.tensor([[t % 2, t % 2]])
            x.grad = torch.sparse_coo_tensor(index, torch.stack([slope / 4, slope - slope / 4]), (2,))
            loss = (1 - a) ** 2 + 100 * (b - a * a) ** 2
            optimizer.step()
            for schedule in made:
                takes_loss = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
                schedule.step(loss) if takes_loss else schedule.step()
        return x.detach()

    ours, theirs = trained(getattr(fusedopt, name)), trained(getattr(torch.optim, name))
    close(ours, theirs, 1e-4)
    assert not torch.equal(ours, torch.tensor([1.5, 1.5]))


ERRORS = {name: INFOS[name].optim_error_inputs_func("cpu", torch.float32) for name in OURS}


@pytest.mark.parametrize(("name", "which"), [(name, i) for name in OURS for i in range(len(ERRORS[name]))])
def test_errors(name, which):
    """Of the same type; with torch's words, or ours, which name the argument, its group and what it may be."""
    case = ERRORS[name][which]
    wanted, at = case.optimizer_error_input, case.error_on
    params = model() if wanted.params is None else wanted.params

    def run(module):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            optimizer = getattr(module, name)(params, **wanted.kwargs)
            if at == common.OptimizerErrorEnum.STEP_ERROR:
                train(optimizer, 1)

    with pytest.raises(case.error_type, match=case.error_regex):
        run(torch.optim)
    if (name, wanted.desc) in DIFFERENCES:
        return run(fusedopt)
    with pytest.raises(case.error_type) as raised:
        run(fusedopt)
    said = str(raised.value)
    wrong = list(wanted.kwargs)[-1] if wanted.kwargs else None
    assert re.search(case.error_regex, said) or (wrong and wrong in said and "group 0" in said and "must" in said)


def test_no_difference_is_listed_that_the_list_does_not_have():
    assert {*DIFFERENCES} <= {(name, case.optimizer_error_input.desc) for name in OURS for case in ERRORS[name]}


@pytest.mark.parametrize("name", [name for name in OURS if "fused" in INFOS[name].supported_impls])
def test_fused_on_a_device_without_memory(name):
    for module in (torch.optim, fusedopt):
        p = torch.nn.Parameter(torch.ones(2, device="meta"))
        p.grad = torch.ones(2, device="meta")
        with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be"):
            getattr(module, name)([p], fused=True).step()
        getattr(module, name)([p], fused=False).step()
