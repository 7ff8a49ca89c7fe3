"""Types that torch leaves without a name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup as ProcessGroup
else:
    ProcessGroup = object  # not every build of torch has torch.distributed's

Group = Mapping[str, Any]  # a param group that is read: parameters in "params", and options by their keys
ParamGroup = dict[str, Any]  # one that is written, too
ParamGroups = list[ParamGroup]  # those of an optimizer
Stored = Mapping[str, Any]  # a parameter's state that is read: tensors by their names
ParamState = dict[str, Any]  # one that is written, too
States = MutableMapping[Any, ParamState]  # all of an optimizer, by parameter
Arguments = dict[str, Any]  # of a call, by their names
Memory = dict[str, Any]  # what a textbook loop keeps of a tensor, or is told
Json = dict[str, Any]  # what a command writes
StateDict = dict[str, Any]  # what an optimizer saves
Member = tuple[Tensor, ParamGroup]  # a parameter with its group

ParamsT = Iterable[Tensor] | Iterable[ParamGroup] | Iterable[tuple[str, Tensor]]

Values = SimpleNamespace  # numbers by their names: hyperparameters, scalars, coefficients, sums
Tensors = dict[str, Tensor]  # of a rule's states, by their names


def is_group(value: object) -> TypeGuard[ParamGroup]:
    """Whether somebody gave a param group, which may be anything."""
    return isinstance(value, dict)
