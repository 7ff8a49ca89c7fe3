"""Gradients and Hessian-vector products of a loss at the parameters where it stands, by double backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedopt import memory

WIDE = (torch.float32, torch.float64)


class Point:
    """A loss's value and gradients; inside of a ``with``, products of its Hessian with vectors.

    One forward, whose random numbers are taken back, and one backward. Nothing is written to any ``grad``.

    Attributes:
        loss: The value.
        gradients: Of each parameter; None where the loss does not depend on it, or it needs no gradient.
    """

    def __init__(self, loss_fn: Callable[[], Tensor], params: Sequence[Tensor]) -> None:
        """Check the parameters; entering evaluates.

        Args:
            loss_fn: Returns the loss, a scalar.
            params: Float32 or float64.
        """
        if not any(p.requires_grad for p in params):
            raise RuntimeError("there is no parameter that requires grad")
        for i, p in enumerate(params):
            if p.dtype not in WIDE or memory.is_dtensor(p) or p.layout != torch.strided:
                what = "a DTensor" if memory.is_dtensor(p) else f"{p.dtype}, {p.layout}"
                raise TypeError(
                    f"parameter {i} (shape {tuple(p.shape)}) is {what}; second derivatives are taken of plain float32 "
                    "and float64 parameters (make a copy of the model with .float())"
                )
        self._loss_fn, self._params = loss_fn, params
        self._within = ExitStack()
        self._graph: list[tuple[int, Tensor]] = []
        self.loss: float = math.nan
        self.gradients: list[Tensor | None] = []

    def __enter__(self) -> Point:
        with ExitStack() as within:
            devices = {p.device for p in self._params if p.is_cuda}
            within.enter_context(cast("AbstractContextManager[None]", torch.random.fork_rng(devices)))
            within.enter_context(torch.enable_grad())
            # Fused attention has no second derivative.
            within.enter_context(cast("AbstractContextManager[object]", sdpa_kernel(SDPBackend.MATH)))
            self._differentiate(self._loss_fn())
            self._within = within.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._graph = []
        self._within.close()

    def _differentiate(self, loss: object) -> None:
        """Gradients with a graph of their own."""
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            what = f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}" if isinstance(loss, Tensor) else repr(loss)
            raise TypeError(f"loss_fn returned {what}; it must return the loss, a real tensor with one element")
        self.loss = loss.item()
        if not math.isfinite(self.loss):
            raise ValueError(f"the loss is {self.loss}; it must be finite")
        taken = [i for i, p in enumerate(self._params) if p.requires_grad]
        if not loss.requires_grad:
            raise RuntimeError("the loss that loss_fn returned depends on none of the parameters that require grad")
        wanted = [self._params[i] for i in taken]
        found = _derivatives(torch.autograd.grad(loss.reshape(()), wanted, create_graph=True, allow_unused=True))
        if all(g is None for g in found):
            raise RuntimeError("the loss that loss_fn returned depends on none of the parameters that require grad")
        self._graph = [(i, g) for i, g in zip(taken, found, strict=True) if g is not None]
        gradients = dict(self._graph)
        self.gradients = [gradients[i].detach() if i in gradients else None for i in range(len(self._params))]
        check_finite(self.gradients, "the gradient")

    def times(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian times a vector.

        Args:
            vectors: A tensor for each parameter, of its shape.

        Returns:
            The same of the product; zeros where there is no gradient.
        """
        curved = [(i, g) for i, g in self._graph if g.requires_grad]  # others are constant
        result: list[Tensor] = [torch.zeros_like(p, requires_grad=False) for p in self._params]
        if not curved:
            return result
        products = _derivatives(
            torch.autograd.grad(
                [g for _, g in curved],
                [self._params[i] for i, _ in self._graph],
                [vectors[i].to(g.dtype) for i, g in curved],
                retain_graph=True,
                allow_unused=True,
            )
        )
        for (i, _), product in zip(self._graph, products, strict=True):
            result[i] = result[i] if product is None else product.detach()
        return result


def _derivatives(found: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """What autograd says is of tensors alone, although it may have none of some."""
    return cast("tuple[Tensor | None, ...]", found)


def check_finite(tensors: Sequence[Tensor | None], what: str) -> None:
    """All elements of what is there are finite.

    Raises:
        ValueError: If one is not; it says of which tensor.
    """
    for i, t in enumerate(tensors):
        if t is not None and not bool(t.isfinite().all()):
            raise ValueError(f"{what} of parameter {i} (shape {tuple(t.shape)}) has elements that are not finite")
