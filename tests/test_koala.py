"""KoalaV and KoalaM: how the loss reaches a step, and what goes on without one. The gate judges their equations."""

import copy
import io

import pytest
import torch
from conftest import AVAILABLE  # noqa: F401 (on ranks, it has to be there first)
from helpers import assert_same, close, copies, fill_gradients, params, snapshot
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import fusedopt

NAMES = ["KoalaV", "KoalaM"]
SHAPES = [(5, 3), (7,), (40, 2)]


def made(name, engine="auto", shapes=SHAPES, dtype=torch.float32, **options):
    parameters = params(*shapes, dtype=dtype)
    return parameters, getattr(fusedopt, name)(parameters, engine=engine, **options)


def step(o, loss=1.5, gradients=True, **more):
    """One with random gradients."""
    if isinstance(o, fusedopt.KoalaM):
        o.predict()
    if gradients:
        fill_gradients([p for group in o.param_groups for p in group["params"]])
    return o.step(loss=loss, **more)


def give(ps, others):
    """The gradients of some to others."""
    for p, q in zip(ps, others, strict=True):
        q.grad = p.grad.clone()


def shared(o, p):
    """The scalars of a parameter that its optimizer's have in common."""
    return {name: float(o.state[p][name]) for name in o.rule.shared}


@pytest.mark.parametrize("name", NAMES)
def test_a_loss_is_asked_for(name):
    ps, o = made(name)
    fill_gradients(ps)
    if name == "KoalaM":
        o.predict()
    before = snapshot(o)
    with pytest.raises(ValueError, match=f"{name} measures the loss"):
        o.step()
    for bad in ("1", torch.ones(2, 2, dtype=torch.complex64), torch.ones(1, dtype=torch.complex64), object()):
        with pytest.raises(TypeError, match="loss is"):
            o.step(loss=bad)
    for bad in (1.0, torch.ones(0), torch.ones(3, dtype=torch.int64)):
        with pytest.raises(TypeError, match="per_sample_loss is"):
            o.step(per_sample_loss=bad)
    assert_same(before, snapshot(o))
    with pytest.raises(ValueError, match=r"r \(group 0\) is -1.0"):
        made(name, r=-1.0)


