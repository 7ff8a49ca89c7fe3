"""The eager engine: plain torch, on any device. The readable truth, and the fallback."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks, engines, memory, options, state_checks
from fusedopt.codecs import real
from fusedopt.engines.eager_step import EagerSums, Step, added_up
from fusedopt.passes import Pass
from fusedopt.rule import Rule
from fusedopt.state import New, lacks_state
from fusedopt.sums import Sums


def available() -> str | None:
    """Why the engine cannot run here: it always can."""
    return None


def accepts(p: Tensor, group: Any, rule: type[Rule], state: Mapping[str, Any]) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    p = memory.local(p)
    if p.layout == torch.strided and not p.is_nested and memory.overlaps(p):
        return f"its elements may overlap in memory (strides {p.stride()})"
    return None


def home() -> torch.device:
    """The device that the engine is for."""
    return torch.device("cpu")


def step_device(p: Tensor) -> torch.device:
    """Where the engine keeps a parameter's step."""
    return torch.device("cpu")


class Plan:
    """The parameters of an optimizer that this engine steps."""

    name = "eager"
    asynchronous = False
    indivisible = False
    device = None

    def __init__(self, optimizer: Any, members: list[int], new: New, nth: int) -> None:
        self.optimizer = optimizer
        self.members = members
        self.new_state, self.new_averages = set(new.states), set(new.averages)
        self.stepped_members: list[int] = []
        self.everyone = [p for group in optimizer.param_groups for p in group["params"]]
        self.written = memory.Spans(memory.written(optimizer.param_groups, optimizer.state))
        self.reduction: Any = None
        self.passes = Pass.of(optimizer.rule, optimizer.scope)
        self.sums = Sums(optimizer.rule, optimizer.scope, optimizer.param_groups, "cpu")
        self.planned = {id(p): _place(p.grad) for _, p, _ in self._with_gradients()}
        # Another engine, where only the planner saw why it cannot.
        labels = checks.labels(optimizer.param_groups)
        self.choices = {i: self._choice(p, group, labels[i]) for i, p, group in self._with_gradients()}

    def _choice(self, p: Tensor, group: dict[str, Any], label: object) -> str:
        optimizer = self.optimizer
        return engines.choose(optimizer.engine, p, group, optimizer.rule, optimizer.state.get(p, {}), label)

    def _with_gradients(self) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
        for i, (p, group) in zip(self.members, self.optimizer.members(self.members), strict=True):
            if p.grad is not None:
                yield i, p, group

    def scan(self) -> bool:
        """Whether all is as it was planned; if not, planning anew says what is wrong."""
        optimizer = self.optimizer
        self.stepped_members = []
        try:
            for g, group in enumerate(optimizer.param_groups):
                options.settle(group, f" (group {g})")
                checks.group(optimizer.rule, group, g, stepping=True)
            everyone = [p for group in optimizer.param_groups for p in group["params"]]
            if len(everyone) != len(self.everyone) or any(map(lambda a, b: a is not b, everyone, self.everyone)):
                return False
            labels = checks.labels(optimizer.param_groups)
            for i, p, group in self._with_gradients():
                assert p.grad is not None
                if _place(p.grad) != self.planned.get(id(p)):
                    is_written = any(map(self.written.meet, memory.comparable([memory.local(p.grad)])))
                    if is_written or self.choices.get(i, "eager") != "eager":
                        return False
                state = optimizer.state.get(p, {})
                state_checks.parameter(optimizer.rule, p, group, state, labels[i], type(optimizer).__name__)
                if lacks_state(optimizer.rule, state, group, step_device(p)):
                    return False
                if self._choice(p, group, labels[i]) != self.choices.get(i, "eager"):
                    return False
        except (RuntimeError, TypeError, ValueError):
            return False
        return True

    def rebind(self, groups: list[dict[str, Any]]) -> None:
        """The groups stand in another list: whatever the optimizer has is looked at anyway."""

    def increment_versions(self) -> None:
        """Torch told autograd of what it wrote, but for DTensors, of which it wrote the parts."""
        stepped = (p for p, _ in self.optimizer.members(self.stepped_members) if memory.is_dtensor(p))
        torch.autograd.graph.increment_version(list(stepped))

    def check(self) -> None:
        """Nothing has to be what it was: torch looks at every tensor when it steps it."""

    def run(
        self, passes: Pass, scaling: Any, max_norm: float, skip_nonfinite: bool, squared: float | None
    ) -> tuple[float, float, bool]:
        """Do some passes, see fusedopt/passes.py. Returns squared norm, norm and whether the step is skipped."""
        squared = float(self._squared_norm()) if Pass.NORM in passes else squared or 0.0
        factor, norm, skipped = _decide(squared, scaling.inverse, max_norm, skip_nonfinite)
        if not skipped:
            self._step(passes, factor)
        return squared, norm, skipped

    def _step(self, passes: Pass, factor: float) -> None:
        active = {i: (p, group) for i, p, group in self._with_gradients()}
        sums = EagerSums(self.optimizer, self.sums, active)

        def step(i: int) -> Step:
            return Step(self.optimizer, i, *active[i], factor, i in self.new_state, i in self.new_averages)

        if Pass.SUMS in passes:
            sums.add_segments(step)
        if Pass.SCOPES in passes:
            sums.add_scopes(step)
        if Pass.UPDATE in passes:
            self.sums.epilogue.zero_()
            for i, (_, group) in active.items():
                self.stepped_members.append(i)
                with torch.set_grad_enabled(bool(group["differentiable"])):
                    taken = step(i)
                    sums.finish(i, taken)
                    sums.add_epilogue(i, taken.update())
            sums.share_scalars(sorted(set(self.members) - set(active)))
        if Pass.EPILOGUE in passes:
            sums.write_epilogue(self.members)

    def finish(self) -> None:
        """The step is over."""
        self.new_state -= set(self.stepped_members)
        self.new_averages -= set(self.stepped_members)

    @torch.no_grad()
    def _squared_norm(self) -> Tensor | float:
        total: Tensor | float = 0.0
        for _, p, _ in self._with_gradients():
            if p.grad is not None and (g := memory.local(p.grad)).numel():
                wide = torch.float32 if p.device.type == "mps" else torch.float64
                g = added_up(g, wide).values() if g.is_sparse else g
                total = total + real(g).to(wide).square().sum().cpu()
        return total


def _decide(
    squared_norm: float, inverse_scale: float, max_norm: float, skip_nonfinite: bool
) -> tuple[float, float, bool]:
    """What becomes of a step: the gradients' factor, 1 / loss scale * clip; the norm; and whether it is skipped.

    Clips as torch.nn.utils.clip_grad_norm_ does: min(1, max_norm / (norm + 1e-6)), and NaN stays NaN.
    """
    norm = math.sqrt(squared_norm) * inverse_scale
    clip = 1.0 if max_norm == math.inf else max_norm / (norm + 1e-6)
    return inverse_scale * (1.0 if clip > 1 else clip), norm, skip_nonfinite and not math.isfinite(norm)


def _place(g: Tensor | None) -> list[tuple[Any, ...]]:
    """What tells the memory of a gradient, where it has any."""
    return [(t.data_ptr(), t.shape, t.stride()) for t in memory.comparable([] if g is None else [memory.local(g)])]
