"""The matrix function of Muon: a Newton-Schulz iteration on stacks of matrices of one shape.

For X of singular values in [0, 1], ``X <- a X + b (X X^T) X + c (X X^T)^2 X`` takes each singular value s to
``a s + b s^3 + c s^5``; with Muon's coefficients five times of it bring them near 1, and what is left is near the
orthogonal factor of the polar decomposition. Sources: Jordan et al., "Muon", 2024; Higham, "Functions of Matrices",
chapter 8.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, cast

import torch
from torch import Tensor

# Bytes of the matrices that are worked on at once. On a CPU they are to stay in its caches: of GPT-2's, one of 768 x
# 3072 at a time; by ten, the iteration takes 1.1 times as long. A GPU takes many to be filled.
WORKED_ON = {"cpu": 1 << 24}
WORKED_ON_ELSEWHERE = 1 << 28


class Iteration(NamedTuple):
    """What is done to a matrix.

    Attributes:
        coefficients: a, b and c.
        steps: How many times.
        eps: The least Frobenius norm that is divided by at first.
        scale: What the result is multiplied by.
    """

    coefficients: tuple[float, float, float]
    steps: int
    eps: float
    scale: float = 1.0


class Workspace:
    """Memory for the iteration, which is used again and again. It is as large as what was worked on at once.

    What it has outgrown it keeps: a graph may work in it.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
        self._outgrown: list[Tensor] = []

    def take(self, like: Tensor, which: int, *shape: int) -> Tensor:
        """A tensor of a shape, which shares memory with others that were taken as the same."""
        key, numel = (like.device, like.dtype, which), torch.Size(shape).numel()
        flat = self._flat.get(key)
        if flat is None or flat.numel() < numel:
            self._outgrown += [] if flat is None else [flat]
            flat = self._flat[key] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return flat[:numel].view(shape)


@torch.no_grad()
def orthogonalize(stack: Tensor, iteration: Iteration, workspace: Workspace) -> None:
    """Put the function of matrices in their place.

    Args:
        stack: Matrices, (k, m, n), of the dtype that is computed in; contiguous. Whichever of m and n is less, the
            products are of that size.
        iteration: What to do.
        workspace: Memory for it.
    """
    for part in cast("Sequence[Tensor]", stack.split(_at_once(stack))):
        _iterate(part, iteration, workspace)


@torch.no_grad()
def reserve(stack: Tensor, workspace: Workspace) -> None:
    """Take the memory that ``orthogonalize`` needs for a stack."""
    _taken(stack[: _at_once(stack)], workspace)


def _at_once(stack: Tensor) -> int:
    """How many matrices of a stack are worked on at once."""
    m, n = stack.shape[1:]
    each = (2 * m * n + 2 * min(m, n) ** 2) * stack.element_size()
    return max(1, WORKED_ON.get(stack.device.type, WORKED_ON_ELSEWHERE) // max(each, 1))


def _taken(x: Tensor, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for two products, and for matrices of a part."""
    k, m, n = x.shape
    side = min(m, n)
    gram, polynomial = (workspace.take(x, which, k, side, side) for which in (0, 1))
    return gram, polynomial, workspace.take(x, 2, k, m, n)


# Products with `out` are not cast by autocast, whatever is on where the step is called.
def _iterate(x: Tensor, iteration: Iteration, workspace: Workspace) -> None:
    (a, b, c), steps, eps, scale = iteration
    k, m, n = x.shape
    gram, polynomial, there = _taken(x, workspace)
    here = x
    wide = torch.promote_types(x.dtype, torch.float32)
    lengths = cast("Tensor", torch.linalg.vector_norm(x.view(k, m * n), dim=1, dtype=wide))
    # An odd number of steps, each from one place to the other, ends where it should if the first begins elsewhere.
    target = there if steps % 2 else here
    torch.mul(x, (1.0 if steps else scale) * lengths.clamp(min=eps).reciprocal().to(x.dtype).view(k, 1, 1), out=target)
    here, there = (there, here) if steps % 2 else (here, there)
    for step in range(steps):
        last = scale if step == steps - 1 else 1.0
        left = here if m <= n else here.mT
        torch.bmm(left, left.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        pair = (polynomial, here) if m <= n else (here, polynomial)
        torch.baddbmm(here, *pair, beta=a * last, alpha=last, out=there)
        here, there = there, here


@cache
def fastest_dtype(kind: str) -> torch.dtype:
    """What the iteration is computed in on a kind of device, unless it is said: what that multiplies fastest.

    Muon's authors take bfloat16, which suffices. A CPU without tiles for it multiplies float32 faster: 310 against 160
    GFLOP/s on two cores with AVX-512 and its bfloat16 instructions.
    """
    if kind != "cpu":
        return torch.bfloat16
    has_tiles = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if has_tiles() else torch.float32
