"""Tensors laid out in buffers whose other bytes are watched."""

import itertools
import math

import torch


def bits(t):
    """A tensor's numbers as bytes of their own, so that NaN equals itself."""
    plain = t.detach().resolve_conj().resolve_neg()
    return plain.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)


def home(t):
    """What tells storages apart; a lazy clone has one of its own, though yet at the same address."""
    return t.untyped_storage()._cdata


def strides(shape, layout):
    """Strides with the dimensions in any order, gaps between elements and padding between rows."""
    order, gap, pad, _ = layout
    dims = range(len(shape))
    order = next(itertools.islice(itertools.permutations(reversed(dims)), order % math.factorial(len(shape)), None))
    found, reach = [0] * len(shape), gap
    for d in order:
        found[d] = reach
        reach = reach * max(shape[d], 1) + pad
    return found


def extent(shape, layout):
    """Elements from the first to the last."""
    return 1 + sum(stride * (max(size, 1) - 1) for stride, size in zip(strides(shape, layout), shape, strict=True))


class Buffer:
    """Memory in which tensors lie apart from each other.

    Args:
        placed: Pairs of values of one dtype and a layout.
        fill: What lies between them.
    """

    def __init__(self, placed, fill=7.0):
        room = sum(layout[3] + extent(t.shape, layout) for t, layout in placed)
        dtype = placed[0][0].dtype
        self.all = torch.full((room + 2,), fill, dtype=dtype)
        self.tensors, at = [], 0
        for t, layout in placed:
            at += layout[3]
            view = self.all.as_strided(t.shape, strides(t.shape, layout), at)
            self.tensors.append(view.copy_(t))
            at += extent(t.shape, layout)

    def bytes(self):
        return self.all.clone().view(torch.uint8)

    def outside(self, tensors):
        """Which bytes belong to none of the tensors, which are given by their homes."""
        free = torch.ones(self.all.numel() * self.all.element_size(), dtype=torch.bool)
        for t in tensors.get(home(self.all), ()):
            size = t.element_size()
            steps = [stride * size for stride in t.stride()]
            free.as_strided((*t.shape, size), (*steps, 1), t.storage_offset() * size).fill_(False)
        return free


def values(shape, dtype, seed, scale=1.0):
    """Bounded normal numbers, some of them zero."""
    generator = torch.Generator().manual_seed(seed)
    parts = [*shape, 2] if dtype.is_complex else list(shape)
    numbers = torch.randn(parts, dtype=torch.float64, generator=generator).clamp(-4, 4) * scale
    numbers[torch.rand(parts, generator=generator) < 0.1] = 0
    return (torch.view_as_complex(numbers) if dtype.is_complex else numbers).to(dtype)
