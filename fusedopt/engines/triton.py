"""The Triton engine's Python face: NVIDIA, AMD and Intel GPUs, without a compiler for C++ or CUDA.

With TRITON_INTERPRET=1 the same kernels are interpreted on CPU tensors: slowly, to check and to debug them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.engines.device import DevicePlan
from fusedopt.engines.occupancy import resident_blocks
from fusedopt.layout import row_width
from fusedopt.operands import Signature
from fusedopt.passes import Pass
from fusedopt.rule import Rule, StepScale

WARPS = 4
TILES = {"cuda": 1024, "hip": 2048, "xpu": 1024}  # 8 elements for each thread: 16 bytes of a half precision type
# Left to itself ptxas spills a little to fit one more block on a processor.
OPTIONS = {"cuda": {"maxnreg": 128}, "hip": {}, "xpu": {}}
# Programs that are launched for each processor; None: as many as its registers hold, where they can be asked, as shares
# are cut for elsewhere. Untested.
PROGRAMS_PER_PROCESSOR: int | None = None
CUT_PER_PROCESSOR = 8
# Shares, see fusedopt/engines/tables.py. Whether 4 or 16 programs on a processor claim them, the last one ends at most
# 10% later than if all ended at once, by calculation. Untested.
SHARE_SIZES = (1, 1, 2, 4, 8)
STAGES: int | None = None  # rounds of the loops over full tiles that are under way at once; None: Triton's choice
KEEPS_KERNELS = False  # launch what was compiled by itself, without looking it up by its arguments. Untested
INTERPRETED_TILE, INTERPRETED_PROGRAMS = 4096, 2  # few, large: each operation is a call of numpy
GPUS = ("cuda", "xpu")  # AMD's are torch's "cuda" too


@cache
def interprets() -> bool:
    """Whether Triton was told to interpret kernels on the CPU."""
    try:
        import triton
    except Exception:
        return False
    return bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


@cache
def available() -> str | None:
    """Why the engine cannot run here; None if it can."""
    try:
        import triton  # noqa: F401
    except Exception as error:
        return f"triton does not import: {error}"
    if interprets() or any(getattr(torch, kind).is_available() for kind in GPUS):
        return None
    return "torch sees no GPU"


def accepts(p: Tensor, group: Any, rule: type[Rule], state: Mapping[str, Any]) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    if p.device.type not in (("cpu",) if interprets() else GPUS):
        return f"it is on {p.device}"
    if rule.name not in _rules():
        return f"rule {rule.name!r} has no Triton kernel"
    return checks.unsteppable(p, group, rule, state)


def home() -> torch.device:
    """The device that the engine is for."""
    if interprets():
        return torch.device("cpu")
    return torch.device(next(kind for kind in GPUS if getattr(torch, kind).is_available()))


def step_device(p: Tensor) -> torch.device:
    """Where the engine keeps a parameter's step."""
    return p.device


def _rules() -> dict[str, Any]:
    from fusedopt.triton_kernels import rules  # pyright: ignore[reportMissingImports]

    return rules.by_name()


