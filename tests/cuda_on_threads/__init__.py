"""Builds the CUDA engine's own sources for host threads: the headers here stand in for CUDA's."""

import ctypes
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import builds
from builds import ROOT, setup

HERE = Path(__file__).parent
NAME = "_cuda_on_threads"


def build(name=NAME, rules=setup.RULES):
    """The extension, as fusedopt._cuda would be, for tensors on the CPU; built anew where a source is newer.

    Args:
        name: Of the module.
        rules: Headers of those that it has, in folders that are called ``rules``.

    Raises:
        RuntimeError: If it does not compile.
    """
    folder = ROOT / "build" / name
    flags = (
        f"-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas -pthread "
        f"-I{HERE} -I{setup.CSRC} -I{rules[0].parents[1]} {setup.python_includes()} -DFUSEDOPT_MODULE={name}"
    )
    ninja = setup.Ninja(setup.compiler(), folder, "-shared -pthread")
    objects = [
        ninja.compile(setup.CSRC / "cuda" / "rule_unit.cu", rule.stem, f"{flags} {setup.define(rule)} -x c++")
        for rule in rules
    ]
    objects += [ninja.compile(setup.CSRC / "cuda" / f"{name}.cpp", f"{name}_", flags) for name in ("launch", "module")]
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    ninja.link(objects, target)
    builds.run(ninja)
    spec = spec_from_file_location(name, target)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.device_type = "cpu"
    for control in ("fail_next_launch", "refuse_next_cooperative_launch", "set_disorder"):
        setattr(module, control, getattr(ctypes.CDLL(str(target)), control))
    return module
