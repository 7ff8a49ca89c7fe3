"""The eager engine: plain torch, on any device. The readable truth, and the fallback."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fusedopt import checks, memory, options, state_checks
from fusedopt.aliases import Group, ParamGroup, ParamGroups, Stored
from fusedopt.codecs import real
from fusedopt.context import Context, KernelInfo, Outcome, StepRequest
from fusedopt.engines.eager_step import EagerSums, Step, added_up
from fusedopt.passes import Pass
from fusedopt.ranks import Reduction
from fusedopt.rule import Rule
from fusedopt.state import New, lacks_state
from fusedopt.sums import Sums

DEVICES: tuple[str, ...] = ()
ASYNCHRONOUS: bool = False


def available() -> str | None:
    """Why the engine cannot run here: it always can."""
    return None


def accepts(p: Tensor, group: Group, rule: type[Rule], state: Stored) -> str | None:
    """Why the engine cannot step a parameter by a rule; None if it can."""
    p = memory.local(p)
    if p.layout == torch.strided and not p.is_nested and memory.overlaps(p):
        return f"its elements may overlap in memory (strides {p.stride()})"
    return None


def home() -> torch.device:
    """The device that the engine is for."""
    return torch.device("cpu")


def kernels() -> dict[str, KernelInfo]:
    """The engine steps by the rules themselves."""
    return {}


class EagerPlan:
    """The parameters of an optimizer that this engine steps."""

    name = "eager"
    asynchronous = ASYNCHRONOUS
    device = None

    def __init__(self, context: Context, members: list[int], new: New, nth: int) -> None:
        self._context = context
        self.members = members
        self._new_state, self._new_averages = set(new.states), set(new.averages)
        self.stepped_members: list[int] = []
        self._everyone = [p for group in context.param_groups for p in group["params"]]
        self._written = memory.Spans(memory.written(context.param_groups, context.state))
        self.reduction: Reduction = Reduction()
        self.passes: Pass = Pass.of(context.rule, context.scope)
        self.sums: Sums = Sums(context.rule, context.scope, context.param_groups, home())
        self._planned = {id(p): _place(p.grad) for _, p, _ in self._with_gradients()}
        # Another engine, where only the planner saw why it cannot.
        labels = checks.labels(context.param_groups)
        self._chosen = {i: context.engine_of(p, group, labels[i]) for i, p, group in self._with_gradients()}

    def _with_gradients(self) -> Iterator[tuple[int, Tensor, ParamGroup]]:
        for i, (p, group) in zip(self.members, self._context.members(self.members), strict=True):
            if p.grad is not None:
                yield i, p, group

    def scan(self) -> bool:
        """Whether all is as it was planned; if not, planning anew says what is wrong."""
        context = self._context
        self.stepped_members = []
        try:
            for g, group in enumerate(context.param_groups):
                options.settle(group, f" (group {g})")
                checks.group(context.rule, group, g, stepping=True)
            everyone = [p for group in context.param_groups for p in group["params"]]
            if len(everyone) != len(self._everyone) or any(map(lambda a, b: a is not b, everyone, self._everyone)):
                return False
            labels = checks.labels(context.param_groups)
            for i, p, group in self._with_gradients():
                assert p.grad is not None
                if _place(p.grad) != self._planned.get(id(p)):
                    is_written = any(map(self._written.meet, memory.comparable([memory.local(p.grad)])))
                    if is_written or self._chosen.get(i, "eager") != "eager":
                        return False
                state = context.state.get(p, {})
                state_checks.parameter(context.rule, p, group, state, labels[i], context.optimizer)
                if lacks_state(context.rule, state, group, home()):
                    return False
                if context.engine_of(p, group, labels[i]) != self._chosen.get(i, "eager"):
                    return False
        except (RuntimeError, TypeError, ValueError):
            return False
        return True

    def rebind(self, groups: ParamGroups) -> None:
        """The groups stand in another list: whatever the optimizer has is looked at anyway."""

    def increment_versions(self) -> None:
        """Torch told autograd of what it wrote, but for DTensors, of which it wrote the parts."""
        stepped = (p for p, _ in self._context.members(self.stepped_members) if memory.is_dtensor(p))
        torch.autograd.graph.increment_version(list(stepped))

    def check(self) -> None:
        """Nothing has to be what it was: torch looks at every tensor when it steps it."""

    def run(self, passes: Pass, request: StepRequest, squared: float | Tensor | None) -> Outcome:
        """Do some passes, see fusedopt/passes.py."""
        total = float(self._squared_norm()) if Pass.NORM in passes else float(squared or 0.0)
        factor, norm, skipped = _decide(total, request.scaling.inverse, request.max_norm, request.skip_nonfinite)
        if not skipped:
            self._step(passes, factor)
        return Outcome(total, norm, skipped)

    def _step(self, passes: Pass, factor: float) -> None:
        active = {i: (p, group) for i, p, group in self._with_gradients()}
        sums = EagerSums(self._context, self.sums, active)

        def step(i: int) -> Step:
            return Step(self._context, i, *active[i], factor, i in self._new_state, i in self._new_averages)

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
        self._new_state -= set(self.stepped_members)
        self._new_averages -= set(self.stepped_members)

    @torch.no_grad()
    def _squared_norm(self) -> Tensor | float:
        total: Tensor | float = 0.0
        for _, p, _ in self._with_gradients():
            if p.grad is not None and (g := memory.local(p.grad)).numel():
                wide = torch.float32 if p.device.type == "mps" else torch.float64
                g = added_up(g, wide).values() if g.is_sparse else g
                total = total + real(g).to(wide).square().sum().cpu()
        return total


plan = EagerPlan


def _decide(
    squared_norm: float, inverse_scale: float, max_norm: float, skip_nonfinite: bool
) -> tuple[float, float, bool]:
    """What becomes of a step: the gradients' factor, 1 / loss scale * clip; the norm; and whether it is skipped.

    Clips as torch.nn.utils.clip_grad_norm_ does: min(1, max_norm / (norm + 1e-6)), and NaN stays NaN.
    """
    norm = math.sqrt(squared_norm) * inverse_scale
    clip = 1.0 if max_norm == math.inf else max_norm / (norm + 1e-6)
    return inverse_scale * (1.0 if clip > 1 else clip), norm, skip_nonfinite and not math.isfinite(norm)


def _place(g: Tensor | None) -> list[tuple[int, torch.Size, tuple[int, ...]]]:
    """What tells the memory of a gradient, where it has any."""
    return [(t.data_ptr(), t.shape, t.stride()) for t in memory.comparable([] if g is None else [memory.local(g)])]
