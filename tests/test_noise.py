"""Noise: the same words whoever draws them, and numbers that are normal and independent."""

import math

import conftest  # noqa: F401, where ranks import this they need its engines
import pytest
import torch
from helpers import close, copies
from sharding import mesh_of, placed, whole
from torch import nn

import fusedopt
from fusedopt import noise

MASK = 0xFFFFFFFF


def philox(counter, key):
    """Salmon et al. 2011, figure 6, of Python's own integers."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ key[0], b & MASK, a >> 32 ^ counter[3] ^ key[1], a & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return counter


def box_muller(element, tensor, step, seed, stream=0):
    """One element's number, in double precision."""
    words = philox((element >> 2 & MASK, element >> 34, tensor, step), (seed, stream))
    a, b = words[element & 2 : (element & 2) + 2]
    radius, angle = math.sqrt(-2 * math.log(((a >> 8) + 1) / 2**24)), 2 * math.pi * (b >> 8) / 2**24
    return radius * (math.sin(angle) if element & 1 else math.cos(angle))


# kat_vectors of the authors' Random123.
@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors(counter, key, words):
    found = noise.philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in found) == words == tuple(philox(counter, key))


def test_numbers_by_the_equation():
    elements = torch.tensor([0, 1, 2, 3, 4, 2**31 + 5, 2**34 + 1, 2**40 + 7])
    found = noise.normal(elements, 3, 9, (MASK, 256))
    assert found.tolist() == pytest.approx([box_muller(int(e), 3, 9, MASK, 256) for e in elements], rel=1e-12)


def drawn(parameters, engine, seed=5, gamma=0.55, **options):
    """What a step adds to gradients that are zero: SGD of rate 1 takes it from the parameters."""
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.zeros_like(p)
    asked = fusedopt.GradientNoise(1.0, gamma, seed)
    fusedopt.SGD(parameters, lr=1.0, gradient_noise=asked, engine=engine, **options).step()
    return [b - p.detach() for b, p in zip(before, parameters, strict=True)]


def zeros(*shape, dtype=torch.float64):
    return nn.Parameter(torch.zeros(shape, dtype=dtype))


