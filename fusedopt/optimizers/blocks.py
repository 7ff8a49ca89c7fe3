"""Blocks of the Fisher matrix: what they are of a parameter, their averages, and their inverses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt import checks, codecs, memory, storage
from fusedopt.aliases import Group, Stored
from fusedopt.context import Context
from fusedopt.options import STEP
from fusedopt.rule import State, bias_correction

FISHER, INVERSE = "fisher", "fisher_inverse"
MOST_ELEMENTS = 2**22  # of blocks that are inverted at once, unless one has more: 32 MiB in double, and twice as much


def block_size(p: Tensor) -> int:
    """How many elements a block of a parameter is of: those of a kernel, or of a row of a matrix; 0 of vectors."""
    if p.dim() < 2 or p.is_complex() or not p.numel():
        return 0
    return p.shape[1] if p.dim() == 2 else math.prod(p.shape[2:])


def blocks_shape(p: Tensor) -> tuple[int, ...]:
    """The shape of a parameter's blocks: (out, in, k, k) of kernels of k elements, (in, in) of a matrix."""
    size = block_size(p)
    return (size, size) if p.dim() == 2 else (*p.shape[:2], size, size)


def cut(p: Tensor) -> str | None:
    """Why a DTensor's blocks are not whole here; None if they are, or if it is none."""
    if not memory.is_dtensor(p):
        return None
    along = 1 if p.dim() == 2 else 2  # the first dimension inside of blocks
    if all(at.is_replicate() or any(map(at.is_shard, range(along))) for at in p.placements):
        return None
    return f"is placed as {p.placements}, which cuts its blocks"


@dataclass(eq=False, slots=True)
class Blocked:
    """A parameter that has blocks.

    Attributes:
        number: Which of the optimizer's it is.
        p: The parameter.
        update: Its gradient, then what is made of it; float32 or wider, of its shape, and spread as it is.
        detached: The parameter without its gradient.
        steps: How many steps it has done, once that is known.
        counted: The state that it was known of.
    """

    number: int
    p: Tensor
    update: Tensor
    detached: Tensor
    steps: int = 0
    counted: object = field(default=None)


@torch.inference_mode(False)
@torch.no_grad()
def blocked(number: int, p: Tensor) -> Blocked:
    """A parameter; number: which of the optimizer's it is."""
    dtype = torch.promote_types(p.dtype, torch.float32)
    here = torch.zeros(memory.local(p).shape, dtype=dtype, device=p.device)
    member = Blocked(number, p, storage.spread(p, here, p.shape), p.detach())
    member.update.grad_dtype = member.detached.grad_dtype = None  # of whatever dtype
    return member


class Blocks:
    """What is done to the parameters that have blocks, between both launches of a step.

    Args:
        members: They.
        momentum: The state that their momentum is.
        first: The first launch, which steps their updates.
        whole: The optimizer, whose states get ``fisher`` and ``fisher_inverse``.
    """

    members: list[Blocked]

    def __init__(self, members: Iterable[Blocked], momentum: State, first: Context, whole: Context) -> None:
        self.members = list(members)
        self._momentum, self._first, self._whole = momentum, first, whole

    def check(self) -> None:
        """Raise for blocks that are not a parameter's own."""
        for member in self.members:
            state = self._whole.state.get(member.p)
            if state and (FISHER in state or self._momentum.name in state):
                check_blocks(
                    member.p, state, lambda member=member: checks.labels(self._whole.param_groups)[member.number]
                )

    @torch.no_grad()
    def apply(self, skipped: Tensor | None) -> None:
        """Take gradients into blocks, and put momenta times their inverses in the gradients' place.

        Args:
            skipped: 1 where a device has skipped the step, whose gradients are then left out; None if it has not.
        """
        groups = {id(update): group for update, group in self._first.everyone()}
        for member in self.members:
            if member.update.grad is not None:
                self._apply(member, groups[id(member.update)], skipped)

    def _apply(self, member: Blocked, group: Group, skipped: Tensor | None) -> None:
        p, before = member.p, self._first.state[member.update]
        every = int(group["inverse_every"])
        count(member, before[STEP], every, skipped is not None)
        state, value = self._whole.state[p], memory.local(member.update)
        is_new = state.get(INVERSE) is None
        for name in (FISHER, INVERSE):
            if state.get(name) is None:
                state[name] = _new(p, value)
            elif state[name].dtype != value.dtype or not memory.local(state[name]).is_contiguous():  # loaded
                state[name] = state[name].to(value.dtype).contiguous()
        fisher, inverse = memory.local(state[FISHER]), memory.local(state[INVERSE])
        beta = float(group["beta"])
        update_average(p, fisher, value, beta, skipped)
        if is_new or (member.steps - 1) % every == 0:
            invert(fisher, bias_correction(beta, member.steps), float(group["damping"]), inverse)
        momentum = codecs.decode(storage.state_operand(self._momentum, group, before), value.dtype)
        if p.dim() == 2:
            torch.mm(momentum.reshape(value.shape), inverse, out=value)
        else:
            columns = (*value.shape[:2], fisher.shape[-1], 1)
            torch.matmul(inverse, momentum.reshape(columns), out=value.view(columns))


