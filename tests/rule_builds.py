"""Builds of engines that have the rules of tests/rules/, besides fusedopt's own."""

import platform
import sysconfig
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import builds
import cuda_on_threads
from builds import ROOT, setup

from fusedopt.engines import cpu

RULES = sorted((Path(__file__).parent / "rules").glob("*.h"))


@cache
def cpu_kernels():
    """Those rules' kernels for the CPU engine, which runs them as its own."""
    name = "_cpu_of_tests"
    folder = ROOT / "build" / name
    level = "v3" if platform.machine() in ("x86_64", "AMD64") and cpu.load()[2] in ("v3", "v4") else cpu.load()[2]
    includes = f"-I{setup.CSRC} -I{RULES[0].parents[1]}"
    quick = setup.ENGINE_FLAGS.replace("-O3", "-O1")  # to compile
    flags = f"{setup.COMMON_FLAGS} {quick} {setup.march(level)} -fopenmp {includes}"
    ninja = setup.Ninja(setup.compiler(), folder, "-shared -fopenmp")
    objects = [
        ninja.compile(setup.CSRC / "cpu" / "rule_unit.cpp", rule.stem, f"{flags} {setup.define(rule)}")
        for rule in RULES
    ]
    for source in setup.CPU_SOURCES:
        objects.append(ninja.compile(setup.CSRC / "cpu" / f"{source}.cpp", f"{source}_", flags))
    module = f"{flags} {setup.python_includes()} -DFUSEDOPT_MODULE={name}"
    objects.append(ninja.compile(setup.CSRC / "cpu" / "module.cpp", "module_", module))
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    ninja.link(objects, target)
    builds.run(ninja)
    spec = spec_from_file_location(name, target)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return cpu.kernels_of(module)


@cache
def cuda_extension():
    """The CUDA engine on host threads, with those rules alone."""
    return cuda_on_threads.build("_cuda_of_tests", RULES)
