"""The optimizers: every :class:`FusedOptimizer` in this folder's modules, found by name."""

from importlib import import_module
from pkgutil import iter_modules

from fusedopt.optimizer import FusedOptimizer


def _discover() -> dict[str, type[FusedOptimizer]]:
    modules = [import_module(m.name) for m in iter_modules(__path__, f"{__name__}.")]
    return {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, FusedOptimizer) and value.__module__ == module.__name__
    }


OPTIMIZERS = _discover()
globals().update(OPTIMIZERS)
__all__ = sorted(OPTIMIZERS)  # pyright: ignore[reportUnsupportedDunderAll]
