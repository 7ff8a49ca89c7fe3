"""Builds the CUDA engine's own sources for host threads: the headers here stand in for CUDA's."""

import ctypes
import fcntl
import sys
import sysconfig
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
NAME = "_cuda_on_threads"


def build():
    """The extension, as fusedopt._cuda would be, for tensors on the CPU; built anew where a source is newer.

    Raises:
        RuntimeError: If it does not compile.
    """
    sys.path.insert(0, str(ROOT))
    try:
        from setup import CSRC, RULES, Ninja, compiler, define, python_includes
    finally:
        sys.path.remove(str(ROOT))

    folder = ROOT / "build" / NAME
    flags = (
        f"-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-unknown-pragmas -pthread "
        f"-I{HERE} -I{CSRC} {python_includes()} -DFUSEDOPT_MODULE={NAME}"
    )
    ninja = Ninja(compiler(), folder, "-shared -pthread")
    objects = [
        ninja.compile(CSRC / "cuda" / "rule_unit.cu", rule.stem, f"{flags} {define(rule)} -x c++") for rule in RULES
    ]
    objects += [ninja.compile(CSRC / "cuda" / f"{name}.cpp", f"{name}_", flags) for name in ("launch", "module")]
    target = folder / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    ninja.link(objects, target)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # workers of one test run, or two test runs, ask for it at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        ninja.run()
    spec = spec_from_file_location(NAME, target)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.device_type = "cpu"
    module.fail_next_launch = ctypes.CDLL(str(target)).fail_next_launch
    return module
