"""Parameter shapes of real models, and of the extremes: few large tensors, many small ones."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]


@dataclass(frozen=True)
class Suite:
    """Shapes that one optimizer steps together.

    Attributes:
        name: What ``find`` finds it by.
        groups: The shapes of every param group.
        apart: Those of embeddings and output layers.
    """

    name: str
    groups: tuple[Shapes, ...]
    apart: frozenset[Shape] = frozenset()

    @property
    def shapes(self) -> Shapes:
        """The shapes of all groups."""
        return tuple(shape for group in self.groups for shape in group)

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    def regrouped(self, count: int) -> Suite:
        """The same tensors in so many groups of neighbours, as equal in number as can be.

        Raises:
            ValueError: If there are fewer tensors than groups.
        """
        shapes = self.shapes
        if count > len(shapes):
            raise ValueError(f"suite {self.name} has {len(shapes)} tensors, which cannot be {count} groups")
        bounds = [len(shapes) * k // count for k in range(count + 1)]
        return Suite(self.name, tuple(shapes[a:b] for a, b in zip(bounds, bounds[1:], strict=False)), self.apart)

    def is_hidden(self, shape: Shape) -> bool:
        """Whether a shape is that of a hidden layer's matrix."""
        return len(shape) > 1 and shape not in self.apart


def _linear(inputs: int, outputs: int) -> Shapes:
    return ((outputs, inputs), (outputs,))


def gpt2_block(width: int) -> Shapes:
    """A block of GPT-2."""
    norm = ((width,), (width,))
    return (
        *norm,
        *((width, 3 * width), (3 * width,)),
        *((width, width), (width,)),
        *norm,
        *((width, 4 * width), (4 * width,)),
        *((4 * width, width), (width,)),
    )


def gpt2(width: int = 768, depth: int = 12, vocabulary: int = 50257, context: int = 1024) -> Shapes:
    """GPT-2; its head is tied to the token embedding."""
    return ((vocabulary, width), (context, width), *gpt2_block(width) * depth, (width,), (width,))


def llama3(layers: int, width: int = 4096, keys: int = 1024, hidden: int = 14336) -> Shapes:
    """Decoder layers of Llama-3-8B, which has 32, without embeddings."""
    attention = ((width, width), (keys, width), (keys, width), (width, width))
    mlp = ((hidden, width), (hidden, width), (width, hidden))
    return (*attention, *mlp, (width,), (width,)) * layers


def resnet50(stages: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> Shapes:
    """ResNet-50."""

    def conv(inputs: int, outputs: int, kernel: int) -> Shapes:
        return ((outputs, inputs, kernel, kernel), (outputs,), (outputs,))  # with its batch norm

    shapes, inputs = conv(3, 64, 7), 64
    for stage, blocks in enumerate(stages):
        width = 64 << stage
        for block in range(blocks):
            shapes += conv(inputs, width, 1) + conv(width, width, 3) + conv(width, 4 * width, 1)
            if block == 0:
                shapes += conv(inputs, 4 * width, 1)  # of the shortcut
            inputs = 4 * width
    return shapes + _linear(inputs, classes)


def vit(width: int = 768, depth: int = 12, patch: int = 16, tokens: int = 197, classes: int = 1000) -> Shapes:
    """ViT-B/16 at 224 x 224 pixels."""
    norm = ((width,), (width,))
    attention = _linear(width, 3 * width) + _linear(width, width)
    mlp = _linear(width, 4 * width) + _linear(4 * width, width)
    stem = ((1, 1, width), (1, tokens, width), (width, 3, patch, patch), (width,))
    return stem + (*norm, *attention, *norm, *mlp) * depth + norm + _linear(width, classes)


def moe(layers: int, width: int = 1024, keys: int = 512, hidden: int = 512, experts: int = 32) -> tuple[Shapes, ...]:
    """Layers of Granite-3.0-1B-A400M, which has 24: one group for each expert, and one for what all tokens pass."""
    shared = ((width, width), (keys, width), (keys, width), (width, width), (width,), (width,), (experts, width))
    expert = ((2 * hidden, width), (width, hidden))
    return (shared * layers, *(expert,) * (experts * layers))


@dataclass(frozen=True)
class Kind:
    """A model.

    Attributes:
        about: One line.
        groups: The shapes of its groups, given how many layers there are to be.
        layers: How many there are by default; None if their number is fixed.
        apart: Shapes of embeddings and output layers.
    """

    about: str
    groups: Callable[[int], tuple[Shapes, ...]]
    layers: int | None = None
    apart: Shapes = ()


KINDS = {
    "gpt2": Kind("GPT-2, 124M parameters", lambda _: (gpt2(),), apart=((50257, 768), (1024, 768))),
    "llama3-8b": Kind("layers of Llama-3-8B, 218M each", lambda layers: (llama3(layers),), layers=1),
    "resnet50": Kind("ResNet-50, 26M", lambda _: (resnet50(),), apart=((1000, 2048),)),
    "vit-b16": Kind("ViT-B/16, 87M", lambda _: (vit(),), apart=((1, 1, 768), (1, 197, 768), (1000, 768))),
    "moe": Kind("layers of Granite-3.0-1B-A400M, 53M each, a group per expert", moe, layers=8),
}
ACCEPTED = (
    ", ".join(name if kind.layers is None else f"{name}[:LAYERS]" for name, kind in KINDS.items())
    + ", or TENSORSxELEMENTS such as 10000x64"
)


def find(name: str) -> Suite:
    """A suite by name.

    Args:
        name: ``gpt2``, ``llama3-8b:4`` (so many layers) or ``10000x64`` (so many tensors of so many elements).

    Raises:
        ValueError: If there is none.
    """
    if flat := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name):
        count, numel = map(int, flat.groups())
        return Suite(name, (((numel,),) * count,))
    known = re.fullmatch(r"([\w-]+?)(?::([1-9]\d*))?", name)
    kind = KINDS.get(known[1]) if known else None
    if known is None or kind is None or (known[2] and kind.layers is None):
        raise ValueError(f"no suite is called {name!r}; there are {ACCEPTED}")
    layers = int(known[2] or kind.layers or 0)
    shown = name if kind.layers is None else f"{known[1]}:{layers}"
    return Suite(shown, kind.groups(layers), frozenset(kind.apart))
