"""Plans of engines that step a device's tensors by tables in its memory; the kernels are the engine's."""

# Torch has no public names for whether modes are on.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor

from fusedopt import checks, host, options
from fusedopt.aliases import ParamGroups
from fusedopt.context import Context, Outcome, StepRequest
from fusedopt.engines import tables
from fusedopt.engines.tables import Rows, StepTable, is_capturing, refuse_capture
from fusedopt.layout import OptionNumber, StepWord, record_width
from fusedopt.passes import Pass
from fusedopt.ranks import Reduction
from fusedopt.rule import LAST_FLOAT_STEP
from fusedopt.scan import Scan
from fusedopt.state import New
from fusedopt.status import StepStatus
from fusedopt.sums import Sums


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """The device as the current one."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def has_modes() -> bool:
    """Whether torch's operations run Python now."""
    return torch._C._is_torch_function_mode_enabled() or torch._C._len_torch_dispatch_stack() > 0


class DevicePlan(ABC):
    """The parameters of an optimizer on a device, whose steps the device counts. Subclasses launch.

    Args:
        context: Of the optimizer.
        members: Those that the plan steps, counted through all groups; all are on one device.
        new: Those whose states or averages were made for the coming step.
        nth: How many plans on the device come before it in a step.
        names: The rule's states, scalars and hyperparameters, in the engine's order.
        programs: How many the engine launches at most.
        tile: Elements of a tile.
        by_value: How many words of the step table a launch takes by value.
        sizes: Of shares, see fusedopt/engines/tables.py; None for those there.
        runs_per_share: How many workers add up a share by themselves.
    """

    device: torch.device
    passes: Pass
    reduction: Reduction
    sums: Sums | None
    table: Rows
    step_table: StepTable
    status: StepStatus
    partials: Tensor
    slots: Tensor
    epilogue_slots: Tensor

    name: str
    asynchronous = True  # a step is skipped on the device, and the host does not wait to hear of it

    def __init__(
        self,
        context: Context,
        members: list[int],
        new: New,
        nth: int,
        names: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]],
        programs: int,
        tile: int,
        by_value: int = 0,
        sizes: tuple[int, ...] | None = None,
        runs_per_share: int = 1,
    ) -> None:
        self.members = members
        self._params = [p for p, _ in context.members(members)]
        self.device = self._params[0].device
        self.stepped_members: list[int] = []
        self._context = context
        self._groups, self._state = context.param_groups, context.state
        self._scan = host.device_scan(context, names[2], members, new, self.device)
        rule, scope = context.rule, context.scope
        self.passes = Pass.of(rule, scope)
        with on_device(self.device):
            self.sums = Sums(rule, scope, self._groups, self.device) if rule.has_sums() else None
            places, sizes = self.sums and self.sums.places, sizes or tables.SHARE_SIZES
            self.table = Rows(context, members, self.device, names[:2], programs, tile, sizes, places)
            n_hyper = len(names[2]) + (len(OptionNumber) if self.table.has_options else 0)
            words = StepWord.GRADS + self.table.count + len(self._groups) * record_width(n_hyper)
            self.step_table = StepTable(words, self.device, words <= by_value)
            self.status = context.status(self.device, nth)
            self.partials = torch.empty(self.table.n_shares, dtype=torch.float64, device=self.device)
            n_runs = runs_per_share * self.table.n_shares
            self.slots, self.epilogue_slots = (
                torch.zeros((n_runs + n, width) if width else 1, dtype=torch.float64, device=self.device)
                for n, width in (
                    (places.first[-1] if places else 0, len(rule.measures)),
                    (2 * self.table.count, len(rule.epilogue)),  # the second time for their own sums
                )
            )
        self._body = self.step_table.words[StepWord.GRADS :]
        self.reduction = Reduction()
        self._streams: set[int] = set()
        self._launched = Pass(0)
        self._room = self._steps_left()

    def rebind(self, groups: ParamGroups) -> None:
        """The same groups stand in another list now."""
        self._groups = groups
        self._scan.rebind(groups)

    def scan(self) -> bool:
        """Read gradients and hyperparameters; False when the plan no longer fits and must be made anew."""
        self.stepped_members = []
        replaced = self._context.param_groups is not self._groups or self._context.state is not self._state
        if replaced or not self._scan.scan(torch.get_num_threads()):
            return False
        if host.CHECKED and not isinstance(self._scan, Scan):
            host.check_scan(cast("host.Facts", self._scan))
        self.step_table.changed(self._scan.write(self._body))
        self._room -= 1
        return self._room >= 0

    def increment_versions(self) -> None:
        """Tell autograd what was written, if the step was not skipped."""
        self._scan.increment_versions()

    def check(self) -> None:
        """Raise if a tensor is not what it was in the scan."""
        self._scan.check(torch.get_num_threads())

    def _steps_left(self) -> int:
        """After how many steps a float32 counter may have come to the end of its exact range. Waits for the device."""
        members = self._context.members(self.members)
        counting = [p for p, group in members if options.STEP in options.scalars_of(self._context.rule, group)]
        states = [self._state.get(p, {}) for p in counting]
        steps = [s["step"] for s in states if "step" in s and s["step"].dtype == torch.float32]
        return LAST_FLOAT_STEP - int(torch.stack(steps).max()) if steps else sys.maxsize

    def run(self, passes: Pass, request: StepRequest, squared: float | Tensor | None) -> Outcome:
        """Do some passes, see fusedopt/passes.py."""
        status, scaling = self.status, request.scaling
        if not passes:
            return Outcome(status.squared_norm, status.norm, status.skipped)
        with on_device(self.device):
            if is_capturing(self.device):
                self._check_capture(passes)
            else:
                self._enter_stream()
                self._launched |= passes
            is_measured = Pass.NORM in passes or squared is not None
            self.step_table.set_header(request.max_norm, is_measured, request.skip_nonfinite)
            self.step_table.send()
            if isinstance(squared, Tensor):
                status.squared_norm.copy_(squared, non_blocking=True)
            elif squared is not None:
                status.squared_norm.fill_(squared)
            scale, found_inf = self._here(scaling.grad_scale, status.one), self._here(scaling.found_inf, status.zero)
            if has_modes():  # what torch did since the scan, the user's Python may have seen
                self.check()
            self.launch(passes, scale, found_inf)
            if Pass.UPDATE in passes:
                self._scan.commit()
                self.stepped_members = self.members
        return Outcome(status.squared_norm, status.norm, status.skipped)

    @abstractmethod
    def launch(self, passes: Pass, grad_scale: Tensor, found_inf: Tensor) -> None:
        """Launch what does some passes. The norm's writes the sum of the gradients' squares to ``status.squared_norm``.

        Args:
            passes: One at least.
            grad_scale: One float32 on the device.
            found_inf: Another.
        """

    def finish(self) -> None:
        """The step is over: let go of the gradients."""
        self._scan.release()

    def _enter_stream(self) -> None:
        """Tell the allocator where the tables are used, so that a later plan does not get their memory too early."""
        if self.device.type == "cpu":
            return
        stream = torch.get_device_module(self.device).current_stream()
        if stream.stream_id not in self._streams:
            self._streams.add(stream.stream_id)
            for tensor in self.tensors():
                tensor.record_stream(stream)

    def tensors(self) -> list[Tensor]:
        """The device memory that launches of this plan use."""
        t, s = self.table, self.status
        step_table = [] if self.step_table.by_value else [self.step_table.on_device]
        standing = t.rows, t.tiles, t.shares, t.borders, t.layouts, t.row_sums
        sums = [self.slots, self.epilogue_slots, *(self.sums.tensors() if self.sums else ())]
        return [*standing, self.partials, *sums, s.numbers, s.counts, s.one, s.zero, *step_table]

    def _here(self, value: Tensor | None, default: Tensor) -> Tensor:
        if value is None:
            return default
        return value.to(self.device, torch.float32, non_blocking=True)

    def _check_capture(self, passes: Pass) -> None:
        """A graph steps what has a gradient now, and nothing else ever; and kernels are loaded outside of it."""
        if passes & ~self._launched:
            refuse_capture(self.device, "clipping or skip_nonfinite was switched on")
        labels = checks.labels(self._groups)
        for i, p in zip(self.members, self._params, strict=True):
            if p.requires_grad and p.grad is None:
                raise RuntimeError(
                    f"{labels[i]} has no gradient while a CUDA graph is captured, and no replay would step it; capture "
                    "the backward pass with the step, or keep gradients with zero_grad(set_to_none=False)"
                )
        self._context.retain(self)
