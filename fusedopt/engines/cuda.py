"""The CUDA engine's Python face: NVIDIA GPUs, one launch of a kernel in C++, also when it measures and clips."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks, host, options
from fusedopt.engines.device import DevicePlan, on_device
from fusedopt.layout import OptionNumber
from fusedopt.passes import Pass
from fusedopt.rule import Rule
from fusedopt.state import New
from fusedopt.sums import CHANNEL, TENSOR

DEVICES = ("cuda",)
WAVES = 1  # programs that are launched for each that can be resident at once. Untested


@cache
def load() -> Any:
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


def accepts(p: Tensor, group: Any, rule: type[Rule], state: Mapping[str, Any]) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    if p.device.type != load().device_type:
        return f"it is on {p.device}"
    if not _has_code_for(p.device):
        return f"the build has no code for {torch.cuda.get_device_name(p.device)}"
    if tuple(s.name for s in rule.active_states(group)) not in _variants().get(rule.name, ()):
        return f"rule {rule.name!r} has no CUDA kernel"
    if reason := checks.named_otherwise(rule, _names(rule.name)):
        return reason
    return checks.unsteppable(p, group, rule, state)


def step_device(p: Tensor) -> torch.device:
    """Where the engine keeps a parameter's step."""
    return p.device


@cache
def _has_code_for(device: torch.device) -> bool:
    with on_device(device):
        return load().has_code_for(_index(device))


@cache
def _variants() -> dict[str, set[tuple[str, ...]]]:
    found: dict[str, set[tuple[str, ...]]] = {}
    for kernel in load().kernels():
        found.setdefault(kernel["rule"], set()).update(map(tuple, kernel["variants"]))
    return found


@cache
def _names(rule: str) -> dict[str, Any]:
    return next(kernel for kernel in load().kernels() if kernel["rule"] == rule)


def _index(device: torch.device) -> int:
    return device.index or 0


class Plan(DevicePlan):
    """The parameters of an optimizer that this engine steps on one GPU."""

    name = "cuda"

    def __init__(self, optimizer: Any, members: list[int], new: New, nth: int) -> None:
        extension, rule = load(), optimizer.rule
        chosen = optimizer.members(members)
        device = chosen[0][0].device
        has_options = any(map(options.are_asked, optimizer.param_groups))
        states = {tuple(s.name for s in rule.active_states(group)) for _, group in chosen}
        selection = extension.KernelSelection(rule.name, sorted(map(list, states)))
        index = _index(device)
        with on_device(device):
            blocks = WAVES * selection.blocks(index, has_options)
        names = tuple(s.name for s in rule.states), tuple(rule.scalars), tuple(_names(rule.name)["hyper"])
        limit = extension.words_by_value(index, has_options)
        tile, runs = extension.tile, extension.runs_per_share
        super().__init__(optimizer, members, new, nth, names, blocks, tile, limit, runs_per_share=runs)
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
            "has_scopes": optimizer.scope != TENSOR,
            "in_channels": optimizer.scope == CHANNEL,
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
