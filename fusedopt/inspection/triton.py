"""The Triton engine's kernels, compiled for a GPU that need not be there, and looked at."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fusedopt.inspection.code import Report, of_amdgcn, of_cubin

if TYPE_CHECKING:
    from fusedopt.triton_kernels.ahead import Specialised  # pyright: ignore[reportMissingImports]

Job = tuple[str, str, str]  # optimizer class, kernel name, architecture


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


def jobs(optimizers: list[str], elements: list[str], arch: str) -> list[Job]:
    """What is to be inspected: each kernel once, though optimizers may share a rule."""
    found: dict[str, Job] = {}
    for name in optimizers:
        for kernel in _kernels(name, elements, arch):
            found.setdefault(kernel, (name, kernel, arch))
    return list(found.values())


def inspect(job: Job) -> Report:
    """Compile one kernel, and read it."""
    from triton import knobs  # pyright: ignore[reportAttributeAccessIssue]

    from fusedopt.triton_kernels import ahead  # pyright: ignore[reportMissingImports]

    optimizer, name, arch = job
    kernel = ahead.compiled(_kernels(optimizer, [name.split()[-1]], arch)[name], arch)
    if arch.startswith("gfx"):
        return of_amdgcn(name, arch, kernel.asm["amdgcn"])
    return of_cubin(name, f"sm_{arch}", kernel.asm["cubin"], knobs.nvidia.cuobjdump.path)


def _kernels(optimizer: str, elements: list[str], arch: str) -> dict[str, Specialised]:
    from fusedopt.optimizers import OPTIMIZERS
    from fusedopt.triton_kernels import ahead  # pyright: ignore[reportMissingImports]

    return {
        k.name: k for k in ahead.specialised([OPTIMIZERS[optimizer].rule, *OPTIMIZERS[optimizer].rules], elements, arch)
    }
