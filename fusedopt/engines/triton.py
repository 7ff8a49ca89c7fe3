"""The Triton engine's Python face: NVIDIA, AMD and Intel GPUs, without a compiler for C++ or CUDA.

With TRITON_INTERPRET=1 the same kernels are interpreted on CPU tensors: slowly, to check and to debug them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.engines.device import DevicePlan
from fusedopt.layout import row_width
from fusedopt.operands import Signature
from fusedopt.rule import Rule

WARPS = 4
TILES = {"cuda": 1024, "hip": 2048, "xpu": 1024}  # 8 elements for each thread: 16 bytes of a half precision type
# Left to itself ptxas spills a little to fit one more block on a processor.
OPTIONS = {"cuda": {"maxnreg": 128}, "hip": {}, "xpu": {}}
PROGRAMS_PER_PROCESSOR = 8
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
    shared = {"SIGNATURES": ";".join(map(str, signatures)), "WIDTH": row_width(n_states, n_scalars), "TILE": tile}
    counts = {"N_STATES": n_states, "N_SCALARS": n_scalars, "N_HYPER": len(ours.hyper)}
    return shared, {"DIRECTION": ours.direction, "PREPARE": ours.prepare, **counts, **shared}


def options(backend: str) -> dict[str, Any]:
    """How the kernels are compiled. Contraction to fused multiply-adds is asked for: Triton's default changes."""
    return {"num_warps": WARPS, "enable_fp_fusion": True, **OPTIONS[backend]}


def backend_of(device: torch.device) -> str:
    """What Triton calls the makers of a GPU."""
    return "hip" if device.type == "cuda" and torch.version.hip else device.type


class Plan(DevicePlan):
    """The parameters of an optimizer that this engine steps on one device."""

    def __init__(self, optimizer: Any, members: list[int], new_state: list[int], nth: int) -> None:
        from fusedopt.triton_kernels import norm, step  # pyright: ignore[reportMissingImports]

        device = optimizer.members(members)[0][0].device
        ours = _rules()[optimizer.rule.name]
        interpreted = device.type == "cpu"
        tile = INTERPRETED_TILE if interpreted else TILES[backend_of(device)]
        programs = INTERPRETED_PROGRAMS if interpreted else _programs(device)
        super().__init__(optimizer, members, new_state, nth, (ours.states, ours.scalars, ours.hyper), programs, tile)
        for_norm, for_step = constants(optimizer.rule, self.table.signatures, tile)
        extra = {} if interpreted else options(backend_of(device))
        launch = _quietly if interpreted else lambda kernel: kernel
        grid = (self.table.programs,)
        self._norm, self._step = launch(norm.norm[grid]), launch(step.step[grid])
        self._for_norm, self._for_step = for_norm | extra, for_step | extra

    def launch(self, measure: bool, update: bool, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Launch the norm kernel, the step kernel, or both."""
        t, s = self.table, self.status
        tables = t.rows, t.tiles, t.shares, t.layouts, self.step_table.on_device
        if measure:
            self._norm(*tables, self.partials, s.numbers, s.counts, t.n_shares, **self._for_norm)
        if update:
            self._step(*tables, s.numbers, s.counts, grad_scale, found_inf, t.count, t.n_shares, **self._for_step)


def _quietly(kernel: Any) -> Any:
    """An interpreted kernel that, like a compiled one, does not warn of what NaN and infinity do."""
    return np.errstate(all="ignore")(kernel)


@cache
def _programs(device: torch.device) -> int:
    properties = torch.get_device_module(device).get_device_properties(device)
    processors = getattr(properties, "multi_processor_count", None) or properties.gpu_subslice_count
    return PROGRAMS_PER_PROCESSOR * processors
