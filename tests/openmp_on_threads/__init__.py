"""Builds the CPU engine's and the scan's teams for ThreadSanitizer.

OpenMP runs on threads that it understands, which libgomp's are not.
"""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import builds
from builds import ROOT, setup

HERE = Path(__file__).parent
FOLDER = ROOT / "build" / "_openmp_on_threads"

# Programs, and what each watches: paths below csrc/, and a rule_unit.cpp for each of the rules.
PROGRAMS = {
    "races": tuple(f"cpu/{source}.cpp" for source in setup.CPU_SOURCES),
    "inspection": ("host/abi.cpp", "host/written_memory.cpp"),
}
WATCHED_RULES = {"races": ("adam", "lamb", "lion", "sgd"), "inspection": ()}


def missing():
    """Why it cannot be built here; None if it can."""
    if platform.system() != "Linux" or not shutil.which("g++"):
        return "needs g++ on Linux"
    # A library that is not there is named without its folder.
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    return None if os.path.isabs(found) else "g++ has no libtsan"


def build():
    """The programs by name; built anew where a source is newer.

    Raises:
        RuntimeError: If one does not compile.
    """
    # -fopenmp compiles the calls; where it does not link, libgomp is not there to answer them.
    flags = f"-std=c++20 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -fopenmp -I{setup.CSRC}"
    ninja = setup.Ninja("g++", FOLDER, "-fsanitize=thread")
    runtime = ninja.compile(HERE / "gomp.cpp", "gomp_", flags)
    for program, watched in PROGRAMS.items():
        objects = [
            ninja.compile(
                setup.CSRC / "cpu" / "rule_unit.cpp",
                rule,
                f"{flags} {setup.define(setup.CSRC / 'rules' / f'{rule}.h')}",
            )
            for rule in WATCHED_RULES[program]
        ]
        sources = [*(setup.CSRC / source for source in watched), HERE / f"{program}.cpp"]
        objects += [ninja.compile(source, f"{program}_{source.stem}_", flags) for source in sources]
        ninja.link([*objects, runtime], FOLDER / program)
    builds.run(ninja)
    return {program: FOLDER / program for program in PROGRAMS}


def run(program, *arguments):
    """Runs it, without address space randomisation where ThreadSanitizer cannot live with it."""
    command = [str(program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if "unexpected memory mapping" in result.stderr:
        result = subprocess.run(["setarch", "-R", *command], capture_output=True, text=True)
    return result
