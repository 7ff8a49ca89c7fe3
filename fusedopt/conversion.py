"""Masters of parameters, and states converted from one way to store them to another."""

# This is a friend of FusedOptimizer.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from fusedopt import checks, codecs, options, state_checks, storage
from fusedopt.aliases import ParamGroup, ParamState
from fusedopt.interrupts import held_back
from fusedopt.optimizer import FusedOptimizer
from fusedopt.options import MASTER, STATE_DTYPE, Master, StateDtype

Kept = Literal["kept"]


@torch.no_grad()
def master_weights(optimizer: FusedOptimizer) -> dict[Tensor, Tensor]:
    """What an optimizer's parameters stand for, for checkpoints and evaluation.

    Args:
        optimizer: Of this package.

    Returns:
        By parameter a new float32 tensor of its shape (complex64 of a complex one, float64 of a float64 one): its
        master, or itself where it has none. DTensors where parameters are.

    Raises:
        TypeError: If it is not an optimizer of this package.
        RuntimeError: Inside of ``averaged()``.
    """
    _require(optimizer, "master_weights()")
    found: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            values = storage.values(p, group, optimizer.state.get(p, {}))
            wide = values.to(torch.promote_types(values.dtype, torch.float32), copy=True)
            found[p] = storage.spread(p, wide, p.shape)
    return found


def convert_state(
    optimizer: FusedOptimizer,
    *,
    state_dtype: StateDtype | Kept | None = "kept",
    master: Master | Kept | None = "kept",
    groups: Iterable[int] | None = None,
) -> None:
    """Store an optimizer's states in another way from now on, those that there are among them.

    They may have been loaded from torch or from here. Values are rounded to what holds them; parameters keep their
    bits, and masters that are new are the parameters. States that a rule calls exact, averages and what the new way is
    not for stay float32. Memory for old and new states is taken at once.

    Args:
        optimizer: Of this package.
        state_dtype: None (float32), torch.bfloat16, "8bit"; or "kept".
        master: None, "fp32", "split", "stochastic"; or "kept".
        groups: Which param groups; all of them by default.

    Raises:
        TypeError: If it is not an optimizer of this package.
        ValueError: If parameters of a group cannot be stored so. Nothing has changed then.
        RuntimeError: Inside of ``averaged()``.

    Example:
        >>> optimizer.load_state_dict(saved_by_torch)
        >>> fusedopt.convert_state(optimizer, state_dtype="8bit", master="split")
    """
    _require(optimizer, "convert_state()")
    wanted = range(len(optimizer.param_groups)) if groups is None else sorted(set(groups))
    asked = {key: value for key, value in ((STATE_DTYPE, state_dtype), (MASTER, master)) if value != "kept"}
    plans: list[tuple[ParamGroup, ParamGroup]] = []
    for g in wanted:
        if not 0 <= g < len(optimizer.param_groups):
            raise ValueError(f"groups has {g}; the optimizer has {len(optimizer.param_groups)} param groups")
        group = {**optimizer.param_groups[g], **asked}
        options.settle(group, f" (group {g})")
        checks.group(optimizer.rule, group, g, stepping=True)
        plans.append((optimizer.param_groups[g], group))
    everyone = (p for group in optimizer.param_groups for p in group["params"])
    labels = dict(zip(everyone, checks.labels(optimizer.param_groups), strict=True))
    converted: dict[Tensor, ParamState] = {}
    for old, new in plans:
        for p in old["params"]:
            if state := optimizer.state.get(p):
                state_checks.state_tensors(optimizer.rule, p, state, labels[p])
                converted[p] = _converted(optimizer, p, old, new, state)
    with held_back(), optimizer._lock:
        for old, new in plans:
            for key in options.STORAGE:
                old.pop(key, None)
                old.update({key: new[key]} if key in new else {})
        for p, state in converted.items():
            optimizer.state[p].clear()
            optimizer.state[p].update(state)
        optimizer._stepper.plans.drop()


@torch.no_grad()
def _converted(optimizer: FusedOptimizer, p: Tensor, old: ParamGroup, new: ParamGroup, state: ParamState) -> ParamState:
    """A parameter's state as another group would have it; what stays as it is are the same tensors."""
    specs = {spec.name: spec for spec in optimizer.rule.states}
    ours = storage.own_names(optimizer.rule)
    made: ParamState = {}
    for name, value in state.items():
        if name not in specs or value is None:
            made.update({} if name in ours else {name: value})
            continue
        spec, codec = specs[name], storage.codec_of(specs[name], p, new)
        operand = storage.state_operand(spec, old, state)
        if codec.dtypes == operand.codec.dtypes:
            made.update({key: state[key] for key in (name, storage.scale_of(name)) if key in state})
        else:
            made.update(storage.state_of(spec, p, codecs.decode(operand, torch.float32), codec))
    name = storage.master_state(new)
    if name in state:
        made[name] = state[name]
    else:
        made.update(storage.master_of(p, storage.values(p, old, state), new))
    return made


def _require(optimizer: object, what: str) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"{type(optimizer).__name__} is not an optimizer of this package; see fusedopt.fuse")
    optimizer._refuse_averaged(what)
