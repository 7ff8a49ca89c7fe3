"""Rescaling: what is put to unit length, when, and which weights may be."""

import copy

import pytest
import torch
from conftest import AVAILABLE  # noqa: F401 (on ranks, it has to be there first)
from helpers import close, copies, fill_gradients, params
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import fusedopt

SHAPES = [(6, 3, 2), (5,), (4, 7)]


def unit(p, kind):
    """By the description."""
    rows = p.reshape(len(p), -1) if kind == "channel" and p.dim() > 1 else p.reshape(1, -1)
    return (rows / rows.norm(dim=1, keepdim=True)).reshape(p.shape)


def give(ps, others):
    for p, q in zip(ps, others, strict=True):
        q.grad = None if p.grad is None else p.grad.clone()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "LAMB", "AdamP"])
@pytest.mark.parametrize("kind", ["channel", "tensor", "all"])
def test_steps_end_at_unit_length(engine, name, kind):
    ps = params(*SHAPES, dtype=torch.float64)
    qs = copies(ps)
    o = getattr(fusedopt, name)([{"params": ps, "rescale": kind}], lr=0.1, engine=engine)
    other = getattr(fusedopt, name)(qs, lr=0.1, engine="eager")
    for _ in range(3):
        fill_gradients(ps)
        give(ps, qs)
        o.step(), other.step()
        with torch.no_grad():
            length = torch.cat([q.flatten() for q in qs]).norm()
            for q in qs:
                q.copy_(q / length if kind == "all" else unit(q, kind))
        for p, q in zip(ps, qs, strict=True):
            close(p, q, 1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_other_types(engine, dtype):
    ps = [nn.Parameter(torch.randn(40, 50).to(dtype))]
    o = fusedopt.SGD([{"params": ps, "rescale": "channel"}], lr=0.1, engine=engine)
    ps[0].grad = torch.randn(40, 50).to(dtype)
    o.step()
    wide = torch.complex128 if dtype.is_complex else torch.float64
    close(ps[0].detach().to(wide).norm(dim=1), torch.ones(40, dtype=torch.float64), 5e-3)


def test_every_few_steps_and_after_a_resume(engine):
    ps = params((3, 4))
    o = fusedopt.SGD([{"params": ps, "rescale": "tensor", "rescale_every": 3}], lr=0.1, engine=engine)
    lengths = []
    for t in range(7):
        if t == 4:
            again = fusedopt.SGD([{"params": ps, "rescale": "tensor", "rescale_every": 3}], lr=0.1, engine=engine)
            again.load_state_dict(o.state_dict())
            o = again
        fill_gradients(ps)
        o.step()
        lengths.append(float(ps[0].detach().norm()))
    assert [abs(length - 1) < 1e-6 for length in lengths] == [False, False, True] * 2 + [False]


def test_what_does_not_move(engine):
    """Without a rate, without a gradient, of length 0, or in a step that is skipped."""
    still, free, empty, zero = params((3, 2), (2, 2), (0, 4), (2, 3))
    with torch.no_grad():
        zero[0] = 0
    groups = [{"params": [still], "lr": 0.0}, {"params": [free, empty]}, {"params": [zero]}]
    for group in groups:
        group["rescale"] = "channel"
    o = fusedopt.SGD(groups, lr=0.1, skip_nonfinite=True, engine=engine)
    before = copies([still, free])
    still.grad, empty.grad = torch.randn(3, 2), torch.zeros(0, 4)
    o.step()
    assert torch.equal(still, before[0])
    assert torch.equal(free, before[1])
    zero.grad = torch.zeros(2, 3)
    o.step()
    close(zero.detach().norm(dim=1), torch.tensor([0.0, 1.0]))
    free.grad = torch.full_like(free, torch.inf)
    o.step()
    assert torch.equal(free, before[1])
    assert o.skipped_steps == 1


def test_an_average_is_that_of_rescaled_weights(engine):
    ps = params(*SHAPES, dtype=torch.float64)
    o = fusedopt.SGD([{"params": ps, "rescale": "channel", "average": fusedopt.EMA(0.8)}], lr=0.1, engine=engine)
    expected = None
    for _ in range(3):
        fill_gradients(ps)
        o.step()
        now = [p.detach().clone() for p in ps]
        expected = now if expected is None else [0.8 * a + 0.2 * p for a, p in zip(expected, now, strict=True)]
    for p, a in zip(ps, expected, strict=True):
        close(o.average_of(p), a, 1e-7)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"rescale": "row"}, ValueError, "rescale .group 0. is 'row'"),
        ({"rescale": "channel", "rescale_every": 0}, ValueError, "rescale_every .group 0. is 0"),
        ({"rescale": "channel", "rescale_every": 1.5}, TypeError, "rescale_every .group 0. is 1.5"),
        ({"rescale": "tensor", "average": fusedopt.Lookahead()}, ValueError, "Lookahead"),
        ({"rescale": "tensor", "differentiable": True}, ValueError, "differentiable"),
    ],
)
def test_what_is_refused(options, error, named):
    ps = params((3, 2))
    with pytest.raises(error, match=named):
        fusedopt.SGD([{"params": ps, **options}], lr=0.1)
    o = fusedopt.SGD(ps, lr=0.1)
    o.param_groups[0].update(options)
    fill_gradients(ps)
    before = copies(ps)
    with pytest.raises(error, match=named):
        o.step()
    assert torch.equal(ps[0], before[0])
    if options == {"rescale": "row"}:
        o.param_groups[0]["rescale"] = "tensor"
        with pytest.raises(RuntimeError, match="rescale comes after"):
            fusedopt.step_in_backward(o)


