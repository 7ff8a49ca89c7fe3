"""Builds the extensions with ninja; whatever cannot be built is left out, and the reason is kept.

Extensions link neither torch nor each other: `_host` looks torch's C ABI up at run time, each CPU engine build is one
ISA level of the same sources, and `_cuda` holds code for several GPUs. `fusedopt info` shows the reasons.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parent
REPORT = "_build_report.json"
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = ("v2", "v3", "v4") if X86 else ("base",)
CSRC = ROOT / "csrc"
RULES = sorted((CSRC / "rules").glob("*.h"))
# Compute capabilities with code of their own; the last one's PTX serves later ones.
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 110, 120)

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


class Ninja:
    """A build.ninja in the making."""

    def __init__(self, compiler: str, folder: Path, link_flags: str) -> None:
        self.folder = folder
        self.lines = [
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} {link_flags} $in -o $out",
        ]

    def compile(self, source: Path, name: str, flags: str) -> str:
        out = f"{name}.o"
        build = f"build {out}: compile {self.escape(source)}"
        if build not in self.lines:  # several targets may have it
            self.lines += [build, f"  flags = {flags}"]
        return out

    def compile_together(self, sources: list[Path], name: str, flags: str) -> str:
        """As one unit: where the headers that all include take longer than the sources."""
        unit = self.folder / f"{name}.cpp"
        text = "".join(f'#include "{source}"\n' for source in sources)
        if not unit.exists() or unit.read_text() != text:  # or it would be compiled again
            self.folder.mkdir(parents=True, exist_ok=True)
            unit.write_text(text)
        return self.compile(unit, name, flags)

    def link(self, objects: list[str], out: Path) -> None:
        self.lines.append(f"build {self.escape(out)}: link {' '.join(objects)}")

    @staticmethod
    def escape(path: Path) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def run(self, keep_going: bool = False) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        jobs = os.environ.get("MAX_JOBS")
        options = [*(["-j", jobs] if jobs else []), *(["-k", "0"] if keep_going else [])]
        result = subprocess.run([*command, "-C", str(self.folder), *options], capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError((result.stdout + result.stderr).strip()[-2000:])


def compiler() -> str:
    """The C++ compiler.

    Raises:
        RuntimeError: If there is none.
    """
    found = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if not found or not shutil.which(found.split()[0]):
        raise RuntimeError(f"no C++ compiler: {found or 'g++, c++ and clang++'} not found")
    return found


def cpu_levels() -> list[str]:
    """The builds of the CPU engine: those of LEVELS that FUSEDOPT_CPU_LEVELS lists, or all."""
    asked = os.environ.get("FUSEDOPT_CPU_LEVELS", "").replace(",", " ").split()
    if unknown := set(asked) - set(LEVELS):
        raise RuntimeError(f"FUSEDOPT_CPU_LEVELS has {', '.join(sorted(unknown))}; there are {', '.join(LEVELS)}")
    return asked or list(LEVELS)


def find_nvcc() -> str:
    """CUDA's compiler.

    Raises:
        RuntimeError: If there is none.
    """
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [*(Path(home) / "bin" / "nvcc" for home in homes), Path("/usr/local/cuda/bin/nvcc")]
    found = os.environ.get("NVCC") or shutil.which("nvcc") or next((str(p) for p in places if p.exists()), None)
    if not found or not shutil.which(found):
        raise RuntimeError(f"no CUDA compiler: {found or 'nvcc'} not found in PATH, CUDA_HOME or /usr/local/cuda")
    return found


def asked_archs() -> list[str]:
    """What FUSEDOPT_CUDA_ARCHS lists."""
    return os.environ.get("FUSEDOPT_CUDA_ARCHS", "").replace(",", " ").split()


def asked_rules() -> list[Path]:
    """Those that FUSEDOPT_CUDA_RULES lists, for builds that are only looked at; all without it."""
    asked = os.environ.get("FUSEDOPT_CUDA_RULES", "").replace(",", " ").split()
    return [rule for rule in RULES if rule.stem in asked] or RULES


def gencode(nvcc: str, asked: list[str]) -> str:
    """What to compile for: what was asked for, or those of CUDA_ARCHS that this nvcc knows."""
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    archs = sorted(asked, key=int) or [str(a) for a in CUDA_ARCHS if f"compute_{a}" in known]
    code = " ".join(f"-gencode arch=compute_{a},code=sm_{a}" for a in archs)
    return f"{code} -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"


def python_includes() -> str:
    import pybind11

    return f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_paths()['include']}"


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
        for part, build in (("cpu", self.build_cpu), ("cuda", self.build_cuda)):
            try:
                build()
                self.report[part] = None
            except Exception as failure:
                known = isinstance(failure, RuntimeError)
                self.report[part] = str(failure) if known else f"{type(failure).__name__}: {failure}"
                print(f"fusedopt: the {part} engine was not built: {self.report[part]}", file=sys.stderr)

    def build_cpu(self) -> None:
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
                for rule in RULES
            ]
            for source in CPU_SOURCES:
                objects.append(ninja.compile(CSRC / "cpu" / f"{source}.cpp", f"{level}_{source}_", engine))
            # Its checks would take a minute to compile, and it only passes on.
            module = f"{plain} {python} -DFUSEDOPT_MODULE=_cpu_{level}"
            objects.append(ninja.compile(CSRC / "cpu" / "module.cpp", f"{level}_module_", module))
            ninja.link(objects, self.target(f"fusedopt._cpu_{level}"))
        ninja.run()

    def build_cuda(self) -> None:
        if sanitizers():
            raise RuntimeError("FUSEDOPT_SANITIZE is set, which is for the host and the CPU engine")
        ninja = cuda_ninja(Path(self.build_temp).resolve() / "cuda")
        add_cuda_engine(ninja, self.target("fusedopt._cuda"), asked_rules(), asked_archs())
        ninja.run()

    def target(self, name: str) -> Path:
        path = Path(self.get_ext_fullpath(name)).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def cuda_ninja(folder: Path) -> Ninja:
    """For builds of the CUDA engine."""
    return Ninja(find_nvcc(), folder, "-shared -cudart static")


def add_cuda_engine(
    ninja: Ninja, target: Path, rules: list[Path], archs: list[str], prefix: str = "", options: str = ""
) -> None:
    """Adds a build of the CUDA engine with kernels of some rules.

    Args:
        ninja: Of ``cuda_ninja``; several builds may be in one.
        target: The extension; its name is ``_cuda``.
        rules: Headers.
        archs: Compute capabilities; empty for all.
        prefix: Tells its objects from those of other builds.
        options: What sets other choices than csrc/cuda/policy.h does.
    """
    common = f"-std=c++20 -O3 -I{CSRC} --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden"
    common = f"{common} {gencode(find_nvcc(), archs)}"
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
