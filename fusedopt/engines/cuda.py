"""The CUDA engine's Python face: NVIDIA GPUs, one launch of a kernel in C++, also when it measures and clips."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from fusedopt import host, options
from fusedopt.aliases import Group, Stored
from fusedopt.context import Context, KernelInfo
from fusedopt.engines.device import DevicePlan, on_device
from fusedopt.engines.fitness import kernel_lacking, unsteppable
from fusedopt.layout import OptionNumber
from fusedopt.passes import Pass
from fusedopt.rule import Rule
from fusedopt.state import New
from fusedopt.sums import CHANNEL, TENSOR

DEVICES: tuple[str, ...] = ("cuda",)
ASYNCHRONOUS: bool = True
WAVES = 1  # programs that are launched for each that can be resident at once. Untested


@cache
def load() -> ModuleType:
    """The extension.

    Raises:
        ImportError: With the real reason.
    """
    return host.extension("_cuda", "cuda")


def available() -> str | None:
    """Why the engine cannot run here; None if it can."""
    try:
        extension = load()
    except Exception as error:
        return str(error)
    if extension.device_type == "cuda" and not torch.cuda.is_available():
        return extension.no_device() or "torch sees no GPU of NVIDIA's"
    return extension.no_device() or None


def home() -> torch.device:
    """The device that the engine is for."""
    return torch.device(load().device_type)


@cache
def kernels() -> dict[str, KernelInfo]:
    """What the build has of each rule."""
    return {
        k["rule"]: KernelInfo(
            k["rule"],
            {tuple(states): None for states in k["variants"]},
            *(tuple(k[what]) for what in ("hyper", "scalars", "measures", "epilogue")),
        )
        for k in load().kernels()
    }


def accepts(p: Tensor, group: Group, rule: type[Rule], state: Stored) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    if p.device.type != load().device_type:
        return f"it is on {p.device}"
    if not _has_code_for(p.device):
        return f"the build has no code for {torch.cuda.get_device_name(p.device)}"
    return kernel_lacking(rule, group, kernels(), "CUDA") or unsteppable(p, group, rule, state)


@cache
def _has_code_for(device: torch.device) -> bool:
    with on_device(device):
        return load().has_code_for(_index(device))


def _index(device: torch.device) -> int:
    return device.index or 0


class CudaPlan(DevicePlan):
    """The parameters of an optimizer that this engine steps on one GPU."""

    name = "cuda"

    def __init__(self, context: Context, members: list[int], new: New, nth: int) -> None:
        extension, rule = load(), context.rule
        chosen = context.members(members)
        device = chosen[0][0].device
        has_options = any(map(options.are_asked, context.param_groups))
        states = {tuple(s.name for s in rule.active_states(group)) for _, group in chosen}
        selection = extension.KernelSelection(rule.name, sorted(map(list, states)))
        index = _index(device)
        with on_device(device):
            blocks = WAVES * selection.blocks(index, has_options)
        names = tuple(s.name for s in rule.states), tuple(rule.scalars), kernels()[rule.name].hyper
        limit = extension.words_by_value(index, has_options)
        tile, runs = extension.tile, extension.runs_per_share
        super().__init__(context, members, new, nth, names, blocks, tile, limit, runs_per_share=runs)
        t, s, nothing = self.table, self.status, self.partials
        signatures = [
            (x.is_strided, list(x.codecs), list(x.states), x.average, x.draws, x.is_padded) for x in t.signatures
        ]
        n_states = len(names[0]) + t.has_average
        words = selection.encode(signatures, n_states)
        self._signatures = torch.tensor(words or [0], dtype=torch.int64, device=device).to(torch.int32)
        tables = {
            "rows": t.rows,
            "tiles": t.tiles,
            "shares": t.shares,
            "borders": t.borders,
            "layouts": t.layouts,
            "signatures": self._signatures,
            "step_table": self.step_table.on_device,
            "partials": self.partials,
            "row_sums": t.row_sums,
            "slots": self.slots,
            "epilogue_slots": self.epilogue_slots,
            "segments": self.sums.segments if self.sums else nothing,
            "wholes": self.sums.wholes if self.sums else nothing,
            "largest": self.sums.largest if self.sums else nothing,
            "epilogue": self.sums.epilogue if self.sums else nothing,
            "numbers": s.numbers,
            "counts": s.counts,
        }
        addresses = {name: tensor.data_ptr() for name, tensor in tables.items()}
        counts = {
            "rows": t.count,
            "shares": t.n_shares,
            "borders": t.n_borders,
            "width": t.width,
            "states": n_states,
            "options": len(OptionNumber) if t.has_options else 0,
            "segments": self.sums.places.first[-1] if self.sums else 0,
            "scopes": self.sums.places.n_scopes if self.sums else 0,
            "has_scopes": context.scope != TENSOR,
            "in_channels": context.scope == CHANNEL,
            "shared": sum(1 << names[1].index(name) for name in rule.shared),
        }
        n_words = self.step_table.words.numel()
        self._launcher = extension.Launcher(selection, addresses, counts, index, t.programs, n_words)
        self._words = self.step_table.words.data_ptr() if self.step_table.by_value else 0

    def tensors(self) -> list[Tensor]:
        """The device memory that launches of this plan use."""
        return [*super().tensors(), self._signatures]

    def launch(self, passes: Pass, grad_scale: Tensor, found_inf: Tensor) -> None:
        """One launch, cooperative when it does several passes; two or three where that does not fit on the device."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        self._launcher.run(self._words, stream, passes, grad_scale.data_ptr(), found_inf.data_ptr())


plan = CudaPlan
