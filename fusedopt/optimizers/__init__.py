"""The optimizers: every :class:`FusedOptimizer` in this folder's modules, found by name."""

from importlib import import_module
from pkgutil import iter_modules

from fusedopt.optimizer import FusedOptimizer

__all__: list[str] = []

for _module in iter_modules(__path__, f"{__name__}."):
    for _name, _value in vars(import_module(_module.name)).items():
        if isinstance(_value, type) and issubclass(_value, FusedOptimizer) and _value.__module__ == _module.name:
            globals()[_name] = _value
            __all__.append(_name)

__all__.sort()
