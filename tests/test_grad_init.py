"""GradInit: the scales are a textbook loop's, and nothing but scales changes, whatever happens."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fusedopt

OPTIONS = {"lr": 0.1, "steps": 6, "progress": False}


def loss_of(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def drawn(count=3, size=8, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    draw = {"dtype": dtype, "generator": generator}
    return [(torch.randn(size, 3, **draw), torch.randn(size, 2, **draw)) for _ in range(count)]


def perceptron(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def textbook(model, batches, rule, lr, gamma, scale_lr, steps, floor, clip, overlap):
    """Algorithm 1 with explicit weights: scales, losses, norms, and how often the norm was lowered."""
    w0 = [p.detach().clone() for p in model.parameters()]
    scales = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in w0]
    adam, endless, losses, norms, lowered = torch.optim.Adam(scales, lr=scale_lr), itertools.cycle(batches), [], [], 0

    def loss(ws, batch):
        x = batch[0]
        for i in range(0, len(ws), 2):
            x = x @ ws[i].T + ws[i + 1]
            x = torch.tanh(x) if i + 2 < len(ws) else x
        return ((x - batch[1]) ** 2).mean()

    for _ in range(steps):
        first = next(endless)
        ws = [scale * w for scale, w in zip(scales, w0, strict=True)]
        before = loss(ws, first)
        gs = torch.autograd.grad(before, ws, create_graph=True)
        norm = sum((g**2).sum() for g in gs).sqrt() if rule == "sgd" else sum(g.abs().sum() for g in gs)
        losses.append(before.item()), norms.append(norm.item())
        if norm.item() > gamma:
            value, lowered = norm, lowered + 1
        else:
            steps_taken = [(g / norm if rule == "sgd" else torch.sign(g)).detach() for g in gs]
            after = [w - lr * s for w, s in zip(ws, steps_taken, strict=True)]
            second = next(endless)
            value = (loss(after, first) + loss(after, second)) / 2 / lr if overlap else loss(after, second) / lr
        for scale, g in zip(scales, torch.autograd.grad(value, scales), strict=True):
            scale.grad = torch.clamp(g, -clip, clip)
        adam.step()
        with torch.no_grad():
            for scale in scales:
                scale.copy_(torch.clamp(scale, min=floor))
    return [scale.item() for scale in scales], losses, norms, lowered


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("rule", "gamma"), [("sgd", 0.9), ("adam", 3.6)])
def test_scales_are_a_textbook_loops(rule, gamma, overlap):
    model, batches = perceptron(torch.float64), drawn(dtype=torch.float64)
    scales, losses, norms, lowered = textbook(model, batches, rule, 0.05, gamma, 0.1, 12, 0.4, 0.5, overlap)
    options = {"lr": 0.05, "gamma": gamma, "scale_lr": 0.1, "steps": 12, "floor": 0.4, "grad_clip": 0.5}
    found = fusedopt.grad_init(model, loss_of, batches, rule, **options, overlap=overlap, progress=False)
    assert found.norm_steps == lowered and 0 < lowered < 12  # both kinds of steps are among them
    assert [*found.scales] == [name for name, _ in model.named_parameters()]
    assert [*found.scales.values()] == pytest.approx(scales, rel=1e-9)
    assert found.losses == pytest.approx(losses, rel=1e-9) and found.grad_norms == pytest.approx(norms, rel=1e-9)
    assert min(scales) == 0.4


def test_defaults_of_gamma():
    """1 for SGD; for Adam 1 / lr: by so much lower the norm is at which a step promises a loss lower by one."""
    for rule, gamma in (("sgd", 1.0), ("adam", 10.0)):
        one, other = perceptron(), perceptron()
        given = fusedopt.grad_init(one, loss_of, drawn(), rule, gamma=gamma, **OPTIONS)
        assert given == fusedopt.grad_init(other, loss_of, drawn(), rule, **OPTIONS)
        assert given != fusedopt.grad_init(perceptron(), loss_of, drawn(), rule, gamma=gamma / 100, **OPTIONS)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_large_norm_is_lowered(rule):
    options = {**OPTIONS, "steps": 40, "scale_lr": 0.02}
    found = fusedopt.grad_init(perceptron(), loss_of, drawn(), rule, gamma=1e-3, **options)
    assert found.norm_steps == 40 and found.grad_norms[-1] < 0.7 * found.grad_norms[0]


def test_the_first_step_lowers_the_loss_more():
    def after(model):
        loss = loss_of(model, batches[0])
        gs = torch.autograd.grad(loss, [*model.parameters()])
        norm = torch.stack([g.norm() for g in gs]).norm()
        with torch.no_grad():
            for p, g in zip(model.parameters(), gs, strict=True):
                p.sub_(0.1 * g / norm)
            return loss_of(model, batches[1]).item()

    batches, model = [(x, x[:, :2]) for x, _ in drawn(2, 200)], perceptron()
    before = after(copy.deepcopy(model))
    fusedopt.grad_init(model, loss_of, batches, gamma=float("inf"), lr=0.1, steps=60, progress=False)
    assert after(model) < before - 0.01


class Net(nn.Module):
    """Of several dtypes and layouts, with what is zero, what is frozen, what is not used, and a state."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 2, padding=1).to(memory_format=torch.channels_last)
        self.norm, self.drop = nn.BatchNorm2d(4), nn.Dropout(0.3)
        self.narrow, self.head = nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 2).double()
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", torch.zeros(4), persistent=False)
        nn.init.zeros_(self.conv.bias)
        self.drop.eval()

    def forward(self, x):
        self.calls += 1  # in place
        x = self.drop(self.norm(self.conv(x[:, :, None, None]))).mean((2, 3)) * self.frozen
        self.last = x.detach().mean(0)  # another tensor
        return self.head(torch.tanh(self.narrow(x.bfloat16())).double())


