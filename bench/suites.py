"""Parameter shapes of real models, and of the extremes: few large tensors, many small ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Suite:
    """Shapes that one optimizer steps together."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


def gpt2(vocabulary: int = 50257, context: int = 1024, width: int = 768, depth: int = 12) -> tuple[Shape, ...]:
    """The shapes of a GPT-2 whose head is tied to its token embedding."""
    norm = ((width,), (width,))
    block = (
        *norm,
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        *norm,
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    )
    return ((vocabulary, width), (context, width), *block * depth, *norm)


GPT2 = Suite("GPT-2 124M", gpt2())
THOUSAND = Suite("1000 x 1000", ((1000,),) * 1000)
TEN_THOUSAND = Suite("10,000 x 64", ((64,),) * 10_000)


def parameters(suite: Suite, seed: int = 0) -> list[Tensor]:
    """Random float32 parameters of a suite, with gradients of 1% of their size."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in suite.shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator))
        p.grad = torch.randn(shape, generator=generator).mul_(0.01)
        made.append(p)
    return made
