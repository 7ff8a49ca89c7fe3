"""Every validation and its message. A check raises, or returns nothing; none changes anything."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Real
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fusedopt import codecs, memory, storage
from fusedopt.aliases import Group
from fusedopt.operands import COMPLEX, FLOATING
from fusedopt.options import CAUTIOUS, STORAGE, settle
from fusedopt.rule import LR, Hyper, Rule

# Schedules computed by recurrence end a rounding error below zero; torch steps with that, and so do we.
SCHEDULE_ROUNDING = 1e-9

WIDE = (torch.float64, torch.complex128)  # stepped in double precision, others in float32
SIZES = {2: "a pair of numbers", 3: "three numbers"}  # of hyperparameters such as betas
LARGEST_FLOAT = torch.finfo(torch.float32).max


class Label:
    """How messages call a parameter: its place, its name if it has one, its shape and dtype."""

    __slots__ = ("_group", "_group_index", "_index", "_tensor")

    def __init__(self, group: Group, group_index: int, index: int, tensor: Tensor) -> None:
        self._group, self._group_index, self._index, self._tensor = group, group_index, index, tensor

    def __str__(self) -> str:
        names = self._group.get("param_names")
        called = f" {names[self._index]!r}" if names else ""
        try:
            shape = f"shape {tuple(self._tensor.shape)}"
        except RuntimeError:  # nested, or not initialised yet
            shape = type(self._tensor).__name__
        return f"parameter {self._index}{called} of group {self._group_index} ({shape}, {self._tensor.dtype})"


def labels(groups: Sequence[Group]) -> list[Label]:
    """What messages call all parameters, through all groups."""
    return [Label(group, g, i, p) for g, group in enumerate(groups) for i, p in enumerate(group["params"])]


def number(value: object, label: object, where: str) -> float:
    """A hyperparameter or counter as a float: of a real number, or a tensor or array with one real element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{label}{where} is a tensor of shape {tuple(value.shape)}; it must have one element")
        if value.is_complex():
            raise TypeError(f"{label}{where} is a tensor of {value.dtype}; it must be real")
        if short := memory.shortage(value):
            raise ValueError(f"{label}{where} is without its memory: {short}")
        return float(value.detach())
    if not isinstance(value, Real) and not (isinstance(value, np.ndarray) and not value.ndim):
        raise TypeError(f"{label}{where} is {value!r}; it must be a number or a one-element tensor")
    try:
        return float(cast("Real", value))
    except OverflowError:
        raise ValueError(f"{label}{where} is too large") from None


def one_number(value: object, name: str) -> None:
    """A number, or a real tensor with one element, whose value is not looked at."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return
    if isinstance(value, Tensor) or not isinstance(value, Real):
        what = f"a tensor of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} is {what}; it must be a number or a real tensor with one element")


def samples(value: object) -> None:
    """Losses of samples are there, and are numbers."""
    if not isinstance(value, Tensor) or not value.numel() or not value.is_floating_point():
        raise TypeError(f"per_sample_loss is {value!r}; it must be a floating point tensor with elements")


def hyperparameter(hyper: Hyper, size: int, group: Group, where: str, *, stepping: bool = False) -> None:
    """One hyperparameter of a group lies in its domain; it may be one of so many numbers of a tuple."""
    if hyper.key not in group:
        raise ValueError(f"{hyper.key}{where} is missing from the param group")
    value: object = group[hyper.key]
    if size and (not isinstance(value, (tuple, list)) or len(cast("Sequence[object]", value)) != size):
        raise TypeError(f"{hyper.key}{where} is {value!r}; it must be {SIZES[size]}")
    result = number(hyper.of(group), hyper.label, where)
    low, high = step_domain(hyper) if stepping else hyper.closed_domain
    if not low <= result <= high:
        raise ValueError(f"{hyper.label}{where} is {result!r}; it must lie in {hyper.domain}")
    if hyper.whole and not result.is_integer():
        raise ValueError(f"{hyper.label}{where} is {result!r}; it must be a whole number")
    if result > LARGEST_FLOAT and not hyper.infinite and is_narrow(group):
        raise ValueError(
            f"{hyper.label}{where} is {result!r}, more than parameters that are not float64 can be stepped with"
        )


def is_narrow(group: Group) -> bool:
    """Whether any parameter is stepped in single precision."""
    return any(p.dtype not in WIDE for p in group.get("params", ()))


def step_domain(hyper: Hyper) -> tuple[float, float]:
    """What a hyperparameter may be while training: as at construction, but for a schedule's rounding of lr."""
    low, high = hyper.closed_domain
    return (low - SCHEDULE_ROUNDING, high) if hyper == LR else (low, high)


