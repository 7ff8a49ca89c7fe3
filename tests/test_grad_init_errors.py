"""What GradInit refuses: it says why, and changes nothing."""

import copy

import pytest
import torch
from test_grad_init import OPTIONS, drawn, loss_of, perceptron
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fusedopt


@pytest.mark.parametrize(
    ("batches", "match"),
    [
        ([], "batches has none; it must have two or more"),
        (drawn(1), "batches has 1; it must have two or more"),
        (iter(drawn(5)), "batches ended after 5, and cannot be taken again; 6 steps on the scales take up to 12"),
        (DataLoader(TensorDataset(*drawn(1)[0]), batch_size=8), "batches has 1"),
    ],
)
def test_too_few_batches(batches, match):
    model = perceptron()
    old = copy.deepcopy([*model.parameters()])
    with pytest.raises(ValueError, match=match):
        fusedopt.grad_init(model, loss_of, batches, **OPTIONS)
    assert all(map(torch.equal, model.parameters(), old))


def test_an_iterator_that_is_long_enough_will_do():
    fusedopt.grad_init(perceptron(), loss_of, iter(drawn(12)), gamma=1e9, **OPTIONS)


def without_parameters():
    return nn.Tanh()


def frozen():
    return perceptron().requires_grad_(False)


def complex_one():
    model = perceptron()
    model[0].weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
    return model


def lazy():
    return nn.LazyLinear(2)


def on_meta():
    return perceptron().to("meta")


def expanded():
    model = perceptron()
    model[0].weight = nn.Parameter(torch.ones(1, 3).expand(5, 3))
    return model


def sharing():
    model = perceptron()
    whole = torch.randn(30)
    model[0].weight = nn.Parameter(whole[:15].view(5, 3))
    model[2].weight = nn.Parameter(whole[10:].view(4, 5))
    return model


@pytest.mark.parametrize(
    ("model", "kind", "match"),
    [
        (lambda: perceptron().parameters(), TypeError, "model is generator; it must be a torch.nn.Module"),
        (without_parameters, ValueError, r"model \(Tanh\) has no parameter that requires gradients"),
        (frozen, ValueError, "has no parameter that requires gradients"),
        (complex_one, TypeError, "parameter '0.weight' is torch.complex64; it must be real and floating point"),
        (lazy, TypeError, "parameter 'weight' cannot be scaled: it is not initialized yet"),
        (on_meta, ValueError, "parameter '0.weight' has no memory"),
        (expanded, ValueError, "parameter '0.weight' cannot be written in place"),
        (sharing, ValueError, "parameters of the model share memory"),
    ],
)
def test_models_that_cannot_be_scaled(model, kind, match):
    with pytest.raises(kind, match=match):
        fusedopt.grad_init(model(), loss_of, drawn(), **OPTIONS)


def test_sharded_parameters_are_refused():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        split = lambda name, m, mesh: [  # noqa: E731
            m.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])))
            for key, p in m.named_parameters(recurse=False)
        ]
        model = distribute_module(perceptron(), mesh, split)
        with pytest.raises(TypeError, match="parameter '0.weight' is sharded among ranks; call grad_init before"):
            fusedopt.grad_init(model, loss_of, drawn(), **OPTIONS)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"lr": 0.0}, ValueError, r"lr is 0.0; it must lie in \(0, "),
        ({"lr": float("nan")}, ValueError, "lr is nan"),
        ({"lr": "fast"}, TypeError, "lr is 'fast'; it must be a number"),
        ({"gamma": -1}, ValueError, "gamma is -1"),
        ({"scale_lr": float("inf")}, ValueError, "scale_lr is inf"),
        ({"floor": 0}, ValueError, r"floor is 0; it must lie in \(0, 1\]"),
        ({"floor": 1.5}, ValueError, "floor is 1.5"),
        ({"grad_clip": 0}, ValueError, "grad_clip is 0"),
        ({"steps": 0}, ValueError, "steps is 0; it must be at least 1"),
        ({"steps": 2.0}, TypeError, "steps is 2.0; it must be an int"),
        ({"steps": True}, TypeError, "steps is True; it must be an int"),
        ({"optimizer": ["sgd"]}, ValueError, r"optimizer is \['sgd'\]; it must be 'sgd' or 'adam'"),
        ({"optimizer": "lion"}, ValueError, "optimizer is 'lion'; it must be 'sgd' or 'adam'"),
        ({"loss_fn": None}, TypeError, r"loss_fn is None; it must be called as loss_fn\(model, batch\)"),
        ({"batches": 3}, TypeError, "batches is int; it must be an iterable of batches"),
    ],
)
def test_options_are_in_their_ranges(options, kind, match):
    with pytest.raises(kind, match=match):
        fusedopt.grad_init(perceptron(), **{"loss_fn": loss_of, "batches": drawn(), **OPTIONS, **options})


OTHER = perceptron()


@pytest.mark.parametrize(
    ("loss_fn", "kind", "match"),
    [
        (lambda m, b: m(b[0]), TypeError, r"loss_fn returned a tensor of shape \(8, 2\), torch.float32 at step 1"),
        (lambda m, b: 1.0, TypeError, "loss_fn returned 1.0 at step 1 on the scales; it must return the mean loss"),
        (lambda m, b: m(b[0]).argmax(), TypeError, "torch.int64"),
        (lambda m, b: loss_of(m, b).detach(), ValueError, "does not depend on any parameter"),
        (lambda m, b: loss_of(OTHER, b), ValueError, "loss_fn depends on none of the parameters of the model that it"),
        (lambda m, b: loss_of(m, b) * 1e30 * 1e10, ValueError, "the loss is inf at step 1"),
        (lambda m, b: (loss_of(m, b) * 0).sqrt(), ValueError, "the gradient's norm is nan at step 1"),
    ],
)
def test_losses_that_cannot_be_lowered(loss_fn, kind, match):
    model = perceptron()
    old = copy.deepcopy([*model.parameters()])
    with pytest.raises(kind, match=match):
        fusedopt.grad_init(model, loss_fn, drawn(), **OPTIONS)
    assert all(map(torch.equal, model.parameters(), old))


def test_loss_fn_is_called_as_its_error_says():
    with pytest.raises(TypeError, match="positional") as caught:
        fusedopt.grad_init(perceptron(), lambda batch: None, drawn(), **OPTIONS)
    assert caught.value.__notes__ == ["loss_fn is called as loss_fn(model, batch)"]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * 2


def test_a_loss_without_a_second_derivative_says_so():
    with pytest.raises(RuntimeError, match="once_differentiable"):
        fusedopt.grad_init(
            perceptron(), lambda m, b: Once.apply(m(b[0])).square().mean(), drawn(), gamma=1e-3, **OPTIONS
        )
    model = nn.Embedding(9, 8)  # which queries, keys and values are of; the fused kernels have no second derivative

    def attention(m, tokens):
        x = m(tokens)[None]
        return F.scaled_dot_product_attention(x, x, x).square().mean()

    with pytest.raises(RuntimeError, match="is not implemented") as caught:
        fusedopt.grad_init(model, attention, [torch.arange(9)[None]] * 2, gamma=1e-9, **OPTIONS)
    assert "differentiated twice" in caught.value.__notes__[0]
