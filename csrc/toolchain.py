"""Compilers, what they are asked to compile for, and how: what setup.py builds the extensions with."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

# Compute capabilities with code of their own; the last one's PTX serves later ones.
CUDA_ARCHS = (75, 80, 86, 89, 90, 100, 110, 120)
# What C++ compilers are called beside the C compilers that CC may name.
CXX_OF = {"gcc": "g++", "cc": "c++", "clang": "clang++", "icx": "icpx", "icc": "icpc", "nvc": "nvc++"}
# A line in which a compiler, nvcc or the linker says what is wrong; quoted source is indented.
ERROR = re.compile(
    r"(?!\s|In file included|.*\bwarning ?:).*?"
    r"((^|: )(fatal )?error\b|^nvcc fatal|undefined reference|cannot find -l|can ?not be used)",
    re.IGNORECASE,
)
PROGRESS = re.compile(r"^\[\d+/\d+\] ")


def say(text: str) -> None:
    """A line for whoever waits: pip shows it with -v."""
    print(f"fusedopt: {text}", file=sys.stderr, flush=True)


def jobs() -> int:
    """How many compilers run at once."""
    asked = os.environ.get("MAX_JOBS")
    if asked and not asked.isdecimal():
        raise RuntimeError(f"MAX_JOBS is {asked!r}, which is no number")
    return int(asked or 0) or (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )


def asked_compiler() -> str | None:
    """What CXX says, or else the C++ compiler that belongs to what CC says.

    Raises:
        RuntimeError: If CC is no compiler that a C++ compiler is known of.
    """
    if cxx := os.environ.get("CXX", "").strip():
        return cxx
    c = os.environ.get("CC", "").strip()
    if not c:
        return None
    ends = r"(?=-?[\d.]*(\s|$))"
    if re.search(rf"(?<![^/\s-])({'|'.join(map(re.escape, CXX_OF.values()))}){ends}", c):
        return c
    found, count = re.subn(rf"(?<![^/\s-])({'|'.join(CXX_OF)}){ends}", lambda match: CXX_OF[match[1]], c, count=1)
    if not count:
        raise RuntimeError(f"no C++ compiler: CC is {c!r}, of which none is known; set CXX")
    return found


def compiler() -> str:
    """The C++ compiler.

    Raises:
        RuntimeError: If there is none.
    """
    found = asked_compiler() or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if not found or not shutil.which(found.split()[0]):
        raise RuntimeError(f"no C++ compiler: {found or 'g++, c++ and clang++'} not found")
    return found


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


def version_of(command: str) -> str:
    """How a compiler calls itself: ``g++ (Debian 12.2.0-14) 12.2.0``, or nvcc's release."""
    run = subprocess.run([*command.split(), "--version"], capture_output=True, text=True)
    lines = run.stdout.splitlines() or [command]
    return next((f"nvcc {match[1]}" for line in lines if (match := re.search(r"\bV(\d+\.\d+\.\d+)", line))), lines[0])


def host_compiler() -> str:
    """The option for nvcc that names the C++ compiler which was asked for."""
    asked = asked_compiler()
    words = [word for word in (asked or "").split() if not word.startswith("-")]  # of "ccache g++ -m64" the second
    return f"-ccbin {words[-1]}" if words and not os.environ.get("NVCC_CCBIN") else ""


@cache
def compression(nvcc: str) -> str:
    """The option with which machine code takes a third of the bytes, where this nvcc has it."""
    known = subprocess.run([nvcc, "--help"], capture_output=True, text=True).stdout
    return "--compress-mode=size" if "--compress-mode" in known else ""


