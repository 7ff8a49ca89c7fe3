"""Averages of the weights: reading them, and putting them in the place of the parameters for a while."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor

from fusedopt import options
from fusedopt.aliases import Group
from fusedopt.interrupts import held_back


class KeepsAverages(torch.optim.Optimizer):
    """What an optimizer does with the averages that its steps keep, see ``average`` of ``FusedOptimizer``."""

    _lock: threading.RLock
    _is_averaged = False

    def average_of(self, p: Tensor) -> Tensor:
        """The average of a parameter's values: its state ``ema`` or ``slow`` itself, not a copy.

        Args:
            p: A parameter of a group that has an average.

        Returns:
            A tensor of the parameter's shape, float32 or wider, on its device; before the parameter's first step, the
            parameter itself without its graph.

        Raises:
            ValueError: If the parameter is not this optimizer's, or its group has no average.
        """
        for group in self.param_groups:
            if any(q is p for q in group["params"]):
                if options.average_state(group) is None:
                    raise ValueError("the parameter's group keeps no average; give the optimizer or the group average=")
                average = self._average(p, group)
                return p.detach() if average is None else average
        raise ValueError("the parameter is in none of this optimizer's groups")

    def _average(self, p: Tensor, group: Group) -> Tensor | None:
        """A parameter's average, once it has one."""
        spec = options.average_state(group)
        return spec and self.state.get(p, {}).get(spec.name)

    @contextmanager
    def averaged(self) -> Generator[None, None, None]:
        """In this context the parameters hold their averages; after it, whatever happens, their own bits again.

        It takes as much memory as the parameters that have averages. Parameters without one stay as they are. The
        optimizer cannot step inside, and changes that are made to those parameters are lost.

        Raises:
            RuntimeError: If they hold them already, or no group keeps an average.

        Example:
            >>> with optimizer.averaged():
            ...     loss = evaluate(model)
        """
        with self._lock:
            if self._is_averaged:
                raise RuntimeError("averaged() inside of averaged(): the parameters hold their averages already")
            if not any(map(options.average_state, self.param_groups)):
                raise RuntimeError("averaged() needs an average: no group of this optimizer keeps one")
            kept = self._with_copies()
            self._is_averaged = True
        try:
            with self._lock:
                _put((p, average) for p, average, _ in kept)
            yield
        finally:
            with held_back(), self._lock:
                _put((p, own) for p, _, own in kept)
                self._is_averaged = False

    def _refuse_averaged(self, what: str = "a step") -> None:
        """Raises where the parameters do not hold their own values."""
        if self._is_averaged:
            raise RuntimeError(f"{what} inside of averaged(), where the parameters hold their averages")

    def _with_copies(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Parameters that have averages, these, and copies of the parameters; all before any is written."""
        found: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                average = self._average(p, group)
                if average is not None:
                    found[id(p)] = p, average, p.detach().clone(memory_format=torch.preserve_format)
        return list(found.values())


@torch.no_grad()
def _put(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    for p, value in pairs:
        p.copy_(value)
    torch.clear_autocast_cache()  # which has casts of what the parameters were