@pytest.mark.parametrize("name", NAMES)
def test_online_noise_needs_the_losses_of_samples(name, engine):
    ps, o = made(name, engine, r="online", dtype=torch.float64)
    with pytest.raises(ValueError, match="r='online' needs per_sample_loss"):
        step(o)
    fill_gradients(ps)
    o.step(per_sample_loss=torch.tensor([[1.0, 3.0]]))
    assert shared(o, ps[0])["noise"] == pytest.approx(0.9 + 0.1 * 5, rel=1e-6)
    others = copies(ps)
    other = getattr(fusedopt, name)(others, engine=engine, r="online")
    other.load_state_dict(o.state_dict())
    step(o, 2.0, per_sample_loss=torch.tensor([1.0, 3.0]))
    give(ps, others)
    step(other, torch.tensor([1.0, 3.0], requires_grad=True), gradients=False)
    for a, b in zip(ps, others, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_without_a_rate_nothing_moves(name, engine):
    """As checkpoints of torch.distributed make states: a step without a loss, with lr 0 and gradients of 0."""
    ps, o = made(name, engine)
    for group in o.param_groups:
        group["lr"] = 0.0
    for p in ps:
        p.grad = torch.zeros_like(p)
    before = copies(ps)
    o.step(closure=None)
    for p, q in zip(ps, before, strict=True):
        assert torch.equal(p, q)
    start = {**o.defaults, "noise": 1.0, "p00": 0.1, "p10": 0.0, "p11": 0.1, "qw": 0.01, "predictions": 0.0}
    assert shared(o, ps[0]) == pytest.approx({key: start[key] for key in o.rule.shared})


@pytest.mark.parametrize("name", NAMES)
def test_a_closure_gives_the_loss(name, engine):
    (p,), o = made(name, engine, [(4,)])
    (q,) = copies([p])
    other = getattr(fusedopt, name)([q], engine=engine)
    for _ in range(4):

        def closure(x=p, of=o):
            of.zero_grad()
            loss = x.square().sum()
            loss.backward()
            return loss

        loss = o.step(closure)
        if name == "KoalaM":
            other.predict()
        theirs = closure(q, other)
        other.step(loss=theirs.item())
        assert torch.equal(loss, theirs)
    close(p, q, 1e-6)
    assert float(p.detach().norm()) < 1.0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("more", [{}, {"r": "online"}])
def test_resumes_bit_for_bit(name, engine, more):
    ps, o = made(name, engine, weight_decay=0.1, **more)
    samples = torch.rand(6)
    for _ in range(3):
        step(o, per_sample_loss=samples)
    if name == "KoalaM":
        o.predict()  # what was predicted when it was saved is predicted when it is loaded
    file = io.BytesIO()
    torch.save(o.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert not {"loss", "loss_square", "measured"} & saved["param_groups"][0].keys()
    again = copies(ps)
    other = getattr(fusedopt, name)(again, engine=engine, **more)
    other.load_state_dict(saved)
    unpickled, third = copy.deepcopy((o, ps))
    for t in range(3):
        for one in (o, other, unpickled):
            if name == "KoalaM" and t:
                one.predict()
        fill_gradients(ps)
        for these in (again, third):
            give(ps, these)
        for one in (o, other, unpickled):
            one.step(loss=0.7, per_sample_loss=samples)
    for p, q, r in zip(ps, again, third, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(p, r)
        assert shared(o, p) == shared(other, q) == shared(unpickled, r)


@pytest.mark.parametrize("name", NAMES)
def test_all_parameters_share_the_filter(name, engine):
    """Also those that have no gradient, and such as come later."""
    ps, o = made(name, engine, q=0.3)
    step(o)
    late = params((3, 3))
    o.add_param_group({"params": late, "lr": 0.5, "q": 0.3})
    step(o)
    ps[1].grad = None
    step(o, gradients=False)
    found = [shared(o, p) for p in [*ps, *late]]
    assert all(one == found[0] for one in found)
    assert o.state[ps[0]]["step"] == 3
    assert o.state[ps[1]]["step"] == 2


def test_velocities_move_what_is_predicted(engine):
    ps, o = made("KoalaM", engine, [(4,)])
    with pytest.raises(RuntimeError, match="predict"):
        o.step(loss=1.0)
    step(o)
    before, u = ps[0].detach().clone(), o.state[ps[0]]["velocity"].clone()
    assert u.abs().max() > 0
    o.predict()
    close(ps[0], before + u)
    close(o.state[ps[0]]["velocity"], 0.9 * u)
    with pytest.raises(RuntimeError, match="twice"):
        o.predict()


def test_skipped_steps_are_predicted_for(engine):
    """A covariance that was not corrected is predicted as often as the parameters were."""
    ps, o = made("KoalaM", engine, skip_nonfinite=True, dtype=torch.float64)
    step(o)
    o.predict()
    for p in ps:
        p.grad = torch.full_like(p, torch.nan)
    o.step(loss=1.0)
    assert o.skipped_steps == 1
    assert shared(o, ps[0])["predictions"] == 1
    step(o)
    assert shared(o, ps[0])["predictions"] == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_scaler_hands_the_loss_on(name, engine):
    ps, o = made(name, engine)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    others = copies(ps)
    other = getattr(fusedopt, name)(others, engine=engine)
    if name == "KoalaM":
        o.predict()
        other.predict()
    scaler.scale(torch.ones(()))
    fill_gradients(others)
    for p, q in zip(ps, others, strict=True):
        p.grad = 8 * q.grad
    scaler.step(o, loss=2.0)
    other.step(loss=2.0)
    for p, q in zip(ps, others, strict=True):
        close(p, q, 1e-6)


def test_it_learns(engine):
    torch.manual_seed(3)
    for name in NAMES:
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        o = getattr(fusedopt, name)(model.parameters(), engine=engine, r="online")
        x = torch.randn(32, 4)
        seen = []
        for _ in range(12):
            if name == "KoalaM":
                o.predict()
            losses = (model(x) - x[:, :1]).square()
            seen.append(losses.detach().mean())
            o.zero_grad()
            losses.mean().backward()
            o.step(per_sample_loss=losses)
        assert seen[-1] < seen[0] / 2


def sharded(name):
    """Halves of tensors on two ranks are stepped as the whole is by one process."""
    mesh = init_device_mesh("cpu", (2,))
    whole = params((6, 3), (5,))
    parts = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    o, other = (getattr(fusedopt, name)(ps, engine="cpu", weight_decay=0.1) for ps in (parts, whole))
    for _ in range(3):
        step(other)
        for p, q in zip(parts, whole, strict=True):
            p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(0)])
        step(o, gradients=False)
    for p, q in zip(parts, whole, strict=True):
        close(p.full_tensor().detach(), q.detach(), 1e-6)
        assert shared(o, p) == pytest.approx(shared(other, q), rel=1e-5)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("name", NAMES)
def test_shards_are_stepped_as_the_whole(ranks, name):
    ranks.run(2, sharded, name)
