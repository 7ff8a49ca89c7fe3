"""The Triton engine's Python face: NVIDIA, AMD and Intel GPUs, without a compiler for C++ or CUDA.

With TRITON_INTERPRET=1 the same kernels are interpreted on CPU tensors: slowly, to check and to debug them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from itertools import combinations
from types import ModuleType, SimpleNamespace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from fusedopt.aliases import Arguments, Group, Stored
from fusedopt.context import Context, KernelInfo
from fusedopt.engines.device import DevicePlan
from fusedopt.engines.fitness import kernel_lacking, unsteppable
from fusedopt.engines.occupancy import Properties, resident_blocks
from fusedopt.options import EIGHT_BIT, STATE_DTYPE
from fusedopt.passes import Pass
from fusedopt.rule import Rule
from fusedopt.state import New
from fusedopt.sums import CHANNEL, TENSOR

WARPS = 4
TILES = {"cuda": 1024, "hip": 2048, "xpu": 1024}  # 8 elements for each thread: 16 bytes of a half precision type
# Left to itself ptxas spills a little to fit one more block on a processor.
OPTIONS: dict[str, dict[str, int]] = {"cuda": {"maxnreg": 128}, "hip": {}, "xpu": {}}
# The same where states have 8 bits: 16 elements for each thread. Untested.
CODE_TILES = {"cuda": 2048, "hip": 4096, "xpu": 2048}
CODE_OPTIONS: dict[str, dict[str, int]] = {"cuda": {"maxnreg": 255}, "hip": {}, "xpu": {}}
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
DEVICES: tuple[str, ...] = ("cuda", "xpu")  # AMD's are torch's "cuda" too
ASYNCHRONOUS: bool = True


@cache
def interprets() -> bool:
    """Whether Triton was told to interpret kernels on the CPU."""
    try:
        return bool(import_module("triton").knobs.runtime.interpret)
    except Exception:
        return False


@cache
def available() -> str | None:
    """Why the engine cannot run here; None if it can."""
    try:
        import_module("triton")
    except Exception as error:
        return f"triton does not import: {error}"
    if interprets() or any(getattr(torch, kind).is_available() for kind in DEVICES):
        return None
    return "torch sees no GPU"


@cache
def kernels() -> dict[str, KernelInfo]:
    """What there is of each rule, for parameters with any of its states; it is compiled when it is first launched."""
    found: dict[str, KernelInfo] = {}
    for name, ours in _rules().items():
        of_any = [kept for n in range(len(ours.states) + 1) for kept in combinations(ours.states, n)]
        lists = (tuple(getattr(ours, what, ())) for what in ("hyper", "scalars", "measures", "epilogue"))
        found[name] = KernelInfo(name, dict.fromkeys(of_any), *lists)
    return found


def accepts(p: Tensor, group: Group, rule: type[Rule], state: Stored) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    if p.device.type not in (("cpu",) if interprets() else DEVICES):
        return f"it is on {p.device}"
    return kernel_lacking(rule, group, kernels(), "Triton") or unsteppable(p, group, rule, state)


def home() -> torch.device:
    """The device that the engine is for."""
    if interprets():
        return torch.device("cpu")
    return torch.device(next(kind for kind in DEVICES if getattr(torch, kind).is_available()))


def _rules() -> dict[str, ModuleType]:
    return import_module("fusedopt.triton_kernels.rules").by_name()


def options(backend: str, has_codes: bool = False) -> Arguments:
    """How the kernels are compiled. Contraction to fused multiply-adds is asked for: Triton's default changes."""
    more = (CODE_OPTIONS if has_codes else OPTIONS)[backend]
    return {"num_warps": WARPS, "enable_fp_fusion": True, **more}


def tile_of(backend: str, has_codes: bool = False) -> int:
    """Elements of a tile."""
    return (CODE_TILES if has_codes else TILES)[backend]


