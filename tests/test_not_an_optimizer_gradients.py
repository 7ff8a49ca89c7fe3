"""Of docs/not_an_optimizer.md, what changes gradients and weights: beside textbook loops in fp64."""

import copy
import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from page_programs import Program, close, mean_square, sgd, textbook

import fusedopt


def test_accumulated_gradients_are_those_of_the_whole():
    run = Program("Accumulation").all()
    both = [[torch.cat(parts) for parts in zip(*run.batches[i : i + 2], strict=True)] for i in (0, 2)]
    close([*run.model.parameters()], textbook(run.before, both, sgd(0.1, 0.9)))


def test_values_are_clipped():
    run = Program("Clipping by value").all()
    clamped = []

    def step(p, g, t):
        clamped.append((g.abs() > 0.01).any().item())
        return p - 0.1 * g.clamp(-0.01, 0.01)

    close([*run.model.parameters()], textbook(run.before, run.batches, step))
    assert any(clamped)


def test_a_scaler_unscales_before_hooks():
    """What the page says of gradients that are looked at before the step."""
    run = Program("Clipping by value")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def train(model, optimizer, batches):
        for x, y in batches:
            optimizer.zero_grad()
            scaler.scale(mean_square(model(x), y)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

    run.names["train"] = train
    run.all()
    close([*run.model.parameters()], [*Program("Clipping by value").all().model.parameters()])


def test_gradients_are_centred():
    run = Program("Centralised gradients").all()

    def step(p, g, t):
        return p - 0.1 * (g - g.mean(dim=1, keepdim=True) if p.ndim > 1 else g)

    close([*run.model.parameters()], textbook(run.before, run.batches, step))
    close(run.model.blocks[0].weight.sum(dim=1), run.before.blocks[0].weight.sum(dim=1))


def test_sharpness_is_of_two_gradients():
    run = Program("Two gradients a step").all()

    def gradient(model, x, y):
        there = copy.deepcopy(model)
        first = torch.autograd.grad(mean_square(there(x), y), [*there.parameters()])
        norm = math.sqrt(sum(g.square().sum().item() for g in first))
        with torch.no_grad():
            for p, g in zip(there.parameters(), first, strict=True):
                p += 0.05 * g / norm
        return torch.autograd.grad(mean_square(there(x), y), [*there.parameters()])

    close([*run.model.parameters()], textbook(run.before, run.batches, sgd(0.1, 0.9), gradient))


def test_masks_train():
    """Scores go as far as the textbook's, through zero; weights get what the mask lets through."""
    run = Program("Masks", batches=8)
    start = []
    run.call_before_training(lambda net: start.append(copy.deepcopy(net)))
    run.all()
    (w1, s1, b1), (w2, s2, b2) = [
        [p.detach().clone() for p in (net.weight, net.scores, net.bias)] for net in (start[0][0], start[0][2])
    ]
    for x, y in run.batches:
        m1, m2 = (s1 > 0) * 1.0, (s2 > 0) * 1.0
        z = x @ (w1 * m1).T + b1
        h = z.clamp(min=0)
        d2 = 2 * (h @ (w2 * m2).T + b2 - y) / len(y)
        d1 = (d2 @ (w2 * m2)) * (z > 0)
        for w, s, b, m, d, a in ((w1, s1, b1, m1, d1, x), (w2, s2, b2, m2, d2, h)):
            of_scores = d.T @ a * w
            of_scores /= of_scores.norm(dim=1, keepdim=True).clamp(min=1e-12)
            w -= 0.1 * d.T @ a * m
            s -= 0.02 * (of_scores + 0.01)
            b -= 0.1 * d.sum(dim=0)
    close([p.detach() for p in run.weights], [w1, b1, w2, b2])
    close([p.detach() for p in run.scores], [s1, s2])
    assert 0 < (s1 <= 0).sum() < s1.numel()


def test_the_monotone_operator_is_stepped():
    run = Program("A monotone operator for a gradient")
    start = []
    run.call_before_training(lambda net: start.append(copy.deepcopy(net)))
    run.all()

    def operator(net, x, y):
        h = torch.tanh(x @ net[0].weight.T + net[0].bias)
        a = torch.tanh(h @ net[1].weight.T + net[1].bias)
        da = 2 * (a - y) / len(y)
        dh = (da * (1 - a * a)) @ net[1].weight
        return dh.T @ x, dh.sum(dim=0), da.T @ h, da.sum(dim=0)

    close([*run.net.parameters()], textbook(start[0], run.batches, sgd(0.1), operator))


def test_the_operator_is_monotone_and_the_gradient_is_not():
    run = Program("A monotone operator for a gradient").all()

    def inner(out_of, a, b):
        """(F(a) - F(b)) (a - b)."""
        found = []
        for w in (a, b):
            w.requires_grad_()
            found.append(torch.autograd.grad(mean_square(out_of(run.x, w, torch.zeros(1).double()), run.y), w)[0])
        return ((found[0] - found[1]) * (a - b)).sum().item()

    pairs = torch.randn(100, 2, 1, 8).double()
    assert min(inner(run.Monotone.apply, *pair.clone()) for pair in pairs) > 0
    assert min(inner(lambda x, w, b: torch.tanh(x @ w.T + b), *pair.clone()) for pair in pairs) < 0


def test_gradients_preconditioned_outside_are_stepped():
    """Shampoo's, by numpy, then SGD with momentum."""
    run = Program("Shampoo and K-FAC").all()
    left, right, descend = {}, {}, sgd(0.01, 0.9)

    def root(matrix):
        u, s, _ = np.linalg.svd(matrix)
        return u * s**-0.25 @ u.T

    def step(p, g, t):
        if p.ndim == 2:
            m = g.numpy()
            left[p] = left.get(p, 1e-4 * np.eye(len(m))) + m @ m.T
            right[p] = right.get(p, 1e-4 * np.eye(len(m.T))) + m.T @ m
            g = torch.from_numpy(root(left[p]) @ m @ root(right[p]))
        return descend(p, g, t)

    torch.testing.assert_close([*run.model.parameters()], textbook(run.before, run.batches, step))


def with_options(name, **options):
    """What is ``fusedopt`` to a program, with other options for one class."""
    return SimpleNamespace(**{name: functools.partial(getattr(fusedopt, name), **options)})


def test_a_projection_holds_after_each_step():
    largest = []
    run = Program("Projection", with_options("RMSprop", average=fusedopt.EMA(0.5)))
    run.observe(lambda run: largest.append(max(p.abs().max().item() for p in run.model.parameters())))
    run.all()
    assert largest[0] > 0.1 and largest[1:] == [0.1] * 3
    assert max(run.optimizer.average_of(p).abs().max() for p in run.stepped()) > 0.1  # of before the hook


@pytest.mark.parametrize("master", ["fp32", "split"])
def test_masters_begin_anew_with_what_was_projected(master):
    run = Program("Projection", with_options("RMSprop", master=master))
    run.model.bfloat16()
    run.names["batches"] = [(x.bfloat16(), y.bfloat16()) for x, y in run.batches]
    run.all()
    limit = torch.tensor(0.1).bfloat16()
    at = [p.detach() == limit for p in run.stepped()]
    assert sum(a.sum() for a in at) > 10
    for p in run.stepped():
        p.grad = torch.zeros_like(p)  # with which RMSprop moves nothing
    run.optimizer.step()
    masters = fusedopt.master_weights(run.optimizer)
    assert all((masters[p][a] - 0.1).abs().max() < 4e-4 for p, a in zip(run.stepped(), at, strict=True) if a.any())


def test_averages_beside_the_optimizer():
    run, seen = Program("Averages of weights"), []
    run.observe(lambda run: seen.append([p.detach().clone() for p in run.model.parameters()]))
    run.all()
    after = [*seen[1:], [p.detach() for p in run.model.parameters()]]
    mean = [sum(ps) / len(ps) for ps in zip(*after, strict=True)]
    close([p.detach() for p in run.averaged.module.parameters()], mean)


def test_what_stopped_early_is_the_best():
    """Evaluations are best in the third epoch: three more, and its model and its state are back."""
    found = iter([3.0, 2.0, 1.0, 1.5, 1.2, 1.1])
    run = Program("Early stopping", evaluate=lambda model: next(found)).all()
    assert next(found, None) is None
    third = Program("Early stopping", evaluate=lambda model: 0.0)
    third.next(next(third.blocks).replace("range(100)", "range(3)").partition("    found =")[0])
    assert all(map(torch.equal, run.model.parameters(), third.model.parameters()))
    for of in (run, third):
        of.train(of.model, of.optimizer, of.batches)
    assert all(map(torch.equal, run.model.parameters(), third.model.parameters()))  # with the state of then, too


def test_length_and_direction_are_stepped():
    """Both parts of a weight, by the chain rule."""
    run, start = Program("Weight normalisation"), []
    run.call_before_training(lambda net: start.append(copy.deepcopy(net)))
    run.all()
    names = [name for name, _ in run.net.named_parameters()]

    def gradient(net, x, y):
        parts = dict(net.named_parameters())
        g, v = (parts[f"0.parametrizations.weight.original{i}"] for i in (0, 1))
        length = v.norm(dim=1, keepdim=True)
        z = x @ (g * v / length).T + parts["0.bias"]
        d2 = 2 * (z.clamp(min=0) @ parts["2.weight"].T + parts["2.bias"] - y) / len(y)
        d1 = (d2 @ parts["2.weight"]) * (z > 0)
        dw = d1.T @ x
        dg = (dw * v / length).sum(dim=1, keepdim=True)
        of = {
            "0.bias": d1.sum(dim=0), "2.weight": d2.T @ z.clamp(min=0), "2.bias": d2.sum(dim=0),
            "0.parametrizations.weight.original0": dg,
            "0.parametrizations.weight.original1": g / length * (dw - dg * v / length),
        }  # fmt: skip
        return [of[name] for name in names]

    close([*run.net.parameters()], textbook(start[0], run.batches, sgd(0.1), gradient))
    before, after = (net[0].parametrizations.weight for net in (start[0], run.net))
    assert not torch.equal(before.original0, after.original0)
    assert (after.original1.norm(dim=1) > before.original1.norm(dim=1)).any()  # steps make v longer
    assert (after.original1.norm(dim=1) >= before.original1.norm(dim=1) * (1 - 1e-12)).all()


def test_the_largest_singular_value_is_one():
    run = Program("Spectral normalisation", batches=20).all()
    layer = run.net.eval()[0]
    assert np.linalg.norm(layer.weight.detach().numpy(), 2) == pytest.approx(1, rel=0.02)
    assert abs(np.linalg.norm(layer.parametrizations.weight.original.detach().numpy(), 2) - 1) > 0.2


def test_vectors_do_not_decay():
    """A step with no gradient to speak of decays matrices alone."""
    run = Program("Batch normalisation, dropout, label smoothing").all()
    before = copy.deepcopy(run.net)
    run.optimizer.state.clear()
    for p in run.stepped():
        p.grad = torch.zeros_like(p)
    run.optimizer.step()
    for p, was in zip(run.net.parameters(), before.parameters(), strict=True):
        close(p.detach(), was.detach() * (1 - 1e-4 if p.ndim > 1 else 1))


def test_a_curriculum_begins_with_what_is_easy():
    run, seen = Program("Curricula and shuffling", batches=4), []
    run.names["loss"] = lambda output, y: (seen.append(y.flatten()), mean_square(output, y))[1]
    run.all()
    easiest = torch.cat([y for _, y in run.batches]).flatten().abs().sort().values
    assert [len(y) for y in seen] == [2] * 14
    for shown, count in zip(torch.cat(seen).abs().split([4, 8, 16]), (4, 8, 16), strict=True):
        close(shown.sort().values, easiest[:count])
        assert count == 4 or not torch.equal(shown, easiest[:count])
