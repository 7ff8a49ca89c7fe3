"""The Triton engine's kernels, compiled for a GPU that need not be there, and looked at."""

from __future__ import annotations

import re
from importlib import import_module

from fusedopt.aliases import ParamGroup
from fusedopt.engines import triton as engine
from fusedopt.inspection.ahead import Specialised, compiled, specialised
from fusedopt.inspection.code import Report, of_amdgcn, of_cubin
from fusedopt.optimizers import OPTIMIZERS
from fusedopt.options import MASTER, STATE_DTYPE, settle

Storage = tuple[str | None, str | None]  # state_dtype, by its name, and master
Job = tuple[str, str, str, Storage]  # optimizer class, kernel name, architecture


def unavailable(arch: str) -> str | None:
    """Why kernels cannot be compiled for an architecture here; None if they can."""
    if not re.fullmatch(r"\d{2,3}|gfx\w+", arch):
        return f"unknown architecture {arch!r}; it is a compute capability such as 90, or one of AMD's such as gfx942"
    try:
        import_module("triton")
    except Exception as error:
        return f"triton does not import: {error}"
    if engine.interprets():
        return "TRITON_INTERPRET is set, and interpreted kernels are not compiled; unset it"
    return None


def jobs(optimizers: list[str], elements: list[str], arch: str, storage: Storage = (None, None)) -> list[Job]:
    """What is to be inspected: each kernel once, though optimizers may share a rule."""
    found: dict[str, Job] = {}
    for name in optimizers:
        for kernel in _kernels(name, elements, arch, storage):
            found.setdefault(kernel, (name, kernel, arch, storage))
    return list(found.values())


def inspect(job: Job) -> Report:
    """Compile one kernel, and read it."""
    cuobjdump = import_module("triton").knobs.nvidia.cuobjdump.path
    optimizer, name, arch, storage = job
    kernel = compiled(_kernels(optimizer, [name.split()[-1]], arch, storage)[name], arch)
    if arch.startswith("gfx"):
        return of_amdgcn(name, arch, kernel.asm["amdgcn"])
    return of_cubin(name, f"sm_{arch}", kernel.asm["cubin"], cuobjdump)


def _kernels(optimizer: str, elements: list[str], arch: str, storage: Storage) -> dict[str, Specialised]:
    group: ParamGroup = {STATE_DTYPE: storage[0], MASTER: storage[1]}
    settle(group, "")
    rules = [OPTIMIZERS[optimizer].rule, *OPTIMIZERS[optimizer].rules]
    return {k.name: k for k in specialised(rules, elements, arch, group)}
