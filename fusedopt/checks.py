"""Every validation and its message. A check raises, or returns nothing; none changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt.rule import LR, WEIGHT_DECAY, Group, Hyper, Rule

# Schedules computed by recurrence end a rounding error below zero; torch steps with that, and so do we.
SCHEDULE_ROUNDING = 1e-9

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NO_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)
COMPLEX = (torch.complex64, torch.complex128, torch.complex32)


def name_of(group: Group, group_index: int, index: int, tensor: Tensor) -> str:
    """How messages call a parameter: its place, its name if it has one, its shape and dtype."""
    names = group.get("param_names")
    called = f" {names[index]!r}" if names else ""
    return f"parameter {index}{called} of group {group_index} (shape {tuple(tensor.shape)}, {tensor.dtype})"


def number(value: Any, label: str, where: str) -> float:
    """A hyperparameter as a float."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{label}{where} is a tensor of shape {tuple(value.shape)}; it must have one element")
        return float(value.detach())
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{label}{where} is {value!r}; it must be a number or a one-element tensor") from None


def hyperparameter(hyper: Hyper, group: Group, where: str, *, stepping: bool = False) -> None:
    """One hyperparameter of a group lies in its domain."""
    if hyper.key not in group:
        raise ValueError(f"{hyper.key}{where} is missing from the param group")
    value = group[hyper.key]
    if hyper.index >= 0 and (not isinstance(value, (tuple, list)) or len(value) != 2):
        raise TypeError(f"{hyper.key}{where} is {value!r}; it must be a pair of numbers")
    result = number(hyper.of(group), hyper.label, where)
    low, high = step_domain(hyper) if stepping else hyper.closed_domain
    if not low <= result <= high:
        raise ValueError(f"{hyper.label}{where} is {result!r}; it must lie in {hyper.domain}")


def step_domain(hyper: Hyper) -> tuple[float, float]:
    """What a hyperparameter may be while training: as at construction, but for a schedule's rounding of lr."""
    low, high = hyper.closed_domain
    return (low - SCHEDULE_ROUNDING, high) if hyper == LR else (low, high)


def group(rule: type[Rule], group: Group, index: int, *, stepping: bool = False) -> None:
    """All of a group's hyperparameters, and torch's implementation flags."""
    where = f" (group {index})"
    for hyper in (LR, WEIGHT_DECAY, *rule.hyper, *rule.settings):
        hyperparameter(hyper, group, where, stepping=stepping)
    if conflict := rule.conflict(group):
        raise ValueError(f"{conflict}{where}")
    if group["fused"] and group["foreach"]:
        raise ValueError(f"fused and foreach{where} cannot both be True")
    if group["fused"] and group["differentiable"]:
        raise ValueError(f"fused and differentiable{where} cannot both be True")


def new_parameters(params: Iterable[Any], groups: Sequence[Group]) -> None:
    """No parameter of a new group is repeated in it or stands in an earlier one."""
    places = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
    for i, item in enumerate(params):
        p = item[1] if isinstance(item, tuple) else item
        if id(p) in places:
            g, first = places[id(p)]
            raise ValueError(
                f"parameter {i} (shape {tuple(getattr(p, 'shape', ()))}) of group {len(groups)} is also "
                f"parameter {first} of group {g}; each parameter may be given once"
            )
        places[id(p)] = (len(groups), i)


def options(max_grad_norm: Any, skip_nonfinite: Any) -> None:
    """Arguments of the optimizer as a whole."""
    if max_grad_norm is not None and not (number(max_grad_norm, "max_grad_norm", "") > 0):
        raise ValueError(f"max_grad_norm is {max_grad_norm!r}; it must be positive, or None for no clipping")
    if not isinstance(skip_nonfinite, bool):
        raise TypeError(f"skip_nonfinite is {skip_nonfinite!r}; it must be True or False")


def gradient(p: Tensor, g: Tensor, name: str, optimizer: str) -> None:
    """A gradient fits its parameter."""
    if p.dtype not in FLOATING + COMPLEX:
        raise TypeError(f"{name}: {optimizer} steps floating point and complex parameters only")
    if g.layout != torch.strided:
        kind = "sparse" if g.is_sparse else str(g.layout)
        raise RuntimeError(f"{name}: the gradient is {kind}; {optimizer} takes dense gradients (use g.to_dense())")
    if g.device != p.device:
        raise RuntimeError(f"{name}: the gradient is on {g.device}, the parameter on {p.device}")
    if misaligned(g):
        raise RuntimeError(f"{name}: the gradient is at an address that is not a multiple of its elements' size")
    if g.shape != p.shape:
        raise RuntimeError(f"{name}: the gradient has shape {tuple(g.shape)}")
    declared = getattr(p, "grad_dtype", p.dtype) if p.is_leaf else p.dtype
    if g.dtype != p.dtype and (g.dtype not in FLOATING or p.is_complex() or declared not in (None, g.dtype)):
        raise RuntimeError(f"{name}: the gradient has dtype {g.dtype}; it must have the parameter's")


