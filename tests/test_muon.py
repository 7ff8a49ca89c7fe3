"""Muon beside AdamW: what its two launches and the function between them do, against torch's and against equations."""

import copy
import gc
import inspect
import weakref

import pytest
import torch
from helpers import assert_same, copies, fill_gradients, params, snapshot

import fusedopt
from fusedopt.engines import ENGINES
from fusedopt.newton_schulz import Iteration, Workspace, orthogonalize
from fusedopt.verification import references

MATRICES = ((16, 8), (8, 16), (12, 12), (12, 12), (1, 9), (9, 1), (6, 2, 3, 3))
OTHERS = ((7,), (), (0,))
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def polar(u, steps=5, eps=1e-7, coefficients=COEFFICIENTS):
    """Newton-Schulz, as its equation is."""
    a, b, c = coefficients
    x = u / u.norm().clamp(min=eps)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + b * s @ x + c * s @ s @ x
    return x


def built(ps, **options):
    return fusedopt.Muon(ps, lr=0.02, adamw={"lr": 3e-3}, **options)


def pair(ps):
    """Torch's two, of parameters of which those of more than two dimensions are flattened."""
    flat = [torch.nn.Parameter(p.detach().flatten(1)) if p.dim() > 2 else p for p in ps]
    muon = torch.optim.Muon([p for p in flat if p.dim() > 1], lr=0.02)
    return flat, (muon, torch.optim.AdamW([p for p in flat if p.dim() < 2], lr=3e-3))


def test_signature_is_torchs():
    theirs, ours = (inspect.signature(of.Muon).parameters for of in (torch.optim, fusedopt))
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)
    for name, p in theirs.items():
        assert ours[name].default == p.default, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
def test_as_near_to_the_truth_as_torchs_pair(engine, dtype):
    """At most twice as far as they are, whatever the function is computed in. The truth is a textbook loop's."""
    torch.manual_seed(0)
    start = params(*MATRICES, *OTHERS)
    ours, theirs = copies(start), copies(start)
    optimizer = built(ours, engine=engine, ns_dtype=dtype)
    flat, others = pair(theirs)
    truth, states = [q.detach().double() for q in flat], [{} for _ in flat]
    said = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for _ in range(12):
        fill_gradients(ours)
        for k, (p, q) in enumerate(zip(ours, flat, strict=True)):
            q.grad = p.grad.view(q.shape).clone()
            truth[k] = references.muon(truth[k], q.grad.double(), states[k], said[id(p)])
        optimizer.step()
        for one in others:
            one.step()
    for are_matrices in (True, False):
        own, theirs = (
            max(
                (x.detach().double().view(r.shape) - r).abs().max()
                for x, r in zip(xs, truth, strict=True)
                if r.numel() and (r.dim() > 1) == are_matrices
            )
            for xs in (ours, flat)
        )
        assert own <= 2 * theirs


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 6])
@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_function_is_that_of_float32_to_rounding(engine, shape, steps):
    """Of one step: at most twice the distance from the truth of the plain form in the same precision."""
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    optimizer = fusedopt.Muon(ps, lr=1.0, ns_steps=steps, ns_dtype=torch.float32, weight_decay=0.0, engine=engine)
    fill_gradients(ps)
    optimizer.step()
    for p in ps:
        u = p.grad.flatten(1)
        u = u.lerp(0.05 * u, 0.95)
        rows, columns = u.shape
        r = max(1.0, rows / columns) ** 0.5
        truth, plain = (r * polar(x, steps) for x in (u.double(), u))
        error, allowed = ((x.double() - truth).norm() / truth.norm() for x in (-p.detach().flatten(1), plain))
        assert error <= 2 * allowed + 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [1, 40])
