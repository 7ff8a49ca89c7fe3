"""step_in_backward: step each parameter as soon as its gradient is there, so that they need not all exist at once."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.launch import Scaling, forks, threads_that_exist
from fusedopt.optimizer import FusedOptimizer
from fusedopt.plans import Plans


_UNSCALED = Scaling()


class StepInBackward:
    """What :func:`step_in_backward` returns.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._hooks = [
            p.register_post_accumulate_grad_hook(_Lone(optimizer, g, i))
            for g, group in enumerate(optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if p.requires_grad
        ]
        optimizer.steps_in_backward = True

    def remove(self) -> None:
        """Leave stepping to ``optimizer.step()`` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._optimizer.steps_in_backward = False


def step_in_backward(optimizer: FusedOptimizer) -> StepInBackward:
    """Step each parameter during ``backward()``, as soon as its gradient is there, and free the gradient.

    The optimizer stays what it is: one ``state_dict``, learning rates that schedulers write. ``optimizer.step()`` may
    be called as before; it steps what still has a gradient, such as parameters that were added later, and schedulers
    expect it. Hooks of steps run in it alone. Each ``backward()`` is a step: gradients cannot be accumulated over
    several.

    Args:
        optimizer: Whose parameters that require a gradient now are stepped so.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: If it is not an optimizer of this package.
        RuntimeError: If it does anything for which all gradients are needed: with ``max_grad_norm`` or
            ``skip_nonfinite``, also if they are set later, and under a GradScaler; or if it steps in backward already.
        ValueError: With ``differentiable=True``.

    Example:
        >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-4)
        >>> handle = fusedopt.step_in_backward(optimizer)
        >>> loss(model(x), y).backward()  # steps
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is no fused optimizer; fusedopt.fuse turns those of torch into one"
        )
    if optimizer.steps_in_backward:
        raise RuntimeError("the optimizer steps in backward already; remove() the handle of before first")
    for g, group in enumerate(optimizer.param_groups):
        if group["differentiable"]:
            raise ValueError(
                f"differentiable=True (group {g}) cannot be stepped in backward, which it is to be part of"
            )
    checks.needs_one_gradient(optimizer)
    return StepInBackward(optimizer)


class _Lone:
    """A hook that steps one parameter of an optimizer, with a plan of its own.

    Args:
        optimizer: The optimizer.
        g: The parameter's group.
        i: Its place there.
    """

    def __init__(self, optimizer: FusedOptimizer, g: int, i: int) -> None:
        self._optimizer, self._place = optimizer, (g, i)
        self._alone: dict[str, Any] = {"params": [optimizer.param_groups[g]["params"][i]]}  # the group, of it alone
        self._own = own = object.__new__(type(optimizer))
        own.__dict__.update(optimizer.__dict__)
        own.param_groups, own.state = [self._alone], defaultdict(dict)
        own._kept, own._statuses, own._retained, own._norm = Plans(), {}, [], None
        self._state: dict[str, Any] | None = None

    def __call__(self, p: Tensor) -> None:
        optimizer, own = self._optimizer, self._own
        if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite:
            checks.needs_one_gradient(optimizer)
        if not self._read_group(p):
            return
        state = optimizer.state.get(p)
        if state is not self._state:
            self._state = state
            own.state = defaultdict(dict, {} if state is None else {p: state})
        if not self._step_again():
            with torch.no_grad(), threads_that_exist():
                own._step(Scaling())
            if state is None and p in own.state:
                self._state = optimizer.state[p] = own.state[p]
        p.grad = None

    def _step_again(self) -> bool:
        """Do what the last step did, where that was one call of one plan; False, and nothing is done, if it is not."""
        planned = self._own._kept.last
        if planned is None or planned.settles or len(planned.plans) != 1 or forks() or torch.is_grad_enabled():
            return False
        (plan,) = planned.plans
        if not plan.indivisible:
            return False
        try:
            return plan.step(_UNSCALED, math.inf, False, False) is not None
        finally:
            plan.finish()

    def _read_group(self, p: Tensor) -> bool:
        """Take over what the parameter's group says now; False if it is in none any more."""
        groups, (g, i) = self._optimizer.param_groups, self._place
        if not (g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is p):
            places = [(g, i) for g, group in enumerate(groups) for i, q in enumerate(group["params"]) if q is p]
            if not places:
                return False
            self._place = g, i = places[0]
        group, params = groups[g], self._alone["params"]
        self._alone.update(group)
        self._alone["params"] = params
        if "param_names" in group:
            self._alone["param_names"] = [group["param_names"][i]]
        return True
