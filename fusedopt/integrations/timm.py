"""timm: the optimizers under names of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import cast

from fusedopt.aliases import ParamsT
from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers import OPTIMIZERS

PREFIX = "fo"  # timm looks up what follows the last underscore of a name


def register() -> list[str]:
    """Have ``timm.optim.create_optimizer_v2`` and timm's ``--opt`` know every optimizer: ``foadamw``, ``folion``...

    Returns:
        The names.

    Example:
        >>> fusedopt.integrations.timm.register()
        >>> optimizer = timm.optim.create_optimizer_v2(model, "foadamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    """
    from timm.optim._optim_factory import OptimInfo, default_registry

    names = {f"{PREFIX}{name.lower()}": cls for name, cls in OPTIMIZERS.items()}
    for name in set(names).difference(default_registry.list_optimizers()):
        cls = names[name]
        takes = inspect.signature(cls).parameters
        make = cast("type[FusedOptimizer]", cls if "weight_decay" in takes else _without_decay(cls))
        default_registry.register(
            OptimInfo(
                name=name,
                opt_class=make,
                description=f"fusedopt.{cls.__name__}: the whole step in one launch",
                has_eps="eps" in takes,
                has_momentum="momentum" in takes,
                has_betas="betas" in takes,
            )
        )
    return list(names)


def _without_decay(cls: Callable[..., FusedOptimizer]) -> Callable[..., FusedOptimizer]:
    """A class that has no weight decay, for timm, which gives all of them some."""

    @functools.wraps(cls, updated=())
    def make(params: ParamsT, weight_decay: float = 0.0, **options: object) -> FusedOptimizer:
        if weight_decay:
            raise ValueError(f"weight_decay is {weight_decay!r}; {cls.__name__} has none")
        return cls(params, **options)

    return make