def sharded(kind, dim):
    """Shards are rescaled as the whole."""
    mesh = init_device_mesh("cpu", (2,))
    whole = params((6, 4), (5, 3))
    parts = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(dim)])) for p in whole]
    o, other = (fusedopt.SGD([{"params": ps, "rescale": kind}], lr=0.1) for ps in (parts, whole))
    for _ in range(2):
        fill_gradients(whole)
        for p, q in zip(parts, whole, strict=True):
            p.grad = distribute_tensor(q.grad.clone(), mesh, [Shard(dim)])
        o.step(), other.step()
    for p, q in zip(parts, whole, strict=True):
        close(p.full_tensor().detach(), q.detach(), 1e-6)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["channel", "tensor", "all"])
def test_shards_are_rescaled_as_the_whole(ranks, kind, dim):
    ranks.run(2, sharded, kind, dim)


class Net(nn.Module):
    """Registered in another order than it is evaluated, with one layer of each kind."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 3)  # not followed by anything
        self.norm = nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(3, 6, 3)  # by BatchNorm
        self.dropout = nn.Dropout(0.1)
        self.up = nn.ConvTranspose2d(6, 4, 3)  # by BatchNorm, but inputs come first
        self.after_up = nn.BatchNorm2d(4)
        self.plain = nn.Linear(4, 8, bias=False)  # by LayerNorm
        self.layer_norm = nn.LayerNorm(8)
        self.biased = nn.Linear(8, 8)  # by LayerNorm, but the bias has a length
        self.residual = nn.Linear(8, 8, bias=False)  # by GroupNorm, but also by an addition
        self.group_norm = nn.GroupNorm(2, 8)
        self.functional = nn.Linear(8, 8, bias=False)  # by layer_norm
        self.tied = nn.Linear(8, 8, bias=False)  # once by LayerNorm, once not
        self.frozen = nn.Linear(8, 8, bias=False).requires_grad_(False)

    def forward(self, x):
        x = self.norm(self.dropout(self.conv(x))).relu()
        x = self.after_up(self.up(x)).mean((2, 3))
        x = self.layer_norm(self.plain(x))
        x = self.layer_norm(self.biased(x))
        y = self.residual(x)
        x = self.group_norm(y) + y
        x = F.layer_norm(self.functional(x), (8,))
        x = self.layer_norm(self.frozen(self.tied(self.layer_norm(self.tied(x)))))
        return self.head(x)


def test_groups_follow_what_the_model_does():
    net = Net()
    groups = fusedopt.scale_invariant_groups(net)
    found = {group.get("rescale"): [name for name, _ in group["params"]] for group in groups}
    assert found["channel"] == ["conv.weight"]
    assert found["tensor"] == ["up.weight", "plain.weight", "functional.weight"]
    names = [name for name, _ in net.named_parameters()]
    assert sorted(sum(found.values(), [])) == sorted(names)
    o = fusedopt.SGD(groups, lr=0.5)
    x = torch.randn(4, 3, 8, 8)
    net.dropout.p = 0.0
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        for name, factor in (("conv", 3.0), ("up", 0.5), ("plain", 7.0), ("functional", 2.0)):
            getattr(scaled, name).weight *= factor
    close(net(x), scaled(x), 1e-3)
    net(x).square().mean().backward()
    o.step()
    close(net.conv.weight.detach().flatten(1).norm(dim=1), torch.ones(6))
    close(net.plain.weight.detach().norm(), torch.ones(()))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_models_that_cannot_be_traced():
    with pytest.raises(RuntimeError, match="Branching cannot be traced"):
        fusedopt.scale_invariant_groups(Branching())
    with pytest.raises(TypeError, match="model is list"):
        fusedopt.scale_invariant_groups([])
