"""Muon's states, and which parameters of a model it steps."""

import copy

import pytest
import torch
from helpers import assert_same, copies, fill_gradients, params, snapshot

import fusedopt


def built(ps, **options):
    return fusedopt.Muon(ps, lr=0.02, adamw={"lr": 3e-3}, **options)


def fill_even_gradients(ps):
    """Their singular values are near 1, so that the function does not magnify what bfloat16 rounds off."""
    for p in ps:
        p.grad = torch.eye(*p.shape) + 0.05 * torch.randn(p.shape)


def stepped_by_torch(ps, steps=3):
    optimizer = torch.optim.Muon(ps, lr=0.02)
    for _ in range(steps):
        fill_even_gradients(ps)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("how", ["load", "fuse"])
def test_goes_on_where_torchs_was(engine, how):
    """In bfloat16, as torch's: what differs are roundings of the function."""
    torch.manual_seed(0)
    a = params((6, 4), (5, 5))
    theirs = stepped_by_torch(a)
    b = copies(a)
    if how == "load":
        ours = fusedopt.Muon(b, lr=0.02, ns_dtype=torch.bfloat16, engine=engine)
        ours.load_state_dict(theirs.state_dict())
    else:
        live = torch.optim.Muon(b, lr=0.02)
        live.load_state_dict(theirs.state_dict())
        momentum = live.state[b[0]]["momentum_buffer"]
        ours = fusedopt.fuse(live, engine=engine)
        assert ours.state[b[0]]["momentum_buffer"].data_ptr() == momentum.data_ptr() and type(ours) is fusedopt.Muon
    for _ in range(2):
        fill_even_gradients(a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        theirs.step(), ours.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=5e-3)
        momentum = [o.state[x]["momentum_buffer"] for o, x in ((ours, q), (theirs, p))]
        torch.testing.assert_close(*momentum)


def test_torchs_goes_on_where_ours_was(engine):
    torch.manual_seed(0)
    a = params((6, 4), (5, 5))
    ours = fusedopt.Muon(a, lr=0.02, ns_dtype=torch.bfloat16, engine=engine)
    for _ in range(3):
        fill_even_gradients(a)
        ours.step()
    b = copies(a)
    theirs = torch.optim.Muon(b, lr=0.02)
    theirs.load_state_dict(ours.state_dict())
    fill_even_gradients(a)
    for p, q in zip(a, b, strict=True):
        q.grad = p.grad.clone()
    ours.step(), theirs.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-3)
        momentum = [o.state[x]["momentum_buffer"] for o, x in ((ours, p), (theirs, q))]
        torch.testing.assert_close(*momentum)


@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": "8bit", "master": "split"}])
def test_resumes_to_the_last_bit(engine, options):
    dtype = torch.bfloat16 if "master" in options else torch.float32
    torch.manual_seed(0)
    a = params((80, 256), (60,), dtype=dtype)
    more = {**options, "average": fusedopt.EMA(0.9), "gradient_noise": fusedopt.GradientNoise(0.01)}
    one = built(a, engine=engine, **more)
    for t in range(4):
        fill_gradients(a)
        if t == 2:
            b = copies(a)
            other = built(b, engine=engine, **more)
            other.load_state_dict(copy.deepcopy(one.state_dict()))
        for p, q in zip(a, b if t > 1 else (), strict=False):
            q.grad = p.grad.clone()
        one.step()
        if t > 1:
            other.step()
    assert_same(snapshot(one), snapshot(other))
    if options:
        momentum = one.state[a[0]]["momentum_buffer"]
        assert momentum.dtype == (torch.uint8 if "master" in options else torch.bfloat16)


def test_state_may_be_converted(engine):
    ps = params((80, 256), (60,), dtype=torch.bfloat16)
    optimizer = built(ps, engine=engine)
    for change in ({}, {"state_dtype": "8bit"}, {"master": "split"}, {"state_dtype": None, "master": None}):
        fusedopt.convert_state(optimizer, **change)
        for _ in range(2):
            fill_gradients(ps)
            optimizer.step()
    assert list(optimizer.state[ps[0]]) == ["momentum_buffer", "step"]
    assert optimizer.state[ps[0]]["step"] == 8


# ------------------------------------------------------------------------------------------------------------- models