def shapes(dtype):
    """Dense, empty, of one element, of another memory format, transposed, with gaps, off 16-byte bounds."""
    channels = torch.zeros(2, 3, 5, 7, dtype=dtype).to(memory_format=torch.channels_last)
    gaps = torch.zeros(9, 12, dtype=dtype)[:, ::2]
    odd = torch.zeros(4099, dtype=dtype)[1:]
    others = channels, torch.zeros(6, 11, dtype=dtype).t(), gaps, odd
    return [zeros(1030, dtype=dtype), zeros(0, 3, dtype=dtype), zeros(dtype=dtype), *map(nn.Parameter, others)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_engine_draws_the_same(engine, dtype):
    found = drawn(shapes(dtype), engine)
    for k, values in enumerate(found):
        truth = noise.normal(noise.elements(values), k, 0, (5, 0))
        close(values.double(), truth, 1e-12 if dtype == torch.float64 else 2e-6)


def test_a_complex_number_is_two_elements(engine):
    (found,) = drawn([zeros(3, 5, dtype=torch.complex128)], engine)
    flat = torch.view_as_real(found).flatten()
    close(flat, noise.normal(torch.arange(30), 0, 0, (5, 0)), 1e-12)


def test_misaligned_gradients_and_parameters(engine):
    p = nn.Parameter(torch.zeros(2051)[3:])
    (found,) = drawn([p], engine)
    close(found.double(), noise.normal(torch.arange(2048), 0, 0, (5, 0)), 2e-6)


def test_variance_decays_and_steps_are_counted_by_each_parameter(engine):
    p, q, e = zeros(7), zeros(7), torch.arange(7)
    o = fusedopt.SGD([p, q], lr=1.0, gradient_noise=fusedopt.GradientNoise(0.3, 0.7, seed=1), engine=engine)
    for t in range(4):
        before = p.detach().clone(), q.detach().clone()
        p.grad, q.grad = torch.zeros(7).double(), torch.zeros(7).double() if t % 2 else None
        o.step()
        for k, (x, s) in enumerate([(p, t), (q, t // 2)]):
            if x.grad is not None:
                truth = math.sqrt(0.3 / (1 + s) ** 0.7) * noise.normal(e, k, s, (1, 0))
                close(before[k] - x.detach(), truth, 1e-12)
    assert [int(o.state[x]["step"]) for x in (p, q)] == [4, 2]


def test_noise_comes_after_clipping_and_is_not_maximized(engine):
    p = zeros(5)
    p.grad = torch.full((5,), 100.0).double()
    asked = fusedopt.GradientNoise(1.0, seed=5)
    o = fusedopt.SGD([p], lr=1.0, gradient_noise=asked, max_grad_norm=1.0, maximize=True, engine=engine)
    o.step()
    clipped = -100.0 / (100.0 * math.sqrt(5) + 1e-6)
    close(p.detach(), -(clipped + noise.normal(torch.arange(5), 0, 0, (5, 0))), 1e-12)


def test_number_and_order_of_groups():
    a = [zeros(6), zeros(6), zeros(6)]
    b = copies(a)
    drawn(a, "auto")
    for p in b:
        p.grad = torch.zeros_like(p)
    asked = fusedopt.GradientNoise(1.0, seed=5)
    groups = [{"params": b[:1]}, {"params": b[1:2], "gradient_noise": None}, {"params": b[2:], "lr": 0.5}]
    fusedopt.SGD(groups, lr=1.0, gradient_noise=asked).step()
    assert torch.equal(a[0], b[0]) and not b[1].any() and torch.equal(a[2], 2 * b[2])


def test_in_backward_a_parameter_keeps_its_number():
    a, b = [zeros(6), zeros(6)], [zeros(6), zeros(6)]
    drawn(a, "auto")
    o = fusedopt.SGD(b, lr=1.0, gradient_noise=fusedopt.GradientNoise(1.0, seed=5))
    fusedopt.step_in_backward(o)
    (b[1].sum() * 0 + b[0].sum() * 0).backward()
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


# ---------------------------------------------------------------------------------------------------------- statistics

N = 2**18
ERROR = 5  # standard deviations; the seed is fixed


def sample(tensor=0, step=0, seed=0, stream=0, first=0):
    return noise.normal(torch.arange(first, first + N), tensor, step, (seed, stream))


def test_numbers_are_normal():
    z = sample()
    assert abs(z.mean()) < ERROR / math.sqrt(N) and abs(z.var() - 1) < ERROR * math.sqrt(2 / N)
    assert abs((z**3).mean()) < ERROR * math.sqrt(15 / N) and abs((z**4).mean() - 3) < ERROR * math.sqrt(96 / N)
    x = z.sort().values
    gap = (torch.special.ndtr(x) - (torch.arange(N) + 0.5) / N).abs().max()
    assert gap < 1.95 / math.sqrt(N)  # Kolmogorov and Smirnov, at 0.1%
    assert 4.2 < z.abs().max() < 6


@pytest.mark.parametrize(
    "other", [{"tensor": 1}, {"step": 1}, {"seed": 1}, {"stream": 1}, {"stream": 256}, {"first": N}], ids=str
)
def test_draws_are_independent(other):
    a, b = sample(), sample(**other)
    for f in (lambda z: z, torch.square, torch.abs):
        x, y = f(a) - f(a).mean(), f(b) - f(b).mean()
        assert abs((x * y).mean() / (x.std() * y.std())) < ERROR / math.sqrt(N)


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 8, 1024])
def test_neighbours_are_independent(lag):
    z = sample()
    for f in (lambda z: z, torch.square):
        x = f(z) - f(z).mean()
        assert abs((x[lag:] * x[:-lag]).mean() / x.var()) < ERROR / math.sqrt(N - lag)


# --------------------------------------------------------------------------------------------------------------- ranks


def parts_draw_as_the_whole(engine):
    from torch.distributed import get_world_size
    from torch.distributed.tensor import Replicate, Shard

    n = get_world_size()
    line, square = mesh_of(n), mesh_of(2, n // 2)
    places = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()]), (square, [Shard(0), Shard(1)])]
    places += [(line, [Shard(2)]), (square, [Shard(0), Shard(0)])]
    sizes = [(7, 6), (3, 9), (5, 5), (7, 6), (2, 3, 7), (13, 3)]
    wholes = [zeros(*size) for size in sizes]
    parts = [nn.Parameter(placed(p.detach(), place)) for p, place in zip(wholes, places, strict=True)]
    for a, b in zip(drawn(parts, engine), drawn(wholes, "eager"), strict=True):
        close(whole(a), b, 1e-12)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("world", [2, 4])
def test_shards_draw_as_the_whole(ranks, engine, world):
    ranks.run(world, parts_draw_as_the_whole, engine)


def hidden_parts_differ():
    import torch.distributed as dist

    (found,) = drawn([zeros(64)], "auto", process_group=dist.group.WORLD)
    close(found, noise.normal(torch.arange(64), 0, 0, (5, 256 * dist.get_rank())), 1e-12)
    (same,) = drawn([zeros(64)], "auto")
    close(same, noise.normal(torch.arange(64), 0, 0, (5, 0)), 1e-12)


@pytest.mark.xdist_group("ranks")
def test_parts_that_nobody_sees_are_salted(ranks):
    ranks.run(2, hidden_parts_differ)