def group(rule: type[Rule], group: Group, index: int, *, stepping: bool = False) -> None:
    """All of a group's hyperparameters, and torch's implementation flags."""
    where = f" (group {index})"
    for hyper in dict.fromkeys((*rule.engine_hyper(), *rule.hyper, *rule.settings)):
        hyperparameter(hyper, rule.size_of(hyper), group, where, stepping=stepping)
    for other in ("foreach", "differentiable"):
        if group["fused"] and group[other]:
            raise ValueError(f"fused and {other}{where} cannot both be True")
    if conflict := rule.conflict(group):
        raise ValueError(f"{conflict}{where}")
    settled = dict(group)
    settle(settled, where)
    if group.get(CAUTIOUS) and not rule.is_decoupled(group):
        flag = rule.decoupled()
        how = f"; {flag}=True decouples it" if isinstance(flag, str) else f", which {rule.name!r} does not have"
        raise ValueError(f"{CAUTIOUS}{where} needs decoupled weight decay{how}")
    stored(settled, index)


def stored(group: Group, index: int) -> None:
    """Parameters can be stored as a group asks for it, whose options are settled."""
    asked = [key for key in STORAGE if key in group]
    for i, p in enumerate(group["params"] if asked else ()):
        if reason := storage.illegal(group, p.dtype):
            raise ValueError(f"{Label(group, index, i, p)}: {reason}")
    if asked and group["differentiable"]:
        raise ValueError(f"{asked[0]}={group[asked[0]]!r} (group {index}) cannot be differentiable")