class Model(torch.nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.head = torch.nn.Linear(4, 9, bias=False)
        self.tokens = torch.nn.Embedding(9, 4)
        self.router = torch.nn.Linear(4, 4)
        self.conv = torch.nn.Conv1d(4, 4, 3)
        self.norm = torch.nn.LayerNorm(4)
        self.last = torch.nn.Linear(4, 4)
        if tied:
            self.head.weight = self.tokens.weight

    def names(self, *more, **options):
        groups = fusedopt.muon_groups(self, *more, **options)
        return {group["algorithm"]: {name for name, _ in group["params"]} for group in groups}


def test_groups_of_a_model():
    found = Model().names()
    assert found["muon"] == {"head.weight", "router.weight", "conv.weight"}
    assert found["adamw"] >= {"tokens.weight", "last.weight", "last.bias", "norm.weight", "conv.bias"}
    assert Model().names(adamw=["*router*"])["muon"] == {"head.weight", "conv.weight"}
    assert Model(tied=True).names()["muon"] == {"router.weight", "conv.weight"}
    with pytest.raises(ValueError, match="gate"):
        Model().names(adamw=["gate"])
    with pytest.raises(TypeError, match="Module"):
        fusedopt.muon_groups([])


def test_a_model_may_say_what_its_output_is():
    model = Model()
    model.get_output_embeddings = lambda: model.head
    assert model.names()["muon"] == {"router.weight", "conv.weight", "last.weight"}
    groups = fusedopt.muon_groups(model)
    optimizer = fusedopt.Muon(groups, lr=0.5)
    assert [group["algorithm"] for group in optimizer.param_groups] == ["muon", "adamw"]
    assert fusedopt.muon_groups(torch.nn.LayerNorm(3))[0]["algorithm"] == "adamw"


# ------------------------------------------------------------------------------- what both launches must do, or neither


def test_maximizing_is_minimizing_of_the_opposite(engine):
    torch.manual_seed(0)
    a = params((4, 3), (3,))
    b = copies(a)
    one, other = built(a, maximize=True, engine=engine), built(b, engine=engine)
    for _ in range(3):
        fill_gradients(a)
        for p, q in zip(a, b, strict=True):
            q.grad = -p.grad
        one.step(), other.step()
    assert_same([p.detach() for p in a], [p.detach() for p in b])


@pytest.mark.parametrize("history", [0, 2])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_skipped_step_leaves_matrices_too(engine, history, bad):
    ps = params((4, 3), (3,), (5, 2))
    optimizer = built(ps, skip_nonfinite=True, average=fusedopt.EMA(0.5), engine=engine)
    for _ in range(history):
        fill_gradients(ps)
        optimizer.step()
    for wrong in (0, 1):
        before = snapshot(optimizer)
        fill_gradients(ps)
        ps[wrong].grad.view(-1)[2] = bad
        optimizer.step()
        assert_same(snapshot(optimizer), before)
    assert optimizer.skipped_steps == 2
    fill_gradients(ps)
    optimizer.step()
    assert optimizer.state[ps[0]]["step"] == history + 1 and not torch.equal(ps[0], before[0][0])


def test_what_the_second_launch_cannot_step_is_said_before_the_first(engine):
    """A matrix whose elements share memory: only the second writes it."""
    ps = [*params((4, 3), (3,)), torch.nn.Parameter(torch.ones(1).expand(5, 2))]
    optimizer = built(ps, engine=engine)
    for _ in range(2):
        fill_gradients(ps[:2])
        ps[2].grad = torch.ones(5, 2)
        before = snapshot(optimizer)
        with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 .*overlap"):
            optimizer.step()
        assert_same(snapshot(optimizer), before)


@pytest.mark.parametrize(("key", "value"), [("average", "foo"), ("master", "fp32"), ("algorithm", "<other>")])
def test_options_that_become_wrong_leave_everything(engine, key, value):
    ps = params((6, 4), (5,))
    optimizer = built(ps, engine=engine)
    for _ in range(2):
        fill_gradients(ps)
        optimizer.step()
    before = snapshot(optimizer)
    optimizer.param_groups[0][key] = value
    with pytest.raises((TypeError, ValueError), match=key):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_matrices_have_random_bits_of_their_own(engine):
    """By their number among all parameters, not among the matrices."""
    results = []
    for others in (0, 1):
        torch.manual_seed(0)
        matrix, vector = params((16, 8), (9,), dtype=torch.bfloat16)
        groups = [{"params": [vector], "algorithm": "adamw"}] * others + [{"params": [matrix], "algorithm": "muon"}]
        optimizer = fusedopt.Muon(groups, lr=1e-3, master="stochastic", engine=engine)
        matrix.grad = torch.linspace(-1, 1, 128, dtype=torch.bfloat16).view(16, 8)
        optimizer.step()
        results.append(matrix.detach())
    assert not torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0, atol=2e-2)