def constants(rule: type[Rule], signatures: Iterable[Signature], tile: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the norm and the step kernel are specialised to."""
    ours = _rules()[rule.name]
    n_states, n_scalars = len(ours.states), len(ours.scalars)
    width = row_width(n_states, n_scalars)
    shared = {"SIGNATURES": ";".join(map(str, signatures)), "WIDTH": width, "TILE": tile, "STAGES": STAGES}
    counts = {"N_STATES": n_states, "N_SCALARS": n_scalars, "N_HYPER": len(ours.hyper)}
    scale = getattr(ours, "step_scale", StepScale.LR.value)
    return shared, {"DIRECTION": ours.direction, "PREPARE": ours.prepare, "STEP_SCALE": scale, **counts, **shared}


def options(backend: str) -> dict[str, Any]:
    """How the kernels are compiled. Contraction to fused multiply-adds is asked for: Triton's default changes."""
    return {"num_warps": WARPS, "enable_fp_fusion": True, **OPTIONS[backend]}


def backend_of(device: torch.device) -> str:
    """What Triton calls the makers of a GPU."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type


class Kernel:
    """A kernel as a plan launches it: specialised, and with a grid, which stand from the first launch on.

    Args:
        function: The jit function.
        constants: What it is specialised to, by name.
        more: How it is compiled.
        programs: How many shares were cut for.
        most: How many there are anything to do for.
        device: Where it runs.
    """

    def __init__(
        self,
        function: Any,
        constants: dict[str, Any],
        more: dict[str, Any],
        programs: int,
        most: int,
        device: torch.device,
    ) -> None:
        self._function, self._constants, self._more = function, constants, more
        self._programs, self._most, self._device = programs, most, device
        self._launch: Callable[..., Any] | None = None

    def __call__(self, *args: Any) -> None:
        """Launch it."""
        if self._launch is None:
            self._launch = self._chosen(args)
        self._launch(*args)

    def _chosen(self, args: tuple[Any, ...]) -> Callable[..., Any]:
        """What launches, by the arguments of the first launch; those of later ones differ in nothing that matters."""
        if self._device.type == "cpu":
            return _quietly(partial(self._function[(self._programs,)], **self._constants))
        compiled, programs = self._compiled(args), self._programs
        if compiled and PROGRAMS_PER_PROCESSOR is None:
            programs = min(self._most, processors(self._device) * self._resident(compiled))
        if compiled and KEEPS_KERNELS:
            constants = [self._constants[name] for name in self._function.arg_names[len(args) :]]
            launch = compiled[programs, 1, 1]
            return lambda *args: launch(*args, *constants)
        return partial(self._function[(programs,)], **self._constants, **self._more)

    def _compiled(self, args: tuple[Any, ...]) -> Any:
        """The kernel, compiled and loaded, as far as that can be had beforehand; None elsewhere."""
        if backend_of(self._device) != "cuda":
            return None
        try:
            kernel = self._function.warmup(*args, grid=(self._programs,), **self._constants, **self._more)
            kernel._init_handles()  # as Triton's own tutorials do
            self._resident(kernel)
        except Exception:  # whatever is other than in the versions that are known; a launch tells what is wrong
            return None
        return kernel

    def _resident(self, kernel: Any) -> int:
        """How many programs a processor holds."""
        properties = torch.cuda.get_device_properties(self._device)
        return resident_blocks(kernel.n_regs, kernel.metadata.num_warps, kernel.metadata.shared, properties)


class Plan(DevicePlan):
    """The parameters of an optimizer that this engine steps on one device."""

    def __init__(self, optimizer: Any, members: list[int], new_state: list[int], nth: int) -> None:
        from fusedopt.triton_kernels import norm, step  # pyright: ignore[reportMissingImports]

        device = optimizer.members(members)[0][0].device
        ours = _rules()[optimizer.rule.name]
        interpreted = device.type == "cpu"
        tile = INTERPRETED_TILE if interpreted else TILES[backend_of(device)]
        programs = INTERPRETED_PROGRAMS
        if not interpreted:
            programs = processors(device) * (PROGRAMS_PER_PROCESSOR or CUT_PER_PROCESSOR)
        names = ours.states, ours.scalars, ours.hyper
        super().__init__(optimizer, members, new_state, nth, names, programs, tile, sizes=SHARE_SIZES)
        t = self.table
        more = {} if interpreted else options(backend_of(device))
        self._norm, self._step = (
            Kernel(function, chosen, more, t.programs, t.n_shares, device)
            for function, chosen in zip(
                (norm.norm, step.step), constants(optimizer.rule, t.signatures, tile), strict=True
            )
        )

    def launch(self, passes: Pass, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Launch a kernel for each pass."""
        t, s, words = self.table, self.status, self.step_table.on_device
        if Pass.NORM in passes:
            self._norm(t.rows, t.tiles, t.shares, t.layouts, words, self.partials, s.numbers, s.counts, t.n_shares)
        if Pass.UPDATE in passes:
            tables = t.rows, t.tiles, t.shares, t.borders, t.layouts, words, s.numbers, s.counts
            self._step(*tables, grad_scale, found_inf, t.count, t.n_shares, t.n_borders)


def _quietly(kernel: Any) -> Any:
    """An interpreted kernel that, like a compiled one, does not warn of what NaN and infinity do."""
    return np.errstate(all="ignore")(kernel)


@cache
def processors(device: torch.device) -> int:
    """How many a device has."""
    properties = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