def test_stacks_are_worked_on_in_parts(monkeypatch, dtype, k):
    """However many at once: the same bits."""
    stack = torch.randn(k, 6, 10, dtype=dtype)
    expected = torch.cat([_one(x, dtype) for x in stack.split(1)])
    for most in (1, 4000, 1 << 24):
        monkeypatch.setitem(fusedopt.newton_schulz.WORKED_ON, "cpu", most)
        torch.testing.assert_close(_one(stack, dtype), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


def _one(stack, dtype):
    here = stack.clone()
    orthogonalize(here, Iteration(COEFFICIENTS, 5, 1e-7, 0.5), Workspace())
    return here


def test_zero_and_tiny_matrices(engine):
    """Nothing is divided by 0: eps is the least length."""
    ps = [torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2)]
    optimizer = built(ps, engine=engine, ns_dtype=torch.float32)
    ps[0].grad, ps[1].grad = torch.zeros(4, 3), torch.full((4, 3), 1e-12)
    optimizer.step()
    torch.testing.assert_close(ps[0].detach(), torch.full((4, 3), 1 - 0.02 * 0.1))
    assert ps[1].isfinite().all()


# ------------------------------------------------------------------------------------------------------------- groups


def test_groups_are_of_one_algorithm():
    ps = params((3, 2), (4,), (2, 2, 2), ())
    optimizer = fusedopt.Muon(
        [(f"p{i}", p) for i, p in enumerate(ps)],
        lr=0.5,
        adamw={"betas": (0.8, 0.9), "weight_decay": 0.3},
        maximize=True,
    )
    matrices, others = optimizer.param_groups
    assert [matrices[k] for k in ("algorithm", "lr", "eps", "weight_decay")] == ["muon", 0.5, 1e-7, 0.1]
    assert [others[k] for k in ("algorithm", "lr", "eps", "weight_decay")] == ["adamw", 1e-3, 1e-8, 0.3]
    assert others["betas"] == (0.8, 0.9) and matrices["maximize"] and others["maximize"]
    assert matrices["param_names"] == ["p0", "p2"] and others["param_names"] == ["p1", "p3"]


def test_groups_say_what_they_are():
    a, b, c, d, e, f = params((3, 2), (3, 2), (4,), (2, 2), (4,), (5,))
    optimizer = fusedopt.Muon(
        [
            {"params": [a], "algorithm": "adamw"},
            {"params": b, "lr": 0.25},
            {"params": [c], "lr": 0.125},
            {"params": [d, e], "adamw": {"lr": 0.75}, "lr": 0.0625},
        ],
        adamw={"lr": 0.5},
    )
    optimizer.add_param_group({"params": [f]})
    found = [(group["algorithm"], group["lr"]) for group in optimizer.param_groups]
    assert found == [
        ("adamw", 0.5), ("muon", 0.25), ("adamw", 0.125), ("muon", 0.0625), ("adamw", 0.75), ("adamw", 0.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"ns_steps": -1}, "ns_steps"),
        ({"ns_steps": 2.5}, "ns_steps"),
        ({"ns_steps": 100}, "ns_steps"),
        ({"ns_coefficients": (1.0, 2.0)}, "ns_coefficients"),
        ({"ns_coefficients": (1.0, 2.0, float("nan"))}, "ns_coefficients"),
        ({"adjust_lr_fn": "spectral"}, "adjust_lr_fn"),
        ({"ns_dtype": torch.int32}, "ns_dtype"),
        ({"adamw": {"momentum": 0.9}}, "adamw has momentum"),
        ({"adamw": {"lr": -1.0}}, "lr of adamw"),
        ({"adamw": {"betas": (0.9, 1.0)}}, r"betas\[1\] of adamw"),
        ({"adamw": 0.1}, "adamw is float"),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(3, 2), (3,)], ids=str)
def test_bad_arguments(options, named, shape):
    with pytest.raises((TypeError, ValueError), match=named):
        fusedopt.Muon(params(shape), **options)


