"""Builds the extensions with ninja; whatever cannot be built is left out, and the reason is kept.

Extensions link neither torch nor each other: `_host` looks torch's C ABI up at run time, each CPU engine build is one
ISA level of the same sources, and `_cuda` holds code for several GPUs. `fusedopt info` shows the reasons.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(CSRC))
try:
    from toolchain import Ninja, compiler, compression, cuda_archs, find_nvcc, host_compiler, jobs, say, version_of
finally:
    sys.path.remove(str(CSRC))  # whose folders would be found as packages

REPORT = "_build_report.json"
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = ("v2", "v3", "v4") if X86 else ("base",)
RULES = sorted((CSRC / "rules").glob("*.h"))
# Seconds of one core that a file of the CPU engine takes, and one of the CUDA engine for each GPU.
CPU_SECONDS, CUDA_SECONDS = 1.5, 26.0

COMMON_FLAGS = "-std=c++20 -fPIC -fvisibility=hidden -Wall -Wextra -DNDEBUG -g0"
# Of the engine, besides rules and the module.
CPU_SOURCES = ("average", "codec", "engine", "noise", "packed", "quantize", "runs", "stream", "sums")
# Faster sqrt and branches, but never -ffast-math: a NaN must propagate. Loops stay whole, so that GCC keeps in
# registers what an element has between decoding and encoding.
ENGINE_FLAGS = "-O3 -fno-math-errno -fno-trapping-math -fno-unswitch-loops"


def march(level: str) -> str:
    wide = " -mprefer-vector-width=512" if level == "v4" else ""
    return f"-march=x86-64-{level}{wide}" if level != "base" else ""


def sanitizers() -> str:
    """What makes the host and the CPU engine check themselves: FUSEDOPT_SANITIZE=address,undefined."""
    names = os.environ.get("FUSEDOPT_SANITIZE")
    # vptr compares type information across extensions, which hide theirs from one another.
    stops = "-fno-sanitize=vptr -fno-sanitize-recover=undefined"
    return f"-fsanitize={names} {stops} -g1 -Og -fno-omit-frame-pointer" if names else ""


def dlpack_header() -> tuple[str, str]:
    """The include directory and name of a DLPack header new enough to have the C exchange API."""
    candidates = (("tvm_ffi", "include", "dlpack/dlpack.h"), ("torch", "include", "ATen/dlpack.h"))
    for package, folder, header in candidates:
        spec = importlib.util.find_spec(package)
        for place in (spec.submodule_search_locations or []) if spec else []:
            path = Path(place) / folder / header
            if path.exists() and "DLPackExchangeAPI" in path.read_text():
                return str(Path(place) / folder), header
    raise RuntimeError("no dlpack.h with DLPackExchangeAPI: install apache-tvm-ffi, or torch >= 2.10")


def cpu_levels() -> list[str]:
    """The builds of the CPU engine: those of LEVELS that FUSEDOPT_CPU_LEVELS lists, or all."""
    asked = os.environ.get("FUSEDOPT_CPU_LEVELS", "").replace(",", " ").split()
    if unknown := set(asked) - set(LEVELS):
        raise RuntimeError(f"FUSEDOPT_CPU_LEVELS has {', '.join(sorted(unknown))}; there are {', '.join(LEVELS)}")
    return asked or list(LEVELS)


def asked_rules(variable: str = "FUSEDOPT_CUDA_RULES") -> list[Path]:
    """Those that a variable lists, for builds that are only tested; all without it."""
    asked = os.environ.get(variable, "").replace(",", " ").split()
    if unknown := {*asked} - {rule.stem for rule in RULES}:
        raise RuntimeError(f"{variable} has {', '.join(sorted(unknown))}, of which there are no rules")
    return [rule for rule in RULES if rule.stem in asked] or RULES


def gencode(archs: list[int]) -> str:
    """Code for each of these, and PTX of the last."""
    code = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    return f"{code} -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"


def python_includes() -> str:
    import pybind11

    return f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"


class BuildExtensions(build_ext):
    """Compiles csrc/ with ninja; a failure costs the engine, not the installation."""

    def run(self) -> None:
        self.report: dict[str, dict[str, Any]] = {}
        super().run()
        folders = {Path(self.build_lib) / "fusedopt"}
        if self.inplace or self.editable_mode:
            folders.add(ROOT / "fusedopt")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REPORT).write_text(json.dumps(self.report, indent=1) + "\n")

    def build_extensions(self) -> None:
        self.make("cpu", self.plan_cpu)
        self.make("cuda", self.plan_cuda)

    def make(self, engine: str, plan: Callable[[], tuple[Ninja, str, list[str], float]]) -> None:
        """Compile an engine, and keep what was made of it, or why it was not.

        Args:
            engine: Its name.
            plan: Gives what to make, the compiler, what it compiles for, and how many seconds of one core it may take.
        """
        start = time.perf_counter()
        try:
            ninja, command, targets, seconds = plan()
            minutes = max(1, round(seconds / jobs() / 60))
            say(
                f"the {engine} engine: {version_of(command)} compiles every rule for {', '.join(targets)}: "
                f"{ninja.steps} files, {jobs()} at once, up to {minutes} min"
            )
            ninja.run(aloud=True)
            found = {"failure": None, "compiler": version_of(command), "targets": targets}
        except Exception as failure:
            known = isinstance(failure, RuntimeError)
            reason = str(failure) if known else f"{type(failure).__name__}: {failure}"
            say(f"the {engine} engine was not built: {reason}")
            found = {"failure": reason}
        self.report[engine] = found | {"seconds": round(time.perf_counter() - start, 1)}

    def plan_cpu(self) -> tuple[Ninja, str, list[str], float]:
        folder, header = dlpack_header()
        flags = f"{COMMON_FLAGS} -fopenmp -I{CSRC}"
        python = f"{python_includes()} -isystem {folder}"
        dlpack = f"'-DFUSEDOPT_DLPACK_HEADER=<{header}>'"
        checks = sanitizers()
        ninja = Ninja(compiler(), Path(self.build_temp).resolve(), f"-shared -fopenmp {checks}")

        host = sorted((CSRC / "host").glob("*.cpp"))
        objects = [ninja.compile_together(host, "host", f"{flags} -O2 {python} {dlpack} {checks}")]
        ninja.link(objects, self.target("fusedopt._host"))
        for level in cpu_levels():
            plain = f"{flags} {ENGINE_FLAGS} {march(level)}"
            engine = f"{plain} {checks}"
            objects = [
                ninja.compile(CSRC / "cpu" / "rule_unit.cpp", f"{level}_{rule.stem}", f"{engine} {define(rule)}")
                for rule in asked_rules("FUSEDOPT_CPU_RULES")
            ]
            for source in CPU_SOURCES:
                objects.append(ninja.compile(CSRC / "cpu" / f"{source}.cpp", f"{level}_{source}_", engine))
            # Its checks would take a minute to compile, and it only passes on.
            module = f"{plain} {python} -DFUSEDOPT_MODULE=_cpu_{level}"
            objects.append(ninja.compile(CSRC / "cpu" / "module.cpp", f"{level}_module_", module))
            ninja.link(objects, self.target(f"fusedopt._cpu_{level}"))
        levels = [level if level == "base" else f"x86-64-{level}" for level in cpu_levels()]
        return ninja, compiler(), levels, CPU_SECONDS * ninja.steps

    def plan_cuda(self) -> tuple[Ninja, str, list[str], float]:
        asked = os.environ.get("FUSEDOPT_CUDA") or "1"
        if asked != "1":
            raise RuntimeError(f"FUSEDOPT_CUDA={asked} was set" + ("" if asked == "0" else "; it must be 0 or 1"))
        if sanitizers():
            raise RuntimeError("FUSEDOPT_SANITIZE is set, which is for the host and the CPU engine")
        nvcc = find_nvcc()
        archs = cuda_archs(nvcc)
        ninja = cuda_ninja(Path(self.build_temp).resolve() / "cuda")
        add_cuda_engine(ninja, self.target("fusedopt._cuda"), asked_rules(), archs)
        return ninja, nvcc, [f"sm_{arch}" for arch in archs], CUDA_SECONDS * ninja.steps * len(archs)

    def target(self, name: str) -> Path:
        path = Path(self.get_ext_fullpath(name)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def cuda_ninja(folder: Path) -> Ninja:
    """For builds of the CUDA engine."""
    return Ninja(f"{find_nvcc()} {host_compiler()}".rstrip(), folder, "-shared -cudart static")


def add_cuda_engine(
    ninja: Ninja, target: Path, rules: list[Path], archs: list[int], prefix: str = "", options: str = ""
) -> None:
    """Adds a build of the CUDA engine with kernels of some rules.

    Args:
        ninja: Of ``cuda_ninja``; several builds may be in one.
        target: The extension; its name is ``_cuda``.
        rules: Headers.
        archs: Compute capabilities.
        prefix: Tells its objects from those of other builds.
        options: What sets other choices than csrc/cuda/policy.h does.
    """
    common = f"-std=c++20 -O3 -I{CSRC} --expt-relaxed-constexpr -diag-suppress 128 -Xcompiler -fPIC,-fvisibility=hidden"
    common = f"{common} {compression(find_nvcc())} {gencode(archs)}"
    flags = f"{common} {options}".rstrip()
    objects = [
        ninja.compile(CSRC / "cuda" / "rule_unit.cu", f"{prefix}{rule.stem}", f"{flags} {define(rule)}")
        for rule in rules
    ]
    objects.append(ninja.compile(CSRC / "cuda" / "launch.cpp", f"{prefix}launch_", flags))
    module = f"{common} {python_includes()} -DFUSEDOPT_MODULE=_cuda"  # the same for all: it makes no such choice
    objects.append(ninja.compile(CSRC / "cuda" / "module.cpp", "module_", module))
    ninja.link(objects, target)


def define(rule: Path) -> str:
    return f"'-DFUSEDOPT_RULE_HEADER=\"rules/{rule.name}\"'"


if __name__ == "__main__":
    setup(
        packages=[
            "fusedopt",
            "fusedopt.optimizers",
            "fusedopt.engines",
            "fusedopt.verification",
            "fusedopt.cli",
            "fusedopt.diagnostics",
            "fusedopt.inspection",
            "fusedopt.integrations",
            "fusedopt.triton_kernels",
            "fusedopt.triton_kernels.rules",
            "fusedopt.bench",
            "fusedopt.bench.peers",
        ],
        package_dir={"fusedopt.triton_kernels": "triton_kernels", "fusedopt.bench": "bench"},
        exclude_package_data={"fusedopt.bench": ["results/*", "results/*/*"]},
        package_data={"fusedopt": ["py.typed", REPORT]},
        ext_modules=[
            Extension(f"fusedopt.{name}", sources=[], optional=True)
            for name in ("_host", *(f"_cpu_{level}" for level in cpu_levels()), "_cuda")
        ],
        cmdclass={"build_ext": BuildExtensions},
    )
