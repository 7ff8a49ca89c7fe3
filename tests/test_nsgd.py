"""NSGD: what its hooks measure, and what a step makes of it. The truth are loops in numpy over the description."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import AVAILABLE  # noqa: F401 (on ranks, it has to be there first)
from helpers import close, copies, fill_gradients, params
from torch import nn

import fusedopt


def model(dtype=torch.float64):
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, groups=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 25, 5), nn.LayerNorm(5)
    ).to(dtype)


def inputs(dtype=torch.float64, n=7):
    return torch.randn(n, 4, 5, 5, dtype=dtype)


def back(of, x):
    of.zero_grad()
    of(x).square().mean().backward()


def vectors(layer, x):
    """The inputs of a layer, a row for each sample and position."""
    x = x.detach().double().numpy()
    return x if isinstance(layer, nn.Linear) else np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])


def power(layer, x, norm, granularity):
    """By the description: the mean over samples and positions."""
    rows = [np.abs(v) if norm == "l1" else v**2 for v in vectors(layer, x)]
    mean = np.mean(rows, 0)
    return mean.sum() if granularity == "layer" else mean


def divided(layer, denominator):
    """What a weight is divided by, element by element."""
    w = layer.weight.detach().double().numpy()
    if np.ndim(denominator) == 0:
        return np.full_like(w, denominator)
    out = np.empty_like(w)
    n_groups = getattr(layer, "groups", 1)
    for o in range(w.shape[0]):
        for i in range(w.shape[1]):
            out[o, i] = denominator[o // (w.shape[0] // n_groups) * w.shape[1] + i]
    return out


@pytest.mark.parametrize("more", [{}, {"log": True, "eps": 0.3}, {"power_beta": 0.7}], ids=str)
@pytest.mark.parametrize("granularity", ["layer", "in_channel"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_step_of_the_description(engine, norm, granularity, more):
    of, lr, momentum, decay = model(), 0.1, 0.5, 0.01
    o = fusedopt.NSGD(of, lr, momentum, weight_decay=decay, norm=norm, granularity=granularity, engine=engine, **more)
    eps, beta = more.get("eps", 1e-2), more.get("power_beta")
    buffers, running = {}, {}
    for t in range(1, 4):
        batches = [inputs(), inputs(n=2)]  # gradients of two are accumulated
        seen = [torch.cat([part.reshape(-1, *part.shape[1:]) for part in batches])]
        with torch.no_grad():
            seen.append(of[:3](seen[0]))
            of(100 * inputs())  # not seen: nothing learns from it
        of.zero_grad()
        for x in batches:
            of(x).square().mean().backward()
        before = {name: p.detach().clone().numpy() for name, p in of.named_parameters()}
        grads = {name: p.grad.clone().numpy() for name, p in of.named_parameters()}
        o.step()
        for name, p in of.named_parameters():
            g = grads[name] + decay * before[name]
            buffers[name] = b = momentum * buffers[name] + g if name in buffers else g
            if name in ("0.weight", "3.weight"):
                layer = of[int(name[0])]
                P = power(layer, seen[name[0] == "3"], norm, granularity)
                if beta is not None:
                    running[name] = beta * running.get(name, 0) + (1 - beta) * P
                    P = running[name] / (1 - beta**t)
                b = b / divided(layer, np.maximum(np.log(P), eps) if more.get("log") else eps + P)
            close(p.detach(), torch.from_numpy(before[name] - lr * b), 1e-6)


def test_without_a_model_it_is_sgd(engine):
    ps = params((3, 2), (4,))
    qs = copies(ps)
    o, other = fusedopt.NSGD(ps, 0.1, engine=engine), torch.optim.SGD(qs, 0.1, 0.9)
    for _ in range(3):
        fill_gradients(ps)
        for p, q in zip(ps, qs, strict=True):
            q.grad = p.grad.clone()
        o.step(), other.step()
    for p, q in zip(ps, qs, strict=True):
        close(p, q)


def test_groups_with_a_collector(engine):
    of = model()
    powers = fusedopt.InputPowers(of)
    groups = [{"params": [of[0].weight], "lr": 0.5}, {"params": [of[3].weight, of[3].bias], "momentum": 0.0}]
    o = fusedopt.NSGD(groups, collector=powers, engine=engine)
    x = inputs()
    back(of, x)
    before = of[0].weight.detach().clone()
    o.step()
    P = power(of[0], x, "l2", "layer")
    close(of[0].weight.detach(), before - 0.5 * of[0].weight.grad / (0.01 + P), 1e-6)


@pytest.mark.parametrize("granularity", ["layer", "in_channel"])
@pytest.mark.parametrize("how", ["copied", "pickled", "saved"])
def test_hooks_go_with_the_model(granularity, how):
    of = model()
    o = fusedopt.NSGD(of, granularity=granularity, power_beta=0.9)
    back(of, inputs())
    o.step()
    back(of, inputs())
    if how == "copied":
        other, its = copy.deepcopy((of, o))
    elif how == "pickled":
        other, its = pickle.loads(pickle.dumps((of, o)))
    else:
        file = io.BytesIO()
        torch.save((of, o.state_dict()), file)
        file.seek(0)
        other, state = torch.load(file, weights_only=False)
        its = fusedopt.NSGD(other, granularity=granularity, power_beta=0.9)
        its.load_state_dict(state)
    assert [len(m._forward_pre_hooks) for m in other.modules()] == [len(m._forward_pre_hooks) for m in of.modules()]
    for p, q in zip(of.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()
    for _ in range(3):
        o.step(), its.step()
        for p, q in zip(of.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        x = inputs()
        back(of, x), back(other, x)


def test_hooks_are_removable():
    of = model()
    o = fusedopt.NSGD(of)
    assert sum(len(m._forward_pre_hooks) for m in of.modules()) == 2
    back(of, inputs())
    o.step()
    scale = o.state[of[0].weight]["scale"].clone()
    o.remove_hooks()
    assert not any(m._forward_pre_hooks for m in of.modules())
    back(of, 10 * inputs())
    o.step()
    assert torch.equal(o.state[of[0].weight]["scale"], scale)


def test_layers_that_share_a_weight():
    a, b = nn.Linear(3, 3, dtype=torch.float64), nn.Linear(3, 3, dtype=torch.float64)
    b.weight = a.weight
    of = nn.Sequential(a, b)
    o = fusedopt.NSGD(of)
    x = torch.randn(4, 3, dtype=torch.float64)
    back(of, x)
    with torch.no_grad():
        seen = torch.cat([x, a(x)])
    o.step()
    assert float(o.state[a.weight]["scale"]) == pytest.approx(1 / (0.01 + power(a, seen, "l2", "layer")), rel=1e-5)


def test_half_precision_and_skipped_steps(engine):
    of = model(torch.bfloat16)
    o = fusedopt.NSGD(of, granularity="in_channel", engine=engine, skip_nonfinite=True)
    back(of, inputs(torch.bfloat16))
    before = [p.detach().clone() for p in of.parameters()]
    of[0].weight.grad.fill_(torch.nan)
    o.step()
    assert all(torch.equal(p, q) for p, q in zip(of.parameters(), before, strict=True))
    back(of, inputs(torch.bfloat16))
    o.step()
    assert not torch.equal(of[0].weight, before[0])
    assert o.state[of[0].weight]["channel_scale"].dtype == torch.float32


def test_what_is_refused():
    of = model()
    for bad, named in (({"norm": "l3"}, "norm is 'l3'"), ({"granularity": "row"}, "granularity is 'row'")):
        with pytest.raises(ValueError, match=named):
            fusedopt.NSGD(of, **bad)
        with pytest.raises(ValueError, match=named):
            fusedopt.InputPowers(of, **bad)
    with pytest.raises(ValueError, match="power_beta is 1.0"):
        fusedopt.NSGD(of, power_beta=1.0)
    with pytest.raises(TypeError, match="collector is Sequential"):
        fusedopt.NSGD(of.parameters(), collector=of)
    with pytest.raises(RuntimeError, match="steps in backward"):
        fusedopt.step_in_backward(fusedopt.NSGD(of))
    with pytest.raises(TypeError, match="model is list"):
        fusedopt.InputPowers([of])


def of_parts():
    """Each rank sees a part of the batch: what it measures is the power of the whole."""
    of = model()
    whole = inputs()
    x = whole[dist.get_rank() :: 2]
    powers = fusedopt.InputPowers(of, granularity="in_channel", average_over=dist.group.WORLD)
    back(of, x)
    (_, _, found), _ = powers.take()
    close(found.double(), torch.from_numpy(power(of[0], whole, "l2", "in_channel")), 1e-5)
    assert all(found.isnan().all() for _, _, found in powers.take())  # nobody has seen anything since


def of_one_rank():
    """A rank that has not evaluated a layer divides by what the other has seen."""
    of = model()
    o = fusedopt.NSGD(of.parameters(), collector=fusedopt.InputPowers(of, average_over=dist.group.WORLD))
    x = inputs()
    if dist.get_rank() == 0:
        back(of, x)
    for p in of.parameters():  # as data-parallel training leaves them
        p.grad = torch.ones_like(p)
    o.step()
    assert float(o.state[of[0].weight]["scale"]) == pytest.approx(1 / (0.01 + power(of[0], x, "l2", "layer")), rel=1e-4)


@pytest.mark.xdist_group("ranks")
def test_the_power_of_all_ranks(ranks):
    ranks.run(2, of_parts)
    ranks.run(2, of_one_rank)