def test_what_is_no_matrix_is_refused_by_name():
    ps = params((3, 2), (4,))
    with pytest.raises(ValueError, match=r"parameter 1 of group 0 \(shape \(4,\).*no real matrix"):
        fusedopt.Muon([{"params": ps, "algorithm": "muon"}])
    z = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="no real matrix"):
        fusedopt.Muon([{"params": [z], "algorithm": "muon"}])
    assert fusedopt.Muon([z]).param_groups[0]["algorithm"] == "adamw"
    with pytest.raises(ValueError, match="algorithm"):
        fusedopt.Muon([{"params": ps, "algorithm": "lion"}])
    optimizer = fusedopt.Muon(ps)
    with pytest.raises(ValueError, match="ns_steps"):
        optimizer.add_param_group({"params": params((2, 2), (2,)), "ns_steps": "five"})
    assert len(optimizer.param_groups) == 2


def test_options_may_change_between_steps(engine):
    """As a new optimizer with them would go on."""
    torch.manual_seed(0)
    a = params((5, 4), (5, 4), (3,))
    b = copies(a)
    one, other = built(a, engine=engine), built(b, engine=engine)
    changes = ({"ns_steps": 3}, {"ns_coefficients": (2.0, -1.5, 0.5)}, {"adjust_lr_fn": "match_rms_adamw"}, {"lr": 0.5})
    for change in ({}, *changes):
        one.param_groups[0].update(change)
        saved = copy.deepcopy(other.state_dict())
        other = built(b, engine=engine)
        other.load_state_dict(saved)
        other.param_groups[0].update(change)
        fill_gradients(a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        one.step(), other.step()
        assert_same(snapshot(one), snapshot(other))


def test_schedulers_move_both(engine):
    ps = params((3, 2), (4,))
    optimizer = built(ps, engine=engine)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    fill_gradients(ps)
    optimizer.step(), schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 1.5e-3]


# --------------------------------------------------------------------------------------------------------------- step


def test_two_launches(monkeypatch, engine):
    """However many shapes there are, and with clipping; the norm is in the first."""
    if engine == "eager":
        pytest.skip("launches nothing")
    plan, runs = ENGINES[engine].plan, []
    name = "launch" if hasattr(plan, "launch") else "step"
    launch = getattr(plan, name)
    monkeypatch.setattr(plan, name, lambda self, *a, **k: runs.append(1) or launch(self, *a, **k))
    ps = params(*MATRICES, *OTHERS)
    optimizer = built(ps, engine=engine, max_grad_norm=1.0)
    for _ in range(3):
        fill_gradients(ps)
        del runs[:]
        optimizer.step()
    assert len(runs) == 2


def test_matrices_without_gradients(engine):
    ps = params((4, 3), (4, 3), (2,), (5, 5))
    optimizer = built(ps, engine=engine)
    for without in (0, 1, 3, None, 2):
        before = [p.detach().clone() for p in ps]
        fill_gradients(ps)
        if without is not None:
            ps[without].grad = None
        optimizer.step()
        for i, (p, q) in enumerate(zip(ps, before, strict=True)):
            assert torch.equal(p, q) == (i == without)


def test_gradients_are_let_go(engine):
    ps = params((4, 3), (2,))
    optimizer = built(ps, engine=engine)
    for _ in range(2):
        fill_gradients(ps)
        held = [weakref.ref(p.grad) for p in ps]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        assert not any(one() is not None for one in held)


def test_parameters_may_move(engine):
    torch.manual_seed(0)
    a = params((4, 3), (2,), (4, 3))
    b = copies(a)
    one, other = built(a, engine=engine), built(b, engine=engine)
    for t in range(4):
        fill_gradients(a)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        if t == 2:
            a[0].data = a[0].data.clone()
            with torch.no_grad():
                a[2].set_(a[2].t().contiguous().t().clone(memory_format=torch.preserve_format))
            a[2].grad = a[2].grad.t().contiguous().t()
        one.step(), other.step()
        assert_same([p.detach().contiguous() for p in a], [p.detach() for p in b])


