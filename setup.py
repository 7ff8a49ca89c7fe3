"""Builds the extensions with ninja; whatever cannot be built is left out, and the reason is kept.

Extensions link neither torch nor each other: `_host` reads tensors through DLPack's C interface,
and each CPU engine build is one ISA level of the same sources. `fusedopt info` shows the reasons.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
REPORT = "_build_report.json"
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = ("v2", "v3", "v4") if X86 else ("base",)
RULES = sorted((ROOT / "csrc" / "rules").glob("*.h"))

COMMON_FLAGS = "-std=c++20 -fPIC -fopenmp -fvisibility=hidden -Wall -Wextra -DNDEBUG -g0"
# Faster sqrt and branches, but never -ffast-math: a NaN must propagate.
ENGINE_FLAGS = "-O3 -fno-math-errno -fno-trapping-math"


def march(level: str) -> str:
    wide = " -mprefer-vector-width=512" if level == "v4" else ""
    return f"-march=x86-64-{level}{wide}" if level != "base" else ""


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


class Ninja:
    """A build.ninja in the making."""

    def __init__(self, compiler: str, folder: Path) -> None:
        self.folder = folder
        self.lines = [
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} -shared -fopenmp $in -o $out",
        ]

    def compile(self, source: Path, name: str, flags: str) -> str:
        out = f"{name}.o"
        self.lines += [f"build {out}: compile {self.escape(source)}", f"  flags = {flags}"]
        return out

    def link(self, objects: list[str], out: Path) -> None:
        self.lines.append(f"build {self.escape(out)}: link {' '.join(objects)}")

    @staticmethod
    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def run(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        result = subprocess.run(
            [*command, "-C", str(self.folder), *(["-j", jobs] if jobs else [])], capture_output=True, text=True
        )
        if result.returncode:
            raise RuntimeError((result.stdout + result.stderr).strip()[-2000:])


class BuildExtensions(build_ext):
    """Compiles csrc/ with ninja; a failure costs the engine, not the installation."""

    def run(self) -> None:
        self.report = {}
        super().run()
        folders = {Path(self.build_lib) / "fusedopt"}
        if self.inplace or self.editable_mode:
            folders.add(ROOT / "fusedopt")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / REPORT).write_text(json.dumps(self.report, indent=1) + "\n")

    def build_extensions(self) -> None:
        try:
            self.compile_all()
            self.report = {"cpu": None}
        except Exception as failure:
            reason = f"{type(failure).__name__}: {failure}" if not isinstance(failure, RuntimeError) else str(failure)
            self.report = {"cpu": reason}
            print(f"fusedopt: the CPU engine was not built: {reason}", file=sys.stderr)

    def compile_all(self) -> None:
        import pybind11

        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
        if not compiler or not shutil.which(compiler.split()[0]):
            raise RuntimeError(f"no C++ compiler: {compiler or 'g++, c++ and clang++'} not found")
        folder, header = dlpack_header()
        includes = f"-I{ROOT / 'csrc'}"
        python = " ".join(f"-isystem {p}" for p in (pybind11.get_include(), sysconfig.get_paths()["include"], folder))
        flags = f"{COMMON_FLAGS} {includes}"
        dlpack = f"'-DFUSEDOPT_DLPACK_HEADER=<{header}>'"
        ninja = Ninja(compiler, Path(self.build_temp).resolve())
        csrc = ROOT / "csrc"

        host = [
            ninja.compile(source, f"host_{source.stem}", f"{flags} -O2 {python} {dlpack}")
            for source in sorted((csrc / "host").glob("*.cpp"))
        ]
        ninja.link(host, self.target("fusedopt._host"))
        for level in LEVELS:
            engine = f"{flags} {ENGINE_FLAGS} {march(level)}"
            objects = [
                ninja.compile(csrc / "cpu" / "rule_unit.cpp", f"{level}_{rule.stem}", f"{engine} {define(rule)}")
                for rule in RULES
            ]
            for source in ("codec", "engine"):
                objects.append(ninja.compile(csrc / "cpu" / f"{source}.cpp", f"{level}_{source}_", engine))
            module = f"{engine} {python} -DFUSEDOPT_MODULE=_cpu_{level}"
            objects.append(ninja.compile(csrc / "cpu" / "module.cpp", f"{level}_module_", module))
            ninja.link(objects, self.target(f"fusedopt._cpu_{level}"))
        ninja.run()

    def target(self, name: str) -> Path:
        path = Path(self.get_ext_fullpath(name)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def define(rule: Path) -> str:
    return f"'-DFUSEDOPT_RULE_HEADER=\"rules/{rule.name}\"'"


class BuildPython(build_py):
    """Writes the stub that tells type checkers which optimizers fusedopt.optimizers discovers."""

    def run(self) -> None:
        lines = [
            "from fusedopt.optimizer import FusedOptimizer",
            "OPTIMIZERS: dict[str, type[FusedOptimizer]]",
        ]
        for path in sorted((ROOT / "fusedopt" / "optimizers").glob("*.py")):
            classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)]
            names = [c.name for c in classes if any(getattr(b, "id", "") == "FusedOptimizer" for b in c.bases)]
            lines += [f"from fusedopt.optimizers.{path.stem} import {n} as {n}" for n in names]
        (ROOT / "fusedopt" / "optimizers" / "__init__.pyi").write_text("\n".join(lines) + "\n")
        super().run()


setup(
    packages=[
        "fusedopt",
        "fusedopt.optimizers",
        "fusedopt.engines",
        "fusedopt.verification",
        "fusedopt.cli",
        "fusedopt.inspection",
        "fusedopt.triton_kernels",
        "fusedopt.triton_kernels.rules",
        "fusedopt.bench",
    ],
    package_dir={"fusedopt.triton_kernels": "triton_kernels", "fusedopt.bench": "bench"},
    package_data={"fusedopt": ["py.typed", REPORT], "fusedopt.optimizers": ["*.pyi"]},
    ext_modules=[
        Extension(f"fusedopt.{name}", sources=[], optional=True)
        for name in ("_host", *(f"_cpu_{level}" for level in LEVELS))
    ],
    cmdclass={"build_ext": BuildExtensions, "build_py": BuildPython},
)
