"""Many ranks: which of them have the parts of a parameter, and what they find out and decide together.

Which collectives run in a step, and in which order, depends on how parameters are placed and on the optimizer's
options, never on which gradients there are: a rank that has none takes part with nothing.
"""

# DTensors have no public names for what is asked of them.
# pyright: reportPrivateUsage=false

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt import memory
from fusedopt.aliases import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Reduction:
    """The ranks among which some parameters are cut into parts.

    Attributes:
        mesh: The parameters' device mesh; None where each has its own, whole.
        dims: The mesh's dimensions along which they are sharded. Along others they are replicated.
    """

    mesh: DeviceMesh | None = None
    dims: tuple[int, ...] = ()

    @classmethod
    def of(cls, p: Tensor) -> Reduction:
        """That of a parameter."""
        if not memory.is_dtensor(p):
            return cls()
        mesh, placements = p.device_mesh, p.placements
        if mesh.get_coordinate() is None:  # this rank has nothing of it
            return cls()
        dims = tuple(d for d, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(d) > 1)
        return cls(mesh, dims) if dims else cls()

    def groups(self) -> Iterator[ProcessGroup]:
        """Process groups; reduced over one after another, sums are those of the whole."""
        for d in self.dims:
            assert self.mesh is not None
            yield self.mesh.get_group(d)


class Ranks:
    """What the ranks of an optimizer's parameters do together.

    Args:
        params: All parameters.
        process_group: Of ranks with other parameters, or other parts of these; None if there are none.

    Attributes:
        reductions: All that there are, in the order in which they are done.
        are_many: Whether there is anything to do together.
        have_dtensors: Whether any parameter is a DTensor.
        matter: Whether either is so.
        are_hidden: Whether some parameter is sharded among ranks that nobody named.
    """

    reductions: tuple[Reduction, ...]
    have_dtensors: bool
    are_many: bool
    matter: bool
    are_hidden: bool

    def __init__(self, params: Iterable[Tensor], process_group: ProcessGroup | None) -> None:
        params = list(params)
        self.have_dtensors = any(map(memory.is_dtensor, params))
        self.reductions = tuple(dict.fromkeys(map(Reduction.of, params))) if self.have_dtensors else (Reduction(),)
        self.process_group = process_group
        self.are_many = process_group is not None or any(reduction.dims for reduction in self.reductions)
        self.matter = self.are_many or self.have_dtensors
        self.are_hidden = process_group is None and any(getattr(p, "_fsdp_flattened", False) for p in params)

    def refuse_overlap(self) -> None:
        """Raise where ``process_group`` would add up once more what is added up over a mesh."""
        everyone: set[int] = set(dist.get_process_group_ranks(self.process_group)) if self.process_group else set()
        for reduction in self.reductions:
            for group in reduction.groups():
                common = everyone.intersection(dist.get_process_group_ranks(group))
                if len(common) > 1:
                    raise RuntimeError(
                        f"process_group has ranks {sorted(common)}, among which DTensors are sharded already (mesh "
                        f"{reduction.mesh}): their norm would be added up twice. DTensors show of themselves how they "
                        "are sharded; process_group is for ranks that have other parameters"
                    )

    def sum(self, parts: Iterable[tuple[Reduction, Tensor]]) -> Tensor:
        """The sum over all parameters on all ranks, of one tensor for some of them each."""
        parts = list(parts)
        like = parts[0][1] if parts else torch.zeros((), dtype=torch.float64)
        total = torch.zeros_like(like)
        for reduction in self.reductions:
            parts_here = [part.to(like.device) for of, part in parts if of == reduction]
            total = total + reduced(sum(parts_here, torch.zeros_like(like)), reduction.groups(), dist.ReduceOp.SUM)
        return reduced(total, self.everyone(), dist.ReduceOp.SUM)

    def maximum(self, value: Tensor) -> Tensor:
        """The largest value of any rank."""
        groups = dict.fromkeys(group for reduction in self.reductions for group in reduction.groups())
        return reduced(value, [*groups, *self.everyone()], dist.ReduceOp.MAX)

    def everyone(self) -> list[ProcessGroup]:
        """The process group, if there is one."""
        return [] if self.process_group is None else [self.process_group]


def reduced(value: Tensor, groups: Iterable[ProcessGroup], op: dist.ReduceOp.RedOpType) -> Tensor:
    """A value reduced over groups, one after another; it is left as it is."""
    device, value = value.device, value.detach().clone()
    for group in groups:
        kind = _device_of(group)
        value = value if value.device.type == kind else value.to(kind)
        dist.all_reduce(value, op, group)
    return value.to(device)


def _device_of(group: ProcessGroup) -> str:
    """The kind of device on which a group reduces, whichever has the value here: on other ranks it may be another."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(",") if ":" in pair)
    for kind, backend in backends.items():
        if kind != "cpu" and backend != "gloo" and torch.get_device_module(kind).is_available():
            return kind
    return "cpu"


def are_there() -> bool:
    """Whether this process is one of several that have met."""
    return dist.is_available() and dist.is_initialized()


def settle_gradients(params: Iterable[Tensor]) -> None:
    """Bring gradients that are placed otherwise than their parameters, such as partial sums, to where these are.

    Each is replaced by one of the same value, so that nothing is communicated twice.
    """
    for p in params:
        g = p.grad
        if g is None or not memory.is_dtensor(p) or not memory.is_dtensor(g):
            continue
        if g._spec is not p._spec and g.device_mesh == p.device_mesh and g.placements != p.placements:
            p.grad = g = g.redistribute(placements=p.placements)
        if wait := getattr(g._local_tensor, "trigger_wait", None):  # it is still under way
            g._local_tensor = wait()
