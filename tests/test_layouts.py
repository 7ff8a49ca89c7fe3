"""Tensors of every layout and kind, on GPUs too. The truth is torch.optim on contiguous copies."""

import itertools

import pytest
import torch
from conftest import AVAILABLE, ON_GPU, engine_fixture
from helpers import TORCH, close, decay, pair, randn, same_gradients

import fusedopt

engine = engine_fixture(AVAILABLE + ON_GPU, in_python=True)


def layouts(device="cpu", shape=(4, 6, 5, 3)):
    base = randn(shape, device=device)
    yield "contiguous", base.clone()
    yield "channels_last", base.clone(memory_format=torch.channels_last)
    yield "transposed", base.clone().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    yield "gaps", randn(4, 6, 5, 6, device=device)[..., ::2].copy_(base)
    yield "rows apart", randn(4, 9, 5, 3, device=device)[:, 2:8].copy_(base)


LAYOUTS = [name for name, _ in layouts()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("of_parameter", "of_gradient"), list(itertools.product(LAYOUTS, LAYOUTS)))
def test_layouts(engine, device, of_parameter, of_gradient, dtype):
    start, gradient = (dict(layouts(device))[name].to(dtype) for name in (of_parameter, of_gradient))
    p = torch.nn.Parameter(start)
    if of_parameter in ("gaps", "rows apart") and dtype == torch.float32:
        frame = start._base.clone() if start._base is not None else None
    else:
        frame = None
    strides = p.stride()
    q = torch.nn.Parameter(p.detach().contiguous().double())
    a = fusedopt.AdamW([p], engine=engine, max_grad_norm=0.5)
    b = fusedopt.AdamW([q], engine="eager", max_grad_norm=0.5)
    for _ in range(3):
        p.grad, q.grad = gradient, gradient.contiguous().double()
        a.step(), b.step()
        q.data = q.data.to(dtype).double()
    assert p.stride() == strides
    close(p.double(), q.double(), 1e-5 if dtype == torch.float32 else 1e-2)
    if frame is not None:  # nothing between the elements was touched
        untouched = torch.ones_like(frame, dtype=torch.bool)
        torch.as_strided(untouched, p.shape, p.stride(), p.storage_offset()).fill_(False)
        now = torch.as_strided(p.detach(), frame.shape, frame.stride(), 0)
        assert torch.equal(now[untouched], frame[untouched])


def test_size_one_dimensions_have_any_stride(engine, device):
    ours, a, theirs, b = pair([(5, 1), (1, 7), (1, 1)], engine=engine, device=device)
    gradients = [
        randn(5, 9, device=device)[:, :1],
        randn(7, 1, device=device).t(),
        randn(3, 3, device=device)[1:2, 1:2],
    ]
    for _ in range(2):
        same_gradients(ours, theirs, [gradients[0].as_strided((5, 1), (9, 1)), gradients[1], gradients[2]])
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)


def test_gradient_expanded_from_one_element(engine, device):
    ours, a, theirs, b = pair([(4, 5)], engine=engine, device=device)
    same_gradients(ours, theirs, [torch.tensor(0.3, device=device).expand(4, 5)])
    a.step(), b.step()
    close(ours[0], theirs[0])


def test_many_dimensions(engine, device):
    shape = (2,) * 9
    ours, a, theirs, b = pair([shape], engine=engine, device=device)
    same_gradients(ours, theirs, [randn(shape, device=device).permute(*reversed(range(9)))])
    a.step(), b.step()
    close(ours[0], theirs[0])


@pytest.mark.parametrize(
    "make", [lambda t: torch._neg_view(t), lambda t: torch.complex(-t, -t).conj().imag], ids=["negated", "imaginary"]
)
@pytest.mark.parametrize("shape", [(), (1,), (6, 5)])
def test_lazily_negated_gradient(engine, device, shape, make):
    ours, a, theirs, b = pair([shape], engine=engine, device=device)
    for _ in range(2):
        gradient = make(randn(shape, device=device))
        assert gradient.is_neg()
        same_gradients(ours, theirs, [gradient])
        theirs[0].grad = gradient.resolve_neg().clone()
        a.step(), b.step()
    close(ours[0], theirs[0])


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex(engine, device, name, dtype):
    options = {**decay(name), **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    ours, a, theirs, b = pair([(5, 3), (), (1,)], name, dtype, engine, device, **options)
    for t in range(4):
        gradients = [randn(p.shape, dtype=dtype, device=device) for p in ours]
        if t % 2:
            gradients = [g.conj() for g in gradients]
        same_gradients(ours, theirs, gradients)
        for q in theirs:
            q.grad = q.grad.resolve_conj()
        a.step(), b.step()
    for p, q in zip(ours, theirs, strict=True):
        close(p, q, 1e-5)
        for key, value in b.state[q].items():
            close(a.state[p][key].cpu(), value.cpu(), 1e-5)  # torch keeps its count on the host
