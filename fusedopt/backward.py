"""step_in_backward: step each parameter as soon as its gradient is there, so that they need not all exist at once."""

# This is a friend of FusedOptimizer.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fusedopt.aliases import ParamGroup, ParamState
from fusedopt.context import StepRequest
from fusedopt.forking import forks, threads_that_exist
from fusedopt.interrupts import held_back
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import RESCALE
from fusedopt.scaling import Scaling
from fusedopt.sums import ALL, GROUP


class StepInBackward:
    """What ``step_in_backward`` returns.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._lone = [
            _Lone(optimizer, g, i)
            for g, group in enumerate(optimizer.param_groups)
            for i, p in enumerate(group["params"])
            if p.requires_grad
        ]
        self._hooks: list[RemovableHandle] = [
            lone.p.register_post_accumulate_grad_hook(_weakly(lone)) for lone in self._lone
        ]
        optimizer._in_backward = self

    def remove(self) -> None:
        """Leave stepping to ``optimizer.step()`` again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._lone = [], []
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None


def _weakly(lone: _Lone) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimizer alive: the collector of garbage does not see through a tensor's hooks."""
    reference = weakref.ref(lone)

    def hook(p: Tensor) -> None:
        if found := reference():
            found.step(p)

    return hook


def step_in_backward(optimizer: FusedOptimizer) -> StepInBackward:
    """Step each parameter during ``backward()``, as soon as its gradient is there, and free the gradient.

    The optimizer stays what it is: one ``state_dict``, learning rates that schedulers write. ``optimizer.step()`` may
    be called as before; it steps what still has a gradient, such as parameters that were added later, and schedulers
    expect it. Hooks of steps run in it alone. Each ``backward()`` is a step: gradients cannot be accumulated over
    several, and a gradient that is there already is part of the first one.

    Args:
        optimizer: Whose parameters that require a gradient now are stepped so, for as long as it lives.

    Returns:
        A handle whose ``remove()`` ends it.

    Raises:
        TypeError: If it is not an optimizer of this package.
        RuntimeError: If it does anything for which all gradients are needed: with ``max_grad_norm`` or
            ``skip_nonfinite``, also if they are set later; or if it steps in backward already. A GradScaler's ``step``
            raises too, but a backward pass of a scaled loss has stepped by then.
        ValueError: With ``differentiable=True``, or if a parameter is given twice.

    Example:
        >>> optimizer = fusedopt.AdamW(model.parameters(), lr=1e-4)
        >>> handle = fusedopt.step_in_backward(optimizer)
        >>> loss(model(x), y).backward()  # steps
    """
    _require(optimizer)
    if optimizer._in_backward:
        raise RuntimeError("the optimizer steps in backward already; remove() the handle of before first")
    for g, group in enumerate(optimizer.param_groups):
        if group["differentiable"]:
            raise ValueError(
                f"differentiable=True (group {g}) cannot be stepped in backward, which it is to be part of"
            )
    places = [id(p) for group in optimizer.param_groups for p in group["params"]]
    if len(set(places)) < len(places):
        raise ValueError("a parameter is given twice: it would be stepped once in backward, and twice by step()")
    _refuse_what_needs_all(optimizer)
    return StepInBackward(optimizer)


def _require(optimizer: object) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"{type(optimizer).__name__} is no fused optimizer; fusedopt.fuse turns those of torch into one"
        )


def _refuse_what_needs_all(optimizer: FusedOptimizer) -> None:
    """Raises unless each parameter can be stepped as soon as its own gradient is there."""
    for name, value in (("max_grad_norm", optimizer.max_grad_norm), ("skip_nonfinite", optimizer.skip_nonfinite)):
        if value not in (None, False):
            raise RuntimeError(f"{name}={value!r} needs all gradients at once, and this optimizer steps in backward")
    if optimizer.steps_together:
        raise RuntimeError(f"{optimizer.steps_together}, and this optimizer steps in backward")
    if any(RESCALE in group for group in optimizer.param_groups):
        raise RuntimeError("rescale comes after the step of all parameters, and this optimizer steps in backward")
    if optimizer.rule.has_sums() and optimizer.scope in (GROUP, ALL):
        raise RuntimeError(
            f"{type(optimizer).__name__} adds up over {optimizer.scope!r}, which needs all gradients at once, and it "
            "steps in backward"
        )


class _Lone:
    """Steps one parameter of an optimizer, with a plan of its own.

    Args:
        optimizer: The optimizer.
        g: The parameter's group.
        i: Its place there.
    """

    def __init__(self, optimizer: FusedOptimizer, g: int, i: int) -> None:
        self._optimizer, self._place = optimizer, (g, i)
        self.p: Tensor = optimizer.param_groups[g]["params"][i]
        self._alone: ParamGroup = {"params": [self.p]}  # the group, of it alone
        whole = optimizer._bring_up_to_date()
        self._context = replace(whole, param_groups=[self._alone], state={}, numbers=[0], statuses={}, retained=[])
        self._stepper = optimizer._stepper_of(self._context)
        self._state: ParamState | None = None
        self._number()

    def step(self, p: Tensor) -> None:
        """Step it, whose gradient is there."""
        optimizer, context = self._optimizer, self._context
        optimizer._refuse_averaged()
        if optimizer.max_grad_norm is not None or optimizer.skip_nonfinite or RESCALE in self._alone:
            _refuse_what_needs_all(optimizer)
        if not self._read_group(p):
            return
        state: ParamState | None = optimizer.state.get(p)
        if state is not self._state or state is None:
            self._state = state = {} if state is None else state
            context.state = defaultdict(dict, {p: state})
        if self._step_again():
            return
        context.engine = optimizer.engine
        with held_back():
            try:
                with torch.no_grad(), threads_that_exist():
                    self._stepper.step(StepRequest(Scaling(), increments_versions=optimizer.increments_versions))
            finally:
                if state or p in optimizer.state:
                    optimizer.state[p] = state
            p.grad = None

    def _step_again(self) -> bool:
        """Do what the last step did, where one call of one plan does it; False, and nothing is done, if none does."""
        if forks() or torch.is_grad_enabled():
            return False
        return self._stepper.step_again_and_free(self._optimizer.increments_versions)

    def _number(self) -> None:
        """Which parameter of the optimizer it is."""
        g, i = self._place
        self._context.numbers = [sum(len(group["params"]) for group in self._optimizer.param_groups[:g]) + i]

    def _read_group(self, p: Tensor) -> bool:
        """Take over what the parameter's group says now; False if it is in none any more."""
        groups, (g, i) = self._optimizer.param_groups, self._place
        if not (g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is p):
            places = [(g, i) for g, group in enumerate(groups) for i, q in enumerate(group["params"]) if q is p]
            if not places:
                return False
            self._place = g, i = places[0]
            self._number()
        group, params = groups[g], self._alone["params"]
        self._alone.update(group)
        self._alone["params"] = params
        if "param_names" in group:
            self._alone["param_names"] = [group["param_names"][i]]
        return True
