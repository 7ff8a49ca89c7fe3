"""The Triton engine's kernels, compiled for a GPU that need not be there, and looked at."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from fusedopt.inspection.code import Report, of_amdgcn, of_cubin

if TYPE_CHECKING:
    from fusedopt.triton_kernels.ahead import Specialised  # pyright: ignore[reportMissingImports]

Storage = tuple[str | None, str | None]  # state_dtype, by its name, and master
Job = tuple[str, str, str, Storage]  # optimizer class, kernel name, architecture


def unavailable(arch: str) -> str | None:
    """Why kernels cannot be compiled for an architecture here; None if they can."""
    from fusedopt.engines import triton as engine

    if not re.fullmatch(r"\d{2,3}|gfx\w+", arch):
        return f"unknown architecture {arch!r}; it is a compute capability such as 90, or one of AMD's such as gfx942"
    try:
        import triton  # noqa: F401
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
    from triton import knobs  # pyright: ignore[reportAttributeAccessIssue]

    from fusedopt.triton_kernels import ahead  # pyright: ignore[reportMissingImports]

    optimizer, name, arch, storage = job
    kernel = ahead.compiled(_kernels(optimizer, [name.split()[-1]], arch, storage)[name], arch)
    if arch.startswith("gfx"):
        return of_amdgcn(name, arch, kernel.asm["amdgcn"])
    return of_cubin(name, f"sm_{arch}", kernel.asm["cubin"], knobs.nvidia.cuobjdump.path)


def _kernels(optimizer: str, elements: list[str], arch: str, storage: Storage) -> dict[str, Specialised]:
    from fusedopt.optimizers import OPTIMIZERS
    from fusedopt.options import MASTER, STATE_DTYPE, settle
    from fusedopt.triton_kernels import ahead  # pyright: ignore[reportMissingImports]

    group: dict[str, Any] = {STATE_DTYPE: storage[0], MASTER: storage[1]}
    settle(group, "")
    rules = [OPTIMIZERS[optimizer].rule, *OPTIMIZERS[optimizer].rules]
    return {k.name: k for k in ahead.specialised(rules, elements, arch, group)}