def gpus() -> set[int]:
    """Compute capabilities of this machine's GPUs, such as 90 for 9.0: what NVIDIA's driver says, if there is one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return set()
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return set()
    found = set()
    for ordinal in range(count.value):
        for value, attribute in ((major, 75), (minor, 76)):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
            if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, ordinal):
                return found
        found.add(10 * major.value + minor.value)
    return found


def cuda_archs(nvcc: str) -> list[int]:
    """The compute capabilities to compile for: those that FUSEDOPT_CUDA_ARCHS lists, or all, or this machine's GPUs'.

    Raises:
        RuntimeError: If there are none, or nvcc has none of them.
    """
    listing = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True)
    known = sorted(int(number) for number in re.findall(r"^compute_(\d+)$", listing.stdout, re.MULTILINE))
    if not {*CUDA_ARCHS} & {*known}:
        raise RuntimeError(f"{nvcc} does not say which GPUs it compiles for: {(listing.stderr or 'nothing').strip()}")
    has = ", ".join(map(str, known))
    asked = os.environ.get("FUSEDOPT_CUDA_ARCHS", "").replace(",", " ").replace(";", " ").split()
    if asked == ["all"]:
        return [arch for arch in CUDA_ARCHS if arch in known]
    if unknown := [
        word for word in asked if not re.fullmatch(r"\d+\.?\d", word) or int(word.replace(".", "")) not in known
    ]:
        raise RuntimeError(f"FUSEDOPT_CUDA_ARCHS has {', '.join(unknown)}; this nvcc has {has}, and there is 'all'")
    if asked:
        return sorted({int(word.replace(".", "")) for word in asked})
    here = gpus()
    if not here:
        raise RuntimeError(
            "no NVIDIA GPU was seen where it was built; FUSEDOPT_CUDA_ARCHS=all compiles for all GPUs, "
            "FUSEDOPT_CUDA_ARCHS=90 for those of compute capability 9.0"
        )
    # PTX of an older one is compiled by the driver when it is loaded.
    usable = {gpu: max((arch for arch in known if arch <= gpu), default=0) for gpu in here}
    if too_old := ", ".join(f"{gpu / 10:.1f}" for gpu, arch in sorted(usable.items()) if not arch):
        reason = f"this machine's GPU of compute capability {too_old} is none that this nvcc has: {has}"
        if not any(usable.values()):
            raise RuntimeError(reason)
        say(reason)
    return sorted({arch for arch in usable.values() if arch})


def first_error(output: str, command: str) -> str:
    """The line in which a compiler first says what is wrong, whole."""
    said = [line for line in output.splitlines() if line.strip()]
    told = sorted(filter(ERROR.match, said), key=lambda line: line.startswith("collect2:"))  # which says the least
    return next(iter(told or said), None) or f"this ended with an error and said nothing: {command}"


class Ninja:
    """A build.ninja in the making."""

    def __init__(self, compiler: str, folder: Path, link_flags: str) -> None:
        self.folder = folder
        self.lines = [
            "rule compile",
            f"  command = {compiler} -MMD -MF $out.d $flags -c $in -o $out",
            "  description = $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = {compiler} {link_flags} $in -o $out",
            "  description = $out",
        ]

    def compile(self, source: Path, name: str, flags: str) -> str:
        """Adds an object file, and says what it is called."""
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
        """Adds a library of objects."""
        self.lines.append(f"build {self.escape(out)}: link {' '.join(objects)}")

    @property
    def steps(self) -> int:
        """How many files are made."""
        return sum(line.startswith("build ") for line in self.lines)

    @staticmethod
    def escape(path: Path) -> str:
        """A path as ninja reads it."""
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    def run(self, keep_going: bool = False, aloud: bool = False) -> None:
        """Make what a source is newer than.

        Args:
            keep_going: Make what can be made, though something does not compile.
            aloud: Say which file was made, and everything that compilers say.

        Raises:
            RuntimeError: If something does not compile, with the compiler's first error.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text("\n".join(self.lines) + "\n")
        ninja = shutil.which("ninja")
        command = [ninja] if ninja else [sys.executable, "-m", "ninja"]
        lines = []
        env = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}  # in English, to find what is wrong
        how_many = ["-j", str(jobs())] if os.environ.get("MAX_JOBS") else []  # or ninja's own choice
        with subprocess.Popen(
            [*command, *how_many, *(["-k", "0"] if keep_going else [])],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=env, cwd=self.folder,
        ) as process:  # fmt: skip
            for line in process.stdout:
                lines.append(line)
                if aloud:
                    say(line.rstrip())
        if process.returncode:
            raise RuntimeError(self.reason(lines))

    @staticmethod
    def reason(lines: list[str]) -> str:
        """Of ninja's output: after FAILED come the command, and what it said up to the next step."""
        at = next((i for i, line in enumerate(lines) if line.startswith("FAILED: ")), None)
        if at is None:
            return first_error("".join(lines), "ninja")
        said = []
        for line in lines[at + 2 :]:
            if PROGRESS.match(line) or line.startswith(("FAILED: ", "ninja: ")):
                break
            said.append(line)
        return first_error("".join(said), lines[at + 1].strip())