def test_a_step_that_fails_changes_nothing(engine):
    ps = params((4, 3), (2,), (4, 3))
    optimizer = built(ps, engine=engine)
    for stepped in (False, True):
        fill_gradients(ps)
        if stepped:
            optimizer.step()
        before = snapshot(optimizer)
        for key, value in (("lr", float("nan")), ("momentum", -1.0), ("ns_steps", 2.5), ("weight_decay", -1.0)):
            good = optimizer.param_groups[0][key]
            optimizer.param_groups[0][key] = value
            with pytest.raises((TypeError, ValueError), match=key):
                optimizer.step()
            optimizer.param_groups[0][key] = good
            assert_same(snapshot(optimizer), before)
    ps[2].grad = torch.zeros(4, 3).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(snapshot(optimizer), before)


def test_versions_are_incremented(engine):
    ps = params((4, 3), (2,))
    optimizer = built(ps, engine=engine)
    for _ in range(2):
        versions = [p._version for p in ps]
        fill_gradients(ps)
        optimizer.step()
        assert all(p._version > v for p, v in zip(ps, versions, strict=True))


def test_a_parameter_may_be_given_twice(engine):
    """Torch steps it twice, with the same gradient."""
    torch.manual_seed(0)
    a = params((4, 3))
    b = copies(a)
    with pytest.warns(UserWarning, match="duplicate"):
        one, other = built(a * 2, engine=engine), built(b, engine=engine)
        fill_gradients(a)
    b[0].grad = a[0].grad.clone()
    one.step(), other.step(), other.step()
    torch.testing.assert_close(a[0], b[0])


@pytest.mark.parametrize("kind", ["tensor", "channel", "all"])
def test_rescaled_matrices_have_unit_length(engine, kind):
    ps = params((4, 3), (6, 3), (2,))
    groups = [{"params": ps[:2], "rescale": kind}, {"params": ps[2:]}]
    optimizer = fusedopt.Muon(groups, average=fusedopt.EMA(0.5), engine=engine)
    for _ in range(3):
        fill_gradients(ps)
        optimizer.step()
        lengths = {
            "tensor": torch.stack([p.norm() for p in ps[:2]]),
            "channel": torch.cat([p.norm(dim=1) for p in ps[:2]]),
            "all": torch.cat([p.flatten() for p in ps[:2]]).norm(),
        }
        torch.testing.assert_close(lengths[kind], torch.ones_like(lengths[kind]))


def test_parameters_that_are_no_longer_matrices(engine):
    """As ZeRO makes them of a group's: an error, before anything has changed."""
    ps = params((4, 3), (2,))
    optimizer = built(ps, engine=engine)
    flat = params((12,))
    optimizer.param_groups[0]["params"] = flat
    for _ in range(2):
        fill_gradients([*flat, ps[1]])
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=r"parameter 0 of group 0 .*no real matrix"):
            optimizer.step()
        assert_same(snapshot(optimizer), before)


def test_what_fsdp1_flattened_is_refused():
    flat = params((12,))
    flat[0]._fsdp_flattened = True
    with pytest.raises(ValueError, match="parameter 0 of group 0 .*flattened"):
        fusedopt.Muon(flat)
    assert fusedopt.Muon([{"params": flat, "algorithm": "adamw"}]).param_groups[0]["algorithm"] == "adamw"


def test_autocast_changes_nothing(engine):
    torch.manual_seed(0)
    a = params((8, 6), (6,))
    b = copies(a)
    one, other = built(a, engine=engine), built(b, engine=engine)
    fill_gradients(a)
    for p, q in zip(a, b, strict=True):
        q.grad = p.grad.clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one.step()
    other.step()
    assert_same(snapshot(one), snapshot(other))


def test_matrices_are_not_differentiable():
    ps = params((3, 2), (4,))
    with pytest.raises(ValueError, match=r"differentiable=True is not for matrices .*group 0"):
        fusedopt.Muon(ps, differentiable=True)
    assert fusedopt.Muon(ps[1:], differentiable=True).param_groups[0]["differentiable"]
