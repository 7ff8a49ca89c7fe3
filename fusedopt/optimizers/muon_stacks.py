"""The matrices that Muon steps, in stacks of equal shapes, for their function."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt import memory, storage
from fusedopt.aliases import Group
from fusedopt.newton_schulz import Iteration, Workspace, fastest_dtype, orthogonalize, reserve
from fusedopt.optimizers.muon_ranks import Cut, Everywhere, Exchange, Mover, cut_of, local_update
from fusedopt.ranks import Reduction

Shape = tuple[int, int]
Key = tuple[torch.device, torch.dtype, Shape, Iteration]  # what equal matrices have in common


@dataclass(eq=False, slots=True)
class Matrix:
    """A parameter that Muon steps.

    Attributes:
        number: Which of the optimizer's it is.
        p: The parameter.
        key: What it has in common with others.
        cut: How ranks have parts of it, if they do.
        update: What the function is of, then what it made; of the parameter's shape, and spread as it is.
        detached: The parameter without its gradient.
    """

    number: int
    p: Tensor
    key: Key
    cut: Cut | None
    update: Tensor = field(init=False)
    detached: Tensor = field(init=False)


@dataclass(eq=False, slots=True)
class _Stack:
    """Matrices of one shape, and what is done to them; those that are only here, or None if there are others."""

    values: Tensor
    iteration: Iteration
    matrices: list[Matrix] | None


def is_matrix(p: object) -> bool:
    """Whether Muon steps a parameter, unless its group says otherwise: a real one of two dimensions or more."""
    return isinstance(p, Tensor) and p.dim() > 1 and not p.is_complex()


def shape_of(p: Tensor) -> Shape:
    """What a parameter is as a matrix: whatever follows the first dimension is one."""
    return p.shape[0], math.prod(p.shape[1:])


def ratio(adjust_lr_fn: str | None, shape: Shape) -> float:
    """What the learning rate of a matrix is multiplied by; ``torch.optim.Muon`` says what each is for."""
    rows, columns = shape
    if not rows or not columns:
        return 1.0
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def matrix_of(number: int, p: Tensor, group: Group) -> Matrix:
    """A parameter of one of the optimizer's groups; number: which of the optimizer's it is."""
    shape = shape_of(p)
    dtype: torch.dtype | None = group["ns_dtype"]
    if dtype is None:
        dtype = torch.float64 if p.dtype == torch.float64 else fastest_dtype(p.device.type)
    a, b, c = map(float, group["ns_coefficients"])
    iteration = Iteration((a, b, c), int(group["ns_steps"]), float(group["eps"]), ratio(group["adjust_lr_fn"], shape))
    return Matrix(number, p, (p.device, dtype, shape, iteration), cut_of(p) if memory.is_dtensor(p) else None)


class Stacks:
    """Matrices, and memory for their function.

    Args:
        matrices: Which get their ``update`` and ``detached``.
        workspace: Of the function.
    """

    members: list[Matrix]

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, matrices: Iterable[Matrix], workspace: Workspace) -> None:
        self.members = list(matrices)
        self._workspace = workspace
        self._stacks: list[_Stack] = []
        self._movers: list[Mover] = []
        equal: dict[Key, list[Matrix]] = {}
        for matrix in self.members:
            equal.setdefault(matrix.key, []).append(matrix)
        exchanges, owned = self._exchanged([matrix for members in equal.values() for matrix in members])
        wholes = {id(m): whole for key, members in equal.items() for m, whole in self._stacked(key, members, owned)}
        for exchange, members in exchanges:
            exchange.put_into({i: wholes[id(m)] for i, m in enumerate(members) if id(m) in wholes})
            self._movers.append(exchange)
        for stack in self._stacks:
            reserve(stack.values, workspace)
        for matrix in self.members:
            matrix.detached = matrix.p.detach()
            matrix.update.grad_dtype = matrix.detached.grad_dtype = None  # of whatever dtype

    def _exchanged(self, matrices: Sequence[Matrix]) -> tuple[list[tuple[Exchange, list[Matrix]]], set[int]]:
        """What ranks exchange, of matrices of which equal ones follow one another; and which come together here."""
        among: dict[tuple[object, ...], list[Matrix]] = {}
        for matrix in matrices:
            if matrix.cut:
                device, dtype, *_ = matrix.key
                among.setdefault((matrix.cut.group, device, dtype), []).append(matrix)
        exchanges: list[tuple[Exchange, list[Matrix]]] = []
        owned: set[int] = set()
        for members in among.values():
            cuts = [matrix.cut for matrix in members if matrix.cut]
            size, rank = dist.get_world_size(cuts[0].group), dist.get_rank(cuts[0].group)
            owners = [i % size for i in range(len(members))]
            exchange = Exchange([matrix.p for matrix in members], cuts, members[0].key[1], owners)
            for matrix, part in zip(members, exchange.parts, strict=True):
                matrix.update = storage.spread(matrix.p, part, matrix.p.shape)
            owned |= {id(matrix) for matrix, owner in zip(members, owners, strict=True) if owner == rank}
            exchanges.append((exchange, members))
        return exchanges, owned

    def _stacked(self, key: Key, members: Sequence[Matrix], owned: set[int]) -> list[tuple[Matrix, Tensor]]:
        """Equal matrices, and where each is put together here, of the parameter's shape; those that are."""
        device, dtype, shape, iteration = key
        here = [matrix for matrix in members if not matrix.cut or id(matrix) in owned]
        if not here:
            return []
        values = torch.zeros(len(here), *shape, dtype=dtype, device=device)
        are_whole = [not Reduction.of(matrix.p).dims for matrix in here]
        self._stacks.append(_Stack(values, iteration, list(here) if all(are_whole) else None))
        places = [place.view(matrix.p.shape) for matrix, place in zip(here, values, strict=True)]
        for matrix, place, is_whole in zip(here, places, are_whole, strict=True):
            if is_whole:
                matrix.update = storage.spread(matrix.p, place, matrix.p.shape)
            elif not matrix.cut:
                matrix.update = local_update(matrix.p, dtype)
                self._movers.append(Everywhere(matrix.update, place))
        return list(zip(here, places, strict=True))

    def check(self) -> None:
        """It goes on with momenta, which the first launch looks at."""

    def apply(self, skipped: Tensor | None = None) -> None:
        """Put the function of updates in their place; what became of a step that was skipped is not looked at."""
        for mover in self._movers:
            mover.gather()
        for stack in self._stacks:
            if stack.matrices is None or any(matrix.update.grad is not None for matrix in stack.matrices):
                orthogonalize(stack.values, stack.iteration, self._workspace)
        for mover in self._movers:
            mover.scatter()
