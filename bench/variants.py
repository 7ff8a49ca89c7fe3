"""Variants of the GPU engines: one choice that only a GPU can make, other than the default, in each.

CUDA's compile-time choices are those of csrc/cuda/policy.h; a variant with one is a build in a folder of its own, with
AdamW's kernel alone. Choices of run time, and all of Triton's, are constants of the engines' modules.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fusedopt.engines import cuda, tables, triton

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "tune"
EXTENSION = "_cuda.so"


@dataclass(frozen=True)
class Variant:
    """One choice.

    Attributes:
        name: Such as ``threads-256``.
        engine: ``cuda`` or ``triton``.
        defines: What csrc/cuda/policy.h is told, without FUSEDOPT_.
        settings: (module, constant, value) at run time.
        one_launch: Whether a step that clips may be one cooperative launch.
    """

    name: str
    engine: str
    defines: dict[str, int] = field(default_factory=dict)
    settings: tuple[tuple[ModuleType, str, Any], ...] = ()
    one_launch: bool = True

    def __str__(self) -> str:
        return f"{self.engine} {self.name}"

    @property
    def folder(self) -> Path:
        """Where its build is."""
        return FOLDER / (self.name if self.defines else "default")

    def is_built(self) -> bool:
        """Whether there is a build of it, if it is of an engine that has builds."""
        return self.engine == "cuda" and (self.folder / EXTENSION).exists()

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Plans that are made meanwhile are of this variant."""
        settings = self.settings
        if self.engine == "cuda":
            extension = imported(self.folder)
            settings = (*settings, (cuda, "load", lambda: extension))
        before = [(module, name, getattr(module, name)) for module, name, _ in settings]
        try:
            for module, name, value in settings:
                setattr(module, name, value)
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


def _cuda() -> Iterator[Variant]:
    yield Variant("default", "cuda")
    choices = {
        "threads": (64, 256, 512),
        "resident-threads": (256, 512),
        "norm-tiles": (1, 2, 8),
        "masked-elements": (1, 8),
        "halves-in-two": (1,),
        "streaming-stores": (1,),
        "prefetch": (0,),
        "early-prepare": (0,),
    }
    for name, values in choices.items():
        for value in values:
            yield Variant(f"{name}-{value}", "cuda", {name.replace("-", "_").upper(): value})
    for waves in (2, 4, 8):
        yield Variant(f"waves-{waves}", "cuda", settings=((cuda, "WAVES", waves),))
    for name, sizes in (("even", (1,)), ("halved", triton.SHARE_SIZES)):
        yield Variant(f"{name}-shares", "cuda", settings=((tables, "SHARE_SIZES", sizes),))
    yield Variant("two-launches", "cuda", one_launch=False)


def _triton() -> Iterator[Variant]:
    def variant(name: str, constant: str, value: Any) -> Variant:
        return Variant(name, "triton", settings=((triton, constant, value),))

    yield Variant("default", "triton")
    for warps in (2, 8):
        yield variant(f"warps-{warps}", "WARPS", warps)
    for tile in (512, 2048):
        yield variant(f"tile-{tile}", "TILES", dict.fromkeys(triton.TILES, tile))
    for name, options in (("free-registers", {}), ("stages-2", triton.OPTIONS["cuda"] | {"num_stages": 2})):
        yield variant(name, "OPTIONS", triton.OPTIONS | {"cuda": options})
    for programs in (4, 8, 16):
        yield variant(f"programs-{programs}", "PROGRAMS_PER_PROCESSOR", programs)
    for stages in (2, 3):
        yield variant(f"loop-stages-{stages}", "STAGES", stages)
    yield variant("kept-kernel", "KEEPS_KERNELS", True)
    for name, sizes in (("even", (1,)), ("large", tables.SHARE_SIZES)):
        yield variant(f"{name}-shares", "SHARE_SIZES", sizes)


VARIANTS = (*_cuda(), *_triton())


def imported(folder: Path) -> Any:
    """A build of the CUDA engine.

    Raises:
        ImportError: If it is not there, or cannot be loaded.
    """
    spec = importlib.util.spec_from_file_location("_cuda", folder / EXTENSION)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(chosen: list[Variant], arch: str) -> dict[str, str | None]:
    """Builds the CUDA engine for variants.

    Args:
        chosen: Which.
        arch: A compute capability such as 90.

    Returns:
        Why a variant was not built, by name; None if it was.
    """
    try:
        setup = _setup()
        ninja = setup.cuda_ninja(FOLDER)
        for folder, variant in {v.folder: v for v in chosen}.items():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / EXTENSION).unlink(missing_ok=True)  # one of before would do for one that fails
            defines = {"FIRST_VARIANT": 1} | variant.defines
            options = " ".join(f"-DFUSEDOPT_{name}={value}" for name, value in defines.items())
            rules = [setup.CSRC / "rules" / "adam.h"]
            setup.add_cuda_engine(ninja, folder / EXTENSION, rules, [int(arch)], f"{folder.name}_", options)
        ninja.run(keep_going=True)
        reason = "it does not compile"
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
    return {v.name: None if (v.folder / EXTENSION).exists() else reason for v in chosen}


def _setup() -> Any:
    """setup.py, which knows how to build.

    Raises:
        RuntimeError: If this is not a checkout.
    """
    path = ROOT / "setup.py"
    if not path.exists():
        raise RuntimeError(f"variants are built in a checkout, and {ROOT} is none")
    spec = importlib.util.spec_from_file_location("fusedopt_setup", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