def backend_of(device: torch.device) -> str:
    """What Triton calls the makers of a GPU."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type


Launch = Callable[..., object]


class Compiled(Protocol):
    """What Triton makes of a kernel for a device, as far as it is used here."""

    n_regs: int
    metadata: SimpleNamespace

    def _init_handles(self) -> None: ...

    def __getitem__(self, grid: tuple[int, int, int]) -> Launch: ...


class JitFunction(Protocol):
    """A kernel before it is compiled, as far as it is used here."""

    arg_names: list[str]

    def __getitem__(self, grid: tuple[int, ...]) -> Launch: ...

    def warmup(self, *args: object, grid: tuple[int, ...], **constants: object) -> Compiled:
        """Compile it for what these arguments are."""
        ...


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
        function: JitFunction,
        constants: Arguments,
        more: Arguments,
        programs: int,
        most: int,
        device: torch.device,
    ) -> None:
        self._function, self._constants, self._more = function, constants, more
        self._programs, self._most, self._device = programs, most, device
        self._launch: Launch | None = None

    def __call__(self, *args: object) -> None:
        """Launch it."""
        if self._launch is None:
            self._launch = self._chosen(args)
        self._launch(*args)

    def _chosen(self, args: tuple[object, ...]) -> Launch:
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

    def _compiled(self, args: tuple[object, ...]) -> Compiled | None:
        """The kernel, compiled and loaded, as far as that can be had beforehand; None elsewhere."""
        if backend_of(self._device) != "cuda":
            return None
        try:
            kernel = self._function.warmup(*args, grid=(self._programs,), **self._constants, **self._more)
            kernel._init_handles()  # pyright: ignore[reportPrivateUsage]  # as Triton's own tutorials do
            self._resident(kernel)
        except Exception:  # whatever is other than in the versions that are known; a launch tells what is wrong
            return None
        return kernel

    def _resident(self, kernel: Compiled) -> int:
        """How many programs a processor holds."""
        properties = cast("Properties", torch.cuda.get_device_properties(self._device))
        return resident_blocks(kernel.n_regs, kernel.metadata.num_warps, kernel.metadata.shared, properties)


class TritonPlan(DevicePlan):
    """The parameters of an optimizer that this engine steps on one device."""

    name = "triton"

    def __init__(self, context: Context, members: list[int], new: New, nth: int) -> None:
        ours = import_module("fusedopt.triton_kernels.kernels")
        device = context.members(members)[0][0].device
        of_rule = _rules()[context.rule.name]
        interpreted = device.type == "cpu"
        has_codes = any(group.get(STATE_DTYPE) == EIGHT_BIT for _, group in context.members(members))
        tile = INTERPRETED_TILE if interpreted else tile_of(backend_of(device), has_codes)
        programs = INTERPRETED_PROGRAMS
        if not interpreted:
            programs = processors(device) * (PROGRAMS_PER_PROCESSOR or CUT_PER_PROCESSOR)
        names = of_rule.states, of_rule.scalars, of_rule.hyper
        super().__init__(context, members, new, nth, names, programs, tile, sizes=SHARE_SIZES)
        t, rule, scope = self.table, context.rule, context.scope
        more = {} if interpreted else options(backend_of(device), has_codes)
        self._n_scopes = self.sums.places.n_scopes if self.sums else 0
        self._sums = None
        if self.sums:
            kept = self.sums.segments, self.sums.wholes, self.sums.largest
            self._sums = t.row_sums, self.slots, self.epilogue_slots, *kept
        self._row_sums = t.row_sums if scope == CHANNEL else None
        self._adds_slots = bool(rule.measures) and scope == TENSOR

        def kernels(joined: bool) -> dict[str, Kernel]:
            chosen: dict[str, Arguments] = ours.constants(
                rule, t.signatures, tile, STAGES, scope, joined, t.has_options, t.has_average
            )
            most = {name: self._n_scopes if name in ("scopes", "epilogue") else t.n_shares for name in chosen}
            return {
                name: Kernel(ours.KERNELS[name], chosen[name], more, min(t.programs, most[name]), most[name], device)
                for name in chosen
            }

        self._kernels = kernels(joined=False)
        self._step_joined = kernels(joined=True)["step"] if self._adds_slots else self._kernels["step"]

    def launch(self, passes: Pass, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Launch a kernel or two for each pass."""
        t, s, words, kernels, sums = self.table, self.status, self.step_table.on_device, self._kernels, self._sums
        if Pass.NORM in passes:
            tables = t.rows, t.tiles, t.shares, t.layouts, self._row_sums, words, self.partials, s.numbers, s.counts
            kernels["norm"](*tables, t.n_shares)
        if Pass.SUMS in passes:
            self._add_up(passes, grad_scale, found_inf)
        if Pass.SCOPES in passes:
            kernels["scopes"](t.rows, words, sums, t.count, self._n_scopes)
        if Pass.UPDATE in passes:
            step = kernels["step"] if Pass.SUMS in passes else self._step_joined
            tables = t.rows, t.tiles, t.shares, t.borders, t.layouts, words, s.numbers, s.counts
            step(*tables, grad_scale, found_inf, sums, t.count, t.n_shares, t.n_borders)
        if "epilogue" in kernels and passes & (Pass.UPDATE | Pass.EPILOGUE):
            assert self.sums
            tables = t.rows, words, s.counts, sums, self.sums.epilogue
            kernels["epilogue"](*tables, t.count, self._n_scopes, int(passes))

    def _add_up(self, passes: Pass, grad_scale: Tensor, found_inf: Tensor) -> None:
        """What the rule measures of segments, complete unless the step kernel completes it."""
        t, s, words = self.table, self.status, self.step_table.on_device
        if Pass.UPDATE not in passes:
            assert self.sums
            self.sums.segments.zero_()  # others wrote theirs there
        tables = t.rows, t.tiles, t.shares, t.layouts, words, s.numbers, s.counts
        self._kernels["sums"](*tables, grad_scale, found_inf, self._sums, t.count, t.n_shares)
        if not self._adds_slots or Pass.UPDATE not in passes:
            self._kernels["fold"](t.tiles, t.shares, words, self._sums, t.n_shares)


plan = TritonPlan


def _quietly(kernel: Launch) -> Launch:
    """An interpreted kernel that, like a compiled one, does not warn of what NaN and infinity do."""
    return np.errstate(all="ignore")(kernel)


@cache
def processors(device: torch.device) -> int:
    """How many a device has."""
    properties: object = torch.get_device_module(device).get_device_properties(device)
    return getattr(properties, "multi_processor_count", None) or getattr(properties, "gpu_subslice_count")  # noqa: B009