def differentiable(p: Tensor, name: str) -> None:
    """Autograd can follow an in-place step of the parameter."""
    if p.is_leaf and p.requires_grad:
        raise RuntimeError(f"{name}: differentiable=True cannot step a leaf that requires grad; give it a clone")


def overlaps(t: Tensor) -> bool:
    """Whether elements may share memory, so that they cannot be stepped in place."""
    reach = 1
    dims = sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1)
    for stride, size in dims:
        if stride < reach and t.numel():
            return True
        reach = stride * (size - 1) + reach
    return False


def has_gaps(t: Tensor) -> bool:
    """Whether a tensor without overlaps leaves memory between its elements."""
    reach = 1 + sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))
    return t.numel() > 0 and reach != t.numel()


def misaligned(t: Tensor) -> bool:
    """Whether elements (of complex tensors their parts) do not lie at multiples of their size, as kernels expect."""
    return t.data_ptr() % (t.element_size() // (2 if t.is_complex() else 1)) != 0


def unsteppable(p: Tensor, group: Group) -> str | None:
    """Why no engine but eager can step a parameter, wherever it is; None if they can."""
    if group["differentiable"]:
        return "differentiable=True runs on engine 'eager'"
    if p.layout != torch.strided:
        return f"its layout is {p.layout}"
    if p.dtype not in FLOATING + COMPLEX:
        return f"its dtype is {p.dtype}"
    if getattr(type(p), "__torch_dispatch__", None) is not _NO_DISPATCH:
        return f"{type(p).__name__} is a tensor subclass with operations of its own"
    if overlaps(p):
        return f"its elements may overlap in memory (strides {p.stride()})"
    if misaligned(p):
        return f"its address {p.data_ptr():#x} is not a multiple of its elements' size"
    return None


def state_tensors(rule: type[Rule], p: Tensor, state: Mapping[str, Any], name: str) -> None:
    """The rule's states that a parameter has fit it; those it lacks are not asked for."""
    for key in {s.name for s in rule.states} & state.keys():
        value = state[key]
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise ValueError(f"state {key!r} of {name} is {type(value).__name__}, not a tensor")
        if value.shape != p.shape:
            raise ValueError(f"state {key!r} of {name} has shape {tuple(value.shape)}")
        if value.dtype not in (COMPLEX if p.is_complex() else FLOATING):
            raise ValueError(f"state {key!r} of {name} has dtype {value.dtype}")
        if misaligned(value):
            raise ValueError(f"state {key!r} of {name} is at an address that is not a multiple of its elements' size")
        if value.layout != torch.strided or overlaps(value):
            raise ValueError(f"state {key!r} of {name} is not a tensor with memory of its own for each element")
    for key in rule.scalars.keys() & state.keys():
        if not _is_float_elsewhere(state[key]):
            number(state[key], f"state {key!r} of {name}", "")


def _is_float_elsewhere(value: Any) -> bool:
    """Whether a value is a number for which a device would have to be waited for."""
    return isinstance(value, Tensor) and value.device.type != "cpu" and value.numel() == 1 and value.is_floating_point()


def state_devices(rule: type[Rule], p: Tensor, state: Mapping[str, Any], name: str) -> None:
    """A parameter's states are where it is."""
    for key in {s.name for s in rule.states} & state.keys():
        if state[key] is not None and state[key].device != p.device:
            raise RuntimeError(f"state {key!r} of {name} is on {state[key].device}, the parameter on {p.device}")


def whole_state(rule: type[Rule], state: Mapping[str, Any], group: Group, name: str) -> None:
    """A loaded state is empty, or has all that its group's options ask for."""
    needed = {s.name for s in rule.active_states(group)}
    required = needed | rule.scalars.keys()
    present = {key for key, value in state.items() if value is not None}
    if present and needed and required - present:
        raise ValueError(f"the state of {name} lacks {', '.join(sorted(required - present))}")