def net_loss(model, batch):
    model.drop.train()
    noise = torch.randn(()) + random.random() + np.random.rand()
    return F.mse_loss(model(batch[0]), batch[1].double()) + 0 * noise


def seen(model):
    """All that may not change, but for values of parameters."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    whole = {name: (id(t), t.data_ptr(), t.dtype, t.shape, t.stride(), t.requires_grad) for name, t in tensors.items()}
    values = {name: b.tolist() for name, b in model.named_buffers()}
    grads = {name: p.grad if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    hooks = [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]
    leaves = [p.is_leaf for p in model.parameters()]
    draws = torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())
    return whole, values, grads, modes, hooks, leaves, draws, [*vars(model)], torch.is_grad_enabled()


@pytest.fixture
def net():
    model = Net()
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.conv.register_forward_hook(lambda module, args, output: None)
    return model


@pytest.mark.parametrize("rule", ["sgd", "adam"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_only_scales_change(net, rule, context):
    before, old = seen(net), {name: p.detach().clone() for name, p in net.named_parameters()}
    loader = DataLoader(TensorDataset(*(torch.cat(x) for x in zip(*drawn(), strict=True))), batch_size=6, shuffle=True)
    with context():
        found = fusedopt.grad_init(net, net_loss, loader, rule, scale_lr=0.05, **OPTIONS)
    assert seen(net) == before
    assert {*found.scales} == {*old} - {"frozen"} and found.scales["unused"] == 1.0
    for name, p in net.named_parameters():
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        assert torch.equal(p, (old[name].to(wide) * found.scales.get(name, 1.0)).to(p.dtype)), name
        assert torch.equal(p, old[name]) == (name in ("frozen", "unused", "conv.bias", "norm.bias")), name


class Stop(BaseException):
    """What no handler of ours may know."""


def failing_loss(error, at):
    calls = itertools.count(1)

    def loss(model, batch):
        value = net_loss(model, batch)
        if next(calls) == at:
            if isinstance(error, float):
                return value * error
            raise error
        return value

    return loss


def failing_batches(error):
    yield from drawn()
    raise error


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), Stop(), float("nan"), float("inf")], ids=repr)
@pytest.mark.parametrize("at", [1, 4, 5])
def test_errors_of_the_loss_change_nothing(net, error, at):
    before, old = seen(net), copy.deepcopy([*net.parameters()])
    kind = ValueError if isinstance(error, float) else type(error)
    with pytest.raises(kind, match="the loss is (nan|inf) at step [12] on the scales" if kind is ValueError else None):
        fusedopt.grad_init(net, failing_loss(error, at), drawn(), gamma=1e9, **OPTIONS)
    assert seen(net) == before and all(map(torch.equal, net.parameters(), old))


@pytest.mark.parametrize("error", [KeyError("x"), KeyboardInterrupt(), Stop()], ids=repr)
def test_errors_of_the_batches_change_nothing(net, error):
    before, old = seen(net), copy.deepcopy([*net.parameters()])
    with pytest.raises(type(error)):
        fusedopt.grad_init(net, net_loss, failing_batches(error), **OPTIONS)
    assert seen(net) == before and all(map(torch.equal, net.parameters(), old))


def test_the_loss_sees_the_model_itself(net):
    inner = []

    def loss(model, batch):
        inner.append((model is net, model.conv.weight is weight, model.calls.item()))
        return net_loss(model, batch)

    weight = net.conv.weight
    fusedopt.grad_init(net, loss, drawn(), **OPTIONS)
    assert {*inner} == {(True, False, 0)} and net.conv.weight is weight  # buffers begin anew each time


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.output = nn.Embedding(7, 3, dtype=torch.float64), nn.Linear(3, 7, dtype=torch.float64)
        self.output.weight = self.embedding.weight

    def forward(self, x):
        return self.output(torch.tanh(self.embedding(x)))


def test_tied_parameters_have_one_scale():
    """Whose derivative is that of both uses."""
    model, batches = Tied(), [(torch.arange(7), torch.arange(7).roll(i)) for i in (1, 2)]
    w0, b0 = model.embedding.weight.detach().clone(), model.output.bias.detach().clone()
    a, b = (torch.ones((), dtype=torch.float64, requires_grad=True) for _ in "ab")
    found = fusedopt.grad_init(
        model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), batches, gamma=1e-3,
        **{**OPTIONS, "steps": 1}, scale_lr=1e-2,
    )  # fmt: skip
    w, bias = a * w0, b * b0
    loss = F.cross_entropy(torch.tanh(w[batches[0][0]]) @ w.T + bias, batches[0][1])
    gs = torch.autograd.grad(loss, (w, bias), create_graph=True)
    norm = (gs[0].square().sum() + gs[1].square().sum()).sqrt()
    assert found.grad_norms == pytest.approx([norm.item()], rel=1e-12)
    signs = [g.sign().item() for g in torch.autograd.grad(norm, (a, b))]
    assert found.scales == pytest.approx(
        {"embedding.weight": 1 - 0.01 * signs[0], "output.bias": 1 - 0.01 * signs[1]}, abs=1e-6
    )
    assert model.output.weight is model.embedding.weight
    assert torch.equal(model.output.weight, w0 * found.scales["embedding.weight"])


def test_steps_may_be_of_numpy():
    found = fusedopt.grad_init(perceptron(), loss_of, drawn(), **{**OPTIONS, "steps": np.int64(2)})
    assert len(found.losses) == 2


def test_what_no_scale_changes_stays():
    """The gradient of a linear loss is the same for all scales, so that its norm cannot be lowered."""
    model, batches = nn.Linear(3, 2, bias=False), drawn()
    old = model.weight.detach().clone()
    found = fusedopt.grad_init(model, lambda m, b: m(b[0]).mean(), batches, gamma=1e-6, **OPTIONS)
    assert found.norm_steps == 6 and found.scales == {"weight": 1.0} and torch.equal(model.weight, old)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_all_zeros_stay(rule):
    model = perceptron()
    for p in model.parameters():
        nn.init.zeros_(p)
    found = fusedopt.grad_init(model, lambda m, b: m(b[0]).square().mean(), drawn(), rule, **OPTIONS)
    assert not any(p.any() for p in model.parameters()) and found.grad_norms == (0.0,) * 6


def test_progress_is_for_terminals(monkeypatch, capsys):
    fusedopt.grad_init(perceptron(), loss_of, drawn(), lr=0.1, steps=2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    fusedopt.grad_init(perceptron(), loss_of, drawn(), lr=0.1, steps=2)
    out, err = capsys.readouterr()
    assert not out and "grad_init: loss" in err
    fusedopt.grad_init(perceptron(), loss_of, drawn(), lr=0.1, steps=2, progress=False)
    assert capsys.readouterr() == ("", "")
