"""Stands in for torchvision, which has no build for every torch, where timm only wants to import it."""

import importlib.machinery
import sys
from types import ModuleType


class _Named(type):
    """Has every constant that is asked for."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(ModuleType):
    """Has every class that is asked for; none does anything."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Named(name, (), {})
        setattr(self, name, made)
        return made


class _Finder:
    """Finds every module of the package."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(name, _Finder, is_package=True)
        return None

    @staticmethod
    def create_module(spec):
        return _Module(spec.name)

    @staticmethod
    def exec_module(module):
        pass


sys.meta_path.append(_Finder)
__version__ = "0.0.0"
