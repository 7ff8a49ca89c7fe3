"""A small character GPT and the English text it learns: what ``fusedopt demo`` trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of the model: layers, width, attention heads, and characters of context."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 64


class Text:
    """The topics of Python's own documentation as character numbers; the last tenth is held out."""

    characters: list[str]
    train: Tensor
    held_out: Tensor

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[key] for key in sorted(topics))
        self.characters = sorted(set(text))
        self._number = {c: i for i, c in enumerate(self.characters)}
        numbers = self.encode(text)
        held_out = len(numbers) // 10
        self.train, self.held_out = numbers[:-held_out], numbers[-held_out:]

    def encode(self, text: str) -> Tensor:
        """Numbers of the characters of a text."""
        return torch.tensor([self._number[c] for c in text])

    def decode(self, numbers: Tensor) -> str:
        """The text of which these are the numbers."""
        return "".join(self.characters[i] for i in cast("list[int]", numbers.tolist()))


def batch(numbers: Tensor, size: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random stretches of a text, and the same moved on by one character: what to predict.

    Args:
        numbers: The text.
        size: How many stretches.
        context: Their length.
        generator: Where the randomness comes from.
    """
    starts = torch.randint(len(numbers) - context, (size, 1), generator=generator)
    stretches = numbers[starts + torch.arange(context + 1)]
    return stretches[:, :-1], stretches[:, 1:]


class Block(nn.Module):
    """Attention, then a perceptron, each on normalised input and added to it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.heads: int = shape.heads
        self.norm1: nn.Module = nn.LayerNorm(width)
        self.norm2: nn.Module = nn.LayerNorm(width)
        self.qkv: nn.Module = nn.Linear(width, 3 * width)
        self.out: nn.Module = nn.Linear(width, width)
        self.mlp: nn.Module = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, width) to the same shape."""
        n, time, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, time, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions; the output shares the embedding's weights."""

    def __init__(self, characters: int, shape: Shape) -> None:
        super().__init__()
        self.context: int = shape.context
        self.embedding: nn.Embedding = nn.Embedding(characters, shape.width)
        self.position: nn.Embedding = nn.Embedding(shape.context, shape.width)
        self.blocks: nn.Module = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
        self.norm: nn.Module = nn.LayerNorm(shape.width)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, time, characters) of the character that follows each of (batch, time)."""
        x = self.embedding(x) + self.position.weight[: x.shape[1]]
        return functional.linear(self.norm(self.blocks(x)), self.embedding.weight)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """Mean cross-entropy, in nats per character."""
        return functional.cross_entropy(self(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def continue_text(
        self, prompt: Tensor, length: int, generator: torch.Generator, temperature: float = 0.7
    ) -> Tensor:
        """Draw characters that follow a prompt.

        Args:
            prompt: Character numbers.
            length: How many characters to draw.
            generator: Where the randomness comes from.
            temperature: Below 1: likelier characters more often.

        Returns:
            The prompt and what follows it.
        """
        numbers = prompt
        for _ in range(length):
            logits = self(numbers[None, -self.context :])[0, -1] / temperature
            drawn = torch.multinomial(logits.softmax(0), 1, generator=generator)
            numbers = torch.cat([numbers, drawn])
        return numbers
