"""Gradients and Hessian-vector products of a loss at the parameters where it stands, by double backward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel

from fusedopt import memory

WIDE = (torch.float32, torch.float64)
WITH_GENERATORS = ("cuda", "xpu")  # devices whose random numbers torch.random.fork_rng can set back
ONCE = "the loss cannot be differentiated twice: a function of it is once_differentiable"


class Point:
    """A loss's value and gradients; inside of a ``with``, products of its Hessian with vectors.

    One forward, whose random numbers (of torch, Python and numpy) are taken back, and one backward. Nothing is written
    to any ``grad``.

    Attributes:
        loss: The value.
        gradients: Of each parameter; None where the loss does not depend on it, or it needs no gradient.
    """

    def __init__(self, loss_fn: Callable[[], object], params: Sequence[Tensor]) -> None:
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
            within.enter_context(random_numbers_kept(self._params))
            within.enter_context(torch.inference_mode(False))  # which turns gradients on, inside of no_grad too
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
        if ends_early(g for _, g in self._graph):
            raise RuntimeError(ONCE)
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


def ends_early(values: Iterable[Tensor]) -> bool:
    """Whether autograd would leave out of a derivative what it cannot follow, since that leads nowhere.

    A function that is once_differentiable leaves a mark in the graph of its backward where its output's gradient
    depends on something. Where that is a constant (before a sum), the backward is one too, and there is no mark.
    """
    found, left = set[Node](), [value.grad_fn for value in values]
    while left:
        if (node := left.pop()) is None or node in found:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        found.add(node)
        left += [earlier for earlier, _ in node.next_functions]
    return False


@contextmanager
def random_numbers_kept(tensors: Iterable[Tensor]) -> Generator[None]:
    """Random numbers are as before, afterwards: torch's of the CPU and of tensors' devices, Python's and numpy's."""
    python, numpy = random.getstate(), np.random.get_state()
    devices: dict[str, set[int]] = {kind: set() for kind in WITH_GENERATORS}
    for t in tensors:
        if t.device.type in devices:
            devices[t.device.type].add(t.get_device())
    with ExitStack() as stack:
        for kind, indices in devices.items():
            if indices or kind == WITH_GENERATORS[0]:  # once at least, for the CPU's
                fork = cast("Callable[..., AbstractContextManager[None]]", torch.random.fork_rng)
                stack.enter_context(fork(sorted(indices), device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


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
