"""Groups that become several, by what their parameters are."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from fusedopt.aliases import ParamGroup, is_group
from fusedopt.optimizer import FusedOptimizer


def tensor_of(member: object) -> object:
    """A member of a group, which may be a pair of a name and a parameter."""
    return cast("tuple[object, object]", member)[1] if isinstance(member, tuple) else member


class InParts(FusedOptimizer):
    """An optimizer whose groups say by ``algorithm`` how they are stepped, and are parted where they do not."""

    def add_param_group(self, param_group: ParamGroup) -> None:
        """Add a group of parameters; one whose parameters take several algorithms becomes several. See the class.

        Args:
            param_group: ``params``, and any options that differ from the defaults.

        Raises:
            ValueError: If an option is outside its domain, a parameter is given twice, or one is not for the group's
                algorithm.
            TypeError: If something is not of a type that torch.optim takes.
        """
        if not is_group(param_group) or isinstance(param_group.get("params"), set):
            return super().add_param_group(param_group)
        params: object = param_group["params"]
        members: list[Any] = [params] if isinstance(params, Tensor) else list(cast("Sequence[Any]", params))
        before = len(self.param_groups)
        try:
            for part in self._parts({**param_group, "params": members}):
                super().add_param_group(part)
        except Exception:
            del self.param_groups[before:]
            raise

    @abstractmethod
    def _parts(self, group: ParamGroup) -> list[ParamGroup]:
        """A group as those of the algorithms that its members take."""
