"""fuse: turn a live optimizer of another package into ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from fusedopt.aliases import ParamGroup, ParamState, ProcessGroup
from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers import OPTIMIZERS
from fusedopt.state import adopt_state, widened

Make = Callable[..., FusedOptimizer]

PACKAGES = ("torch", "timm", "lion_pytorch", "adabound", "adamp", "prodigyopt", "schedulefree")
CALLED = {"AdamWScheduleFree": "ScheduleFreeAdamW", "SGDScheduleFree": "ScheduleFreeSGD"}  # what we call otherwise
COUNTED = {"k": "step"}  # what groups count and we call otherwise, where a rule has nothing of that name
OFF = {"slice_p": 1}  # what options are where they do nothing, if that is not falsy
FOUND = {"d_hat", "d_denom", "scheduled_lr"}  # what steps of prodigyopt and schedulefree leave in groups for readers


def fuse(
    optimizer: torch.optim.Optimizer,
    *,
    max_grad_norm: float | None = None,
    skip_nonfinite: bool = False,
    process_group: ProcessGroup | None = None,
    handles_amp: bool = True,
    engine: str = "auto",
) -> FusedOptimizer:
    """Turn a live optimizer into its fused counterpart, state included.

    The new optimizer shares the old one's param group dicts and state tensors, so that schedulers made
    for the old one still move the learning rate, and no memory is spent. Don't step the old one again.

    Args:
        optimizer: Of torch.optim, timm, lion-pytorch, adabound, adamp, prodigyopt or schedulefree; a class we have.
        max_grad_norm: See ``fusedopt.FusedOptimizer``.
        skip_nonfinite: See there.
        process_group: See there.
        handles_amp: See there.
        engine: See there.

    Returns:
        The fused optimizer.

    Raises:
        TypeError: If there is no counterpart.
        ValueError: If it uses an option that the counterpart does not have.

    Example:
        >>> optimizer = fusedopt.fuse(torch.optim.AdamW(model.parameters()))
    """
    counterpart = _counterpart(optimizer)
    counts = _counts(optimizer, counterpart)
    _refuse_foreign_options(optimizer, counterpart)
    groups = [_completed(optimizer, i) for i in range(len(optimizer.param_groups))]
    fused = cast("Make", counterpart)(
        [dict(g) for g in groups],
        max_grad_norm=max_grad_norm,
        skip_nonfinite=skip_nonfinite,
        process_group=process_group,
        handles_amp=handles_amp,
        engine=engine,
    )
    for live, checked in zip(optimizer.param_groups, fused.param_groups, strict=True):
        live.update({key: value for key, value in checked.items() if live.get(key) is None})
    fused.param_groups = optimizer.param_groups
    fused.defaults.update({k: v for k, v in optimizer.defaults.items() if k in fused.defaults})
    for group, counted in zip(fused.param_groups, counts, strict=True):
        for key in counted:
            del group[key]
        for p in group["params"]:
            if state := optimizer.state.get(p):
                scalars = {_called(counterpart, key): value for key, value in counted.items()}
                theirs = widened(counterpart.rule, _shaped(counterpart, p, {**scalars, **state}))
                fused.state[p] = adopt_state(counterpart.rule, p, theirs, copy=False)
    for name, hooks in vars(optimizer).items():
        if name.endswith("_hooks"):
            getattr(fused, name).update(hooks)
    return fused


def _counterpart(optimizer: torch.optim.Optimizer) -> type[FusedOptimizer]:
    """Our class of another package's optimizer."""
    kind = type(optimizer)
    if isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"{kind.__name__} is a fused optimizer already")
    name = CALLED.get(kind.__name__, kind.__name__)
    if kind.__module__.partition(".")[0] not in PACKAGES or name not in OPTIMIZERS:
        raise TypeError(
            f"{kind.__module__}.{kind.__name__} has no fused counterpart; there are {', '.join(OPTIMIZERS)}"
        )
    return OPTIMIZERS[name]


def _completed(optimizer: torch.optim.Optimizer, index: int) -> ParamGroup:
    """A param group with what another package keeps elsewhere."""
    group = optimizer.param_groups[index]
    base_lrs = getattr(optimizer, "base_lrs", None)  # adabound: a list made at construction
    return {"base_lr": base_lrs[index], **group} if base_lrs else group


def _options(ours: type[FusedOptimizer]) -> set[str]:
    """What our param groups have."""
    return set(cast("Make", ours)([torch.nn.Parameter(torch.zeros(()))]).param_groups[0])


def _counts(optimizer: torch.optim.Optimizer, ours: type[FusedOptimizer]) -> list[ParamGroup]:
    """What groups count for all their parameters, timm's ``step`` for one; here each parameter has its own."""
    scalars = ours.rule.scalars.keys() - _options(ours)
    return [
        {key: value for key, value in group.items() if _called(ours, key) in scalars}
        for group in optimizer.param_groups
    ]


def _called(ours: type[FusedOptimizer], key: str) -> str:
    """What we call something that a group counts."""
    return key if key in ours.rule.scalars else COUNTED.get(key, key)


def _shaped(ours: type[FusedOptimizer], p: Tensor, state: ParamState) -> ParamState:
    """A state whose tensors have the parameter's shape; prodigyopt's are flat, or one number where all are the same."""
    shaped = dict(state)
    for name in {spec.name for spec in ours.rule.states} & state.keys():
        value: object = state[name]
        if isinstance(value, Tensor) and not value.is_sparse and value.shape != p.shape:
            shaped[name] = value.view(p.shape) if value.dim() else value.expand(p.shape).clone()
    return shaped


def _refuse_foreign_options(optimizer: torch.optim.Optimizer, ours: type[FusedOptimizer]) -> None:
    known = _options(ours) | ours.rule.scalars.keys() | {"initial_lr", "param_names", "max_lr_snapshot"}
    for i, group in enumerate(optimizer.param_groups):
        for key in {key for key in group.keys() - FOUND if _called(ours, key) not in known}:
            scheduled = key in ("max_lr", "min_lr", "max_momentum", "base_momentum")  # OneCycleLR's and CyclicLR's own
            if group[key] and not scheduled and group[key] != OFF.get(key):
                raise ValueError(f"group {i} has {key}={group[key]!r}, which fusedopt.{ours.__name__} does not have")
    if getattr(optimizer, "decoupled_wd", False):
        raise ValueError(
            "lion-pytorch's decoupled_weight_decay divides weight_decay by the initial lr; set it so yourself"
        )
