"""Weights whose length does not matter, because a normalisation follows, are put back to unit length after a step.

A group asks for it by ``rescale``: "channel" (each slice of dimension 0), "tensor", or "all" (all tensors of the
groups that say so, as one vector); and by ``rescale_every``, in every how many steps. What a gradient then moves is the
direction alone, with a learning rate that stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from fusedopt import codecs, memory, noise, storage
from fusedopt.aliases import ParamGroup
from fusedopt.context import Context
from fusedopt.interrupts import held_back
from fusedopt.options import ALL, AVERAGE, CHANNEL, EMA, EVERY, RESCALE, RESCALE_STEP, settle_rescale
from fusedopt.ranks import Ranks, Reduction, reduced
from fusedopt.state import NewState


def is_asked(context: Context) -> bool:
    """Whether any group of an optimizer asks for it. What it asks for is checked."""
    asking = [g for g, group in enumerate(context.param_groups) if RESCALE in group]
    for g in asking:
        settle_rescale(context.param_groups[g], f" (group {g})")
    return bool(asking)


def after_step(context: Context, new_state: NewState) -> None:
    """Put what asks for it to unit length, after a step that happened.

    Args:
        context: Of the optimizer.
        new_state: Which parameter, and the names of states that were made for the step.
    """
    new = {id(p) for _, p, names in new_state if "ema" in names}
    everyone = (p for group in context.param_groups for p in group["params"])
    with held_back():
        rescale(context, {id(p): id(p) in new for p in everyone if p.grad is not None})


@dataclass(slots=True)
class _Part:
    """A parameter that is to be rescaled, its group, and the squares of its slices' lengths here.

    ``number`` is that of the parameter, counted through all groups.
    """

    number: int
    p: Tensor
    group: ParamGroup
    squares: Tensor
    reduction: Reduction


@torch.no_grad()
def rescale(context: Context, stepped: Mapping[int, bool]) -> None:
    """Put an optimizer's parameters to unit length.

    Args:
        context: Of the optimizer.
        stepped: By the ids of the parameters that were stepped, whether their states were made for the step.
    """
    due: list[tuple[int, Tensor, ParamGroup]] = []
    number = 0
    for group in context.param_groups:
        if RESCALE in group:
            group[RESCALE_STEP] += 1
            if group[RESCALE_STEP] % group[EVERY] == 0:
                due += [(number + k, p, group) for k, p in enumerate(group["params"])]
        number += len(group["params"])
    parts = [_measured(context, *one) for one in due]
    ranks = Ranks([part.p for part in parts], context.process_group)
    _add_up(parts, ranks)
    whole = _whole([part for part in parts if part.group[RESCALE] == ALL], ranks)
    goes = any(id(part.p) in stepped for part in parts if part.group[RESCALE] == ALL)
    for part in parts:
        if part.group[RESCALE] == ALL and whole is not None and (goes or ranks.process_group is not None):
            _apply(context, part, whole.to(part.squares.device), stepped)
        elif part.group[RESCALE] != ALL and id(part.p) in stepped:
            _apply(context, part, part.squares, stepped)


def _measured(context: Context, number: int, p: Tensor, group: ParamGroup) -> _Part:
    kind, here = group[RESCALE], storage.values(p, group, context.state.get(p, {}))
    wide = torch.promote_types(here.dtype, torch.float32).to_real()
    has_channels = kind == CHANNEL and here.dim() > 1
    rows = here.flatten(1) if has_channels else here.reshape(1, here.numel())
    rows = torch.view_as_real(rows.resolve_conj()).flatten(1) if rows.is_complex() else rows
    squares = cast("Tensor", torch.linalg.vector_norm(rows, dim=1, dtype=wide)).square()
    reduction = Reduction.of(p)
    if has_channels and reduction.dims:
        across = [d for d in reduction.dims if getattr(p, "placements", ())[d].dim % p.dim() != 0]
        reduction = Reduction(reduction.mesh, tuple(across)) if across else Reduction()
    return _Part(number, p, group, squares, reduction)


def _add_up(parts: list[_Part], ranks: Ranks) -> None:
    """Over the ranks among which a slice is cut into pieces, whatever gradients there are."""
    if not ranks.have_dtensors:
        return
    for reduction in dict.fromkeys(part.reduction for part in parts if part.reduction.dims):
        cut = [part for part in parts if part.reduction == reduction]
        flat = torch.cat([part.squares.double() for part in cut])
        flat = reduced(flat, reduction.groups(), torch.distributed.ReduceOp.SUM)
        pieces = cast("Sequence[Tensor]", flat.split([len(part.squares) for part in cut]))
        for part, squares in zip(cut, pieces, strict=True):
            part.squares = squares


def _whole(parts: list[_Part], ranks: Ranks) -> Tensor | None:
    """The square of the length of all tensors together."""
    if not parts:
        return None
    total = torch.stack([part.squares.double().sum().to(parts[0].squares.device) for part in parts]).sum(0, True)
    return reduced(total, ranks.everyone(), torch.distributed.ReduceOp.SUM)


def _apply(context: Context, part: _Part, squares: Tensor, stepped: Mapping[int, bool]) -> None:
    """Divide slices by their length, but for those of length 0, and where lr is 0 or the device skipped the step."""
    here, group = storage.values(part.p, part.group, context.state.get(part.p, {})), part.group
    if not here.numel():
        return
    factor = torch.where(squares > 0, squares.rsqrt(), torch.ones_like(squares))
    for stays in _stays(context, group, here.device):
        factor = torch.where(stays, torch.ones_like(factor), factor)
    factor = factor.reshape([-1, *[1] * (here.dim() - 1)]) if len(factor) > 1 else factor.reshape(())
    wide = torch.promote_types(here.dtype, torch.float32)
    moved = here.to(wide) * factor.to(torch.float64 if wide in (torch.float64, torch.complex128) else torch.float32)
    if isinstance(group.get(AVERAGE), EMA) and id(part.p) in stepped:
        average = memory.local(context.state[part.p]["ema"])
        weight = 1.0 if stepped[id(part.p)] else 1 - float(group[AVERAGE].decay)
        average.add_((moved - here).to(average.dtype), alpha=weight)
    _write(context, part, moved)


def _write(context: Context, part: _Part, moved: Tensor) -> None:
    """Round a parameter's new values into it."""
    state = context.state.get(part.p, {})
    operand, words = storage.param_operand(part.p, part.group, state), None
    if operand.codec.draws:
        step = int(part.group[RESCALE_STEP])
        words = noise.rounding(context, part.number, part.p, part.group, "param", step, noise.RESCALED)
    codecs.encode(operand, codecs.real(moved), words)


def _stays(context: Context, group: ParamGroup, device: torch.device) -> Iterator[Tensor]:
    """Conditions in which nothing moves."""
    if isinstance(group["lr"], Tensor):
        yield group["lr"].detach().to(device, non_blocking=True).reshape(()) == 0
    elif not group["lr"]:
        yield torch.ones((), dtype=torch.bool, device=device)
    for (of, _), status in context.statuses.items():
        if of == device:
            yield status.skipped != 0