def new_parameters(params: Iterable[object], groups: Sequence[Group]) -> None:
    """No parameter of a new group stands in an earlier one. One that is repeated in it is torch's to warn of."""
    places = {id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
    for i, item in enumerate(params):
        p = cast("tuple[str, object]", item)[1] if isinstance(item, tuple) else item
        if id(p) in places:
            g, first = places[id(p)]
            raise ValueError(
                f"some parameters appear in more than one parameter group: parameter {i} (shape "
                f"{tuple(getattr(p, 'shape', ()))}) of group {len(groups)} is also parameter {first} of group {g}"
            )


def options(max_grad_norm: object, skip_nonfinite: object, process_group: object, handles_amp: object) -> None:
    """Arguments of the optimizer as a whole."""
    if max_grad_norm is not None:
        max_norm(max_grad_norm, "max_grad_norm", ", or None for no clipping")
    if not isinstance(skip_nonfinite, bool):
        raise TypeError(f"skip_nonfinite is {skip_nonfinite!r}; it must be True or False")
    if not isinstance(handles_amp, bool):
        raise TypeError(f"handles_amp is {handles_amp!r}; it must be True or False")
    if process_group is not None and not isinstance(process_group, getattr(torch.distributed, "ProcessGroup", ())):
        raise TypeError(f"process_group is {process_group!r}; it must be a torch.distributed.ProcessGroup, or None")


def kind(name: str, value: object, kind: type, what: str) -> None:
    """An argument is what it has to be."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__}; it must be {what}")


def max_norm(value: object, name: str, otherwise: str = "") -> None:
    """A norm to which gradients are clipped."""
    if not number(value, name, "") > 0:
        raise ValueError(f"{name} is {value!r}; it must be positive{otherwise}")


def scope(rule: type[Rule], asked: str | None) -> str:
    """Over what an optimizer's rule takes its sums."""
    if unknown := ", ".join(sorted(set(rule.scopes) - {"tensor", "channel", "group", "all"})):
        raise ValueError(f"{rule.__name__}.scopes has {unknown}; there are tensor, channel, group and all")
    if asked is None:
        return rule.scopes[0]
    if asked not in rule.scopes:
        raise ValueError(f"scope is {asked!r}; it may be {', '.join(map(repr, rule.scopes))}")
    return asked


def gradient(rule: type[Rule], p: Tensor, g: Tensor, group: Group, name: object, optimizer: str) -> None:
    """A gradient fits its parameter, and both have their memory."""
    if group["fused"] and p.device.type == "meta":
        raise RuntimeError(f"{name}: `fused=True` requires all the params to be on devices with memory, not {p.device}")
    if p.dtype not in FLOATING + COMPLEX:
        raise TypeError(f"{name}: {optimizer} steps floating point and complex parameters only")
    if memory.is_dtensor(g) or memory.is_dtensor(p):
        placement(p, g, f"{name}: the gradient", RuntimeError)
    if g.layout == torch.sparse_coo and rule.sparse:
        sparse_gradient(p, g, group, name)
    elif g.layout != torch.strided:
        kind = "sparse" if g.is_sparse else str(g.layout)
        raise RuntimeError(f"{name}: the gradient is {kind}; {optimizer} takes dense gradients (use g.to_dense())")
    if g.device != p.device:
        raise RuntimeError(f"{name}: the gradient is on {g.device}, the parameter on {p.device}")
    for what, t in (("parameter", p), ("gradient", g)):
        if short := memory.shortage(memory.local(t)):
            raise RuntimeError(f"{name}: the {what} is without its memory: {short}")
    if memory.misaligned(memory.local(g)):
        raise RuntimeError(f"{name}: the gradient is at an address that is not a multiple of its elements' size")
    if not (p.is_nested or g.is_nested) and g.shape != p.shape:
        raise RuntimeError(f"{name}: the gradient has shape {tuple(g.shape)}")
    declared = getattr(p, "grad_dtype", p.dtype) if p.is_leaf else p.dtype
    if g.dtype != p.dtype and (g.dtype not in FLOATING or p.is_complex() or declared not in (None, g.dtype)):
        raise RuntimeError(f"{name}: the gradient has dtype {g.dtype}; it must have the parameter's")


def sparse_gradient(p: Tensor, g: Tensor, group: Group, name: object) -> None:
    """A sparse gradient has what it moves, and nothing else of the parameter moves."""
    if p.layout != torch.strided or p.device.type == "meta":
        what = "on meta" if p.layout == torch.strided else "sparse"
        raise RuntimeError(f"{name}: the gradient is sparse, and so the parameter cannot be {what}")
    if number(group.get("weight_decay", 0.0), "weight_decay", ""):
        raise RuntimeError(
            f"{name}: the gradient is sparse, and weight_decay={group['weight_decay']} moves everything; set it to 0, "
            "or use g.to_dense()"
        )
    indices, sizes = g._indices(), torch.tensor(g.shape[: g.sparse_dim()], device=g.device)[:, None]
    if indices.numel() and not ((indices >= 0) & (indices < sizes)).all():
        raise RuntimeError(f"{name}: the gradient is sparse, and has indices outside of its shape {tuple(g.shape)}")


def placement(p: Tensor, t: Tensor, what: str, kind: type[Exception], *, is_like: bool = True) -> None:
    """A tensor that belongs to a parameter is a DTensor if that is one, on the same ranks and in the same parts.

    Args:
        p: The parameter.
        t: The tensor.
        what: Messages call it.
        kind: Of what is raised.
        is_like: Whether it has the parameter's shape; else it is the scales of its blocks.
    """
    if not memory.is_dtensor(p) or not memory.is_dtensor(t):
        here, there = ("a DTensor" if memory.is_dtensor(x) else "no DTensor" for x in (t, p))
        raise kind(f"{what} is {here}, the parameter is {there}")
    mesh, placements = p.device_mesh, p.placements
    if any(placed.is_partial() for placed in placements):
        raise kind(f"{what} cannot be stepped with: the parameter is a sum of parts (placements {placements})")
    if t.device_mesh != mesh or t.placements != placements:
        raise kind(f"{what} is placed as {t.placements} on {t.device_mesh}, the parameter as {placements} on {mesh}")
    own, its = tuple(memory.local(p).shape), tuple(memory.local(t).shape)
    if its != (own if is_like else codecs.scales_shape(own)):
        raise kind(f"{what} has a part of shape {its} here, the parameter of shape {own}")


def differentiable(p: Tensor, name: object) -> None:
    """Autograd can follow an in-place step of the parameter."""
    if p.is_leaf and p.requires_grad:
        raise RuntimeError(f"{name}: differentiable=True cannot step a leaf that requires grad; give it a clone")


def tensors_are_whole(rule: type[Rule], scope: str, groups: Sequence[Group], optimizer: str) -> None:
    """No parameter is known to be a piece of a tensor, or of several, over all of which the rule must add up."""
    if not rule.has_sums() or scope in ("group", "all"):
        return
    for label, p in zip(labels(groups), (p for group in groups for p in group["params"]), strict=True):
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(
                f"{label} is a piece of tensors that FullyShardedDataParallel flattened, and "
                f"{optimizer} adds up over whole tensors; shard with fully_shard, whose DTensors say how"
            )


def norm_is_whole(groups: Sequence[Group]) -> None:
    """No parameter is known to be sharded by what does not say among which ranks."""
    for label, p in zip(labels(groups), (p for group in groups for p in group["params"]), strict=True):
        if getattr(p, "_fsdp_flattened", False):
            raise RuntimeError(
                f"{label} is sharded among ranks by FullyShardedDataParallel, and what is added up over gradients "
                "(max_grad_norm, skip_nonfinite, a rule's sums) would be of this rank's part only; give the optimizer "
                "the ranks among which it is sharded, as process_group=model.process_group"
            )