def count(member: Blocked, step: Tensor, every: int, may_skip: bool) -> None:
    """Know how many steps a parameter has done.

    Args:
        member: Which knows it afterwards.
        step: The first launch's counter of it.
        every: How many steps it is from one inversion to the next.
        may_skip: Whether devices skip steps by themselves. They are waited for where it would be time to invert, and
            where the state is another.
    """
    member.steps += 1
    if member.counted is not step or (may_skip and (member.steps - 1) % every == 0):
        member.counted, member.steps = step, round(float(step))


def _new(p: Tensor, value: Tensor) -> Tensor:
    """Blocks of 0, of as much of a parameter as is here."""
    shape = blocks_shape(p)
    if p.dim() == 2:
        return value.new_zeros(shape)
    here = value.new_zeros(*value.shape[:2], *shape[2:])
    return storage.spread(p, here, shape)


def check_blocks(p: Tensor, state: Stored, name: Callable[[], object]) -> None:
    """Raise for blocks in a parameter's state that are not its own, or lacking though it was stepped.

    Args:
        p: The parameter.
        state: Its state.
        name: What messages call it.
    """
    if state.get(FISHER) is None:
        raise ValueError(f"the state of {name()} lacks {FISHER!r}, which a parameter that was stepped has")
    for key in (FISHER, INVERSE):
        value = state.get(key)
        if key == INVERSE and value is None:
            continue  # which can be made anew
        if not isinstance(value, Tensor) or tuple(value.shape) != blocks_shape(p) or not block_size(p):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            fits = f"it must have shape {blocks_shape(p)}" if block_size(p) else "the parameter has no blocks"
            raise ValueError(f"state {key!r} of {name()} is {shape}; {fits}")
        if value.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise ValueError(f"state {key!r} of {name()} has dtype {value.dtype}; it must be real and floating point")
        if p.dim() > 2 and memory.is_dtensor(p) != memory.is_dtensor(value):
            raise ValueError(f"state {key!r} of {name()} is not spread among ranks as the parameter is")
        if value.is_sparse or memory.shortage(value) or value.device.type != p.device.type:
            raise ValueError(f"state {key!r} of {name()} is no dense tensor on {p.device} with all of its memory")


def update_average(p: Tensor, fisher: Tensor, g: Tensor, beta: float, skipped: Tensor | None) -> None:
    """``fisher <- beta fisher + (1 - beta) g g^T``, of matrices with the mean over all rows; not of a skipped step.

    Args:
        p: The parameter.
        fisher: As much of its blocks as is here.
        g: As much of its gradient as is here.
        beta: The decay rate.
        skipped: 1 where a device has skipped the step; None if it has not.
    """
    after = fisher if skipped is None else fisher.clone()
    after.mul_(beta)
    if p.dim() == 2:
        after.add_(_products_of_rows(p, g), alpha=(1 - beta) / p.shape[0])
    else:
        kernels = g.reshape(*g.shape[:2], -1)
        columns, rows = (kernels.unsqueeze(dim).expand_as(after) for dim in (-1, -2))
        after.addcmul_(columns, rows, value=1 - beta)
    if skipped is not None:
        fisher.copy_(torch.where(skipped.to(fisher.device) != 0, fisher, after))


def _products_of_rows(p: Tensor, g: Tensor) -> Tensor:
    """The sum of the outer products of all rows of a matrix, of whose gradient some are here."""
    products = g.T @ g
    if memory.is_dtensor(p):
        for dim, at in enumerate(p.placements):
            if at.is_shard():
                dist.all_reduce(products, group=p.device_mesh.get_group(dim))
    return products


def invert(fisher: Tensor, correction: float, damping: float, inverse: Tensor) -> None:
    """``inverse <- (fisher / correction + damping)^-1``, in double, some blocks at a time.

    Where blocks are not positive even so, their inverses stay.
    """
    size = fisher.shape[-1]
    dtype = torch.float32 if fisher.device.type == "mps" else torch.float64
    blocks, places = fisher.view(-1, size, size), inverse.view(-1, size, size)
    some = max(1, MOST_ELEMENTS // size**2)
    for first in range(0, len(blocks), some):
        wide, place = blocks[first : first + some].to(dtype, copy=True), places[first : first + some]
        wide.div_(correction).diagonal(dim1=-2, dim2=-1).add_(damping)
        if size == 1:
            place.copy_(wide.reciprocal_())
            continue
        factors, failed = cast("tuple[Tensor, Tensor]", torch.linalg.cholesky_ex(wide))
        has_failed = (failed != 0)[:, None, None]  # whose factors cannot be divided by
        factors = torch.where(has_failed, torch.eye(size, dtype=dtype, device=factors.device), factors)
        place.copy_(torch.where(has_failed, place, torch.cholesky_inverse(factors)))
