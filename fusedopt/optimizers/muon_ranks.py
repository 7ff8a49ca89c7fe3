"""Matrices that ranks have parts of: for their function each is put together on one rank, and taken apart again.

Whose it is goes round: of equal matrices each rank has as many as any other, or one more. What happens depends on how
parameters are placed, never on which gradients there are, so that all ranks meet.
"""

# DTensors have no public names for what is asked of them.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt import memory, storage
from fusedopt.aliases import ProcessGroup
from fusedopt.ranks import Reduction


class Cut(NamedTuple):
    """How a parameter is cut into parts along one of its dimensions.

    Attributes:
        group: The ranks that have them.
        dim: The dimension.
    """

    group: ProcessGroup
    dim: int

    def parts(self, p: Tensor) -> list[tuple[int, int]]:
        """Where along the dimension each rank's part begins, and its length."""
        length, size = p.shape[self.dim], dist.get_world_size(self.group)
        each = -(-length // size)
        begins = [min(rank * each, length) for rank in range(size)]
        return [(begin, min(each, length - begin)) for begin in begins]


def cut_of(p: Tensor) -> Cut | None:
    """How ranks have parts of a parameter; None if each has the whole, or its parts are not such of one dimension."""
    from torch.distributed.tensor import Shard

    reduction = Reduction.of(p)
    if len(reduction.dims) != 1 or reduction.mesh is None or not memory.is_dtensor(p):
        return None
    placement = p.placements[reduction.dims[0]]
    if type(placement) is not Shard:
        return None
    return Cut(reduction.mesh.get_group(reduction.dims[0]), placement.dim % p.dim())


class Mover(Protocol):
    """What brings parts of matrices together, and apart again."""

    def gather(self) -> None:
        """Put matrices together."""
        ...

    def scatter(self) -> None:
        """Take them apart."""
        ...


class Exchange:
    """Matrices that are cut among the same ranks.

    Args:
        params: The parameters.
        cuts: How each is cut; all among the same ranks.
        dtype: Of the matrices.
        owners: Of each, the rank in the group that puts it together.

    Attributes:
        parts: Of each, what this rank has of it, where the function's argument is written and its value is found.
    """

    parts: list[Tensor]

    def __init__(
        self, params: Sequence[Tensor], cuts: Sequence[Cut], dtype: torch.dtype, owners: Sequence[int]
    ) -> None:
        self._group = cuts[0].group
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        device = params[0].device
        shapes = [[_part_shape(p, cut, of) for of in range(size)] for p, cut in zip(params, cuts, strict=True)]
        own = [i for i, owner in enumerate(owners) if owner == rank]
        sent = sorted(range(len(params)), key=lambda i: owners[i])
        self._send = [sum(math.prod(shapes[i][rank]) for i in sent if owners[i] == of) for of in range(size)]
        self._receive = [sum(math.prod(shapes[i][of]) for i in own) for of in range(size)]
        self._here = torch.zeros(sum(self._send), dtype=dtype, device=device)
        self._there = torch.zeros(sum(self._receive), dtype=dtype, device=device)
        parts = dict(zip(sent, _views(self._here, [shapes[i][rank] for i in sent]), strict=True))
        self.parts = [parts[i] for i in range(len(params))]
        received = [(i, of) for of in range(size) for i in own]
        self._received = list(zip(received, _views(self._there, [shapes[i][of] for i, of in received]), strict=True))
        self._places = {i: (cuts[i].dim, cuts[i].parts(params[i])) for i in own}
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def put_into(self, wholes: dict[int, Tensor]) -> None:
        """Say where the matrices that are this rank's are put together, of the parameters' shapes, by their numbers."""
        self._pairs = []
        for (i, of), received in self._received:
            dim, parts = self._places[i]
            self._pairs.append((received, wholes[i].narrow(dim, *parts[of])))

    def gather(self) -> None:
        """Put the matrices together, each on its owner."""
        dist.all_to_all_single(self._there, self._here, self._receive, self._send, group=self._group)
        for received, place in self._pairs:
            place.copy_(received)

    def scatter(self) -> None:
        """Give each rank its parts."""
        for received, place in self._pairs:
            received.copy_(place)
        dist.all_to_all_single(self._here, self._there, self._send, self._receive, group=self._group)


class Everywhere:
    """A matrix that is placed in some other way: every rank puts it together.

    Args:
        update: What the rank has of it, a DTensor.
        whole: Where it is put together.
    """

    def __init__(self, update: Tensor, whole: Tensor) -> None:
        self._update, self._whole = update, whole

    def gather(self) -> None:
        """Put it together."""
        assert memory.is_dtensor(self._update)
        self._whole.copy_(self._update.full_tensor())

    def scatter(self) -> None:
        """Keep this rank's part."""
        from torch.distributed.tensor import DTensor, Replicate

        assert memory.is_dtensor(self._update)
        mesh = self._update.device_mesh
        everywhere = DTensor.from_local(self._whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        memory.local(self._update).copy_(everywhere.redistribute(placements=self._update.placements)._local_tensor)


def local_update(p: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor for a parameter's update, spread as that is."""
    here = memory.local(p)
    return storage.spread(p, torch.zeros(here.shape, dtype=dtype, device=here.device), p.shape)


def _part_shape(p: Tensor, cut: Cut, rank: int) -> list[int]:
    shape = list(p.shape)
    shape[cut.dim] = cut.parts(p)[rank][1]
    return shape


def _views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """Tensors of the shapes, one after another in a flat one."""
    sizes = [math.prod(shape) for shape in shapes]
    parts = cast("Sequence[Tensor]", flat.split(sizes)) if shapes else ()
    return (part.view(list(shape)) for part, shape in zip(parts, shapes, strict=True))
