"""The eager engine: plain torch, on any device. The readable truth, and the fallback."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks, engines, memory
from fusedopt.rule import WEIGHT_DECAY, Rule, StepScale
from fusedopt.state import lacks_state


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

    asynchronous = False
    indivisible = False
    device = None

    def __init__(self, optimizer: Any, members: list[int], new_state: list[int], nth: int) -> None:
        self.optimizer = optimizer
        self.members = members
        self.new_state = set(new_state)
        self.stepped_members: list[int] = []
        self.everyone = [p for group in optimizer.param_groups for p in group["params"]]
        self.written = memory.Spans(memory.written(optimizer.param_groups, optimizer.state))
        self.reduction: Any = None
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
                checks.parameter(optimizer.rule, p, group, state, labels[i], type(optimizer).__name__)
                if lacks_state(optimizer.rule, state, group, step_device(p)):
                    return False
                if self._choice(p, group, labels[i]) != self.choices.get(i, "eager"):
                    return False
        except (RuntimeError, TypeError, ValueError):
            return False
        return True

    def rebind(self, groups: list[dict[str, Any]]) -> None:
        """The groups stand in another list: whatever the optimizer has is looked at anyway."""

    def check(self) -> None:
        """Nothing has to be what it was: torch looks at every tensor when it steps it."""

    def run(
        self, scaling: Any, max_norm: float, measure: bool, update: bool, skip_nonfinite: bool, squared: float | None
    ) -> tuple[float, float, bool]:
        """Measure the gradients, update the parameters, or both. Returns squared norm, norm and whether it skipped."""
        squared = float(self._squared_norm()) if measure else squared or 0.0
        factor, norm, skipped = _decide(squared, scaling.inverse, max_norm, skip_nonfinite)
        if update and not skipped:
            for i, p, group in self._with_gradients():
                self.stepped_members.append(i)
                with torch.set_grad_enabled(bool(group["differentiable"])):
                    self._update(p, group, factor, i in self.new_state)
        return squared, norm, skipped

    def finish(self) -> None:
        """The step is over."""
        self.new_state -= set(self.stepped_members)

    @torch.no_grad()
    def _squared_norm(self) -> Tensor | float:
        total: Tensor | float = 0.0
        for _, p, _ in self._with_gradients():
            if p.grad is not None and (g := memory.local(p.grad)).numel():
                wide = torch.float32 if p.device.type == "mps" else torch.float64
                total = total + _real(g).to(wide).square().sum().cpu()
        return total

    def _update(self, p: Tensor, group: dict[str, Any], factor: float, new_state: bool) -> None:
        """One parameter's step, in the order of every engine.

        Unscale, clip and maximize (one factor); coupled decay; direction; decoupled decay and write.
        """
        rule, state = self.optimizer.rule, self.optimizer.state[p]
        # Parts step alone; but only the DTensor itself has an autograd graph.
        here = (lambda t: t) if group["differentiable"] else memory.local
        for t in (p, p.grad, *state.values()):  # torch's operations don't look
            if isinstance(t, Tensor) and (short := memory.shortage(memory.local(t))):
                raise RuntimeError(f"a parameter, gradient or state was changed while a step was under way: {short}")
        compute = torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32
        h = SimpleNamespace(**{x.name: float(x.of(group)) for x in rule.hyper})
        s = SimpleNamespace(**{name: float(state[name]) for name in rule.scalars})
        if rule.scalars:
            s.step += 1
        c = rule.prepare(h, s, new_state)

        gradient_factor, coupled_decay, decay_factor, step_scale = _engine_scalars(rule, group, factor)
        names = [spec.name for spec in rule.active_states(group)]
        value = _real(here(p)).to(compute, copy=bool(group["differentiable"]))  # autograd may keep it
        assert p.grad is not None
        g = _real(here(p.grad)).to(compute) * gradient_factor
        if coupled_decay:
            g = g + coupled_decay * value
        d, new = rule.direction(value, g, {name: _real(here(state[name])).to(compute) for name in names}, c)
        _write(here(p), decay_factor * value - step_scale * d)

        for name in names:
            if group["differentiable"]:
                state[name] = _like(p, new[name])
            else:
                _write(here(state[name]), new[name])
        for name in rule.scalars:
            with torch.no_grad():
                state[name].fill_(getattr(s, name))


def _decide(
    squared_norm: float, inverse_scale: float, max_norm: float, skip_nonfinite: bool
) -> tuple[float, float, bool]:
    """What becomes of a step: the gradients' factor, 1 / loss scale * clip; the norm; and whether it is skipped.

    Clips as torch.nn.utils.clip_grad_norm_ does: min(1, max_norm / (norm + 1e-6)), and NaN stays NaN.
    """
    norm = math.sqrt(squared_norm) * inverse_scale
    clip = 1.0 if max_norm == math.inf else max_norm / (norm + 1e-6)
    return inverse_scale * (1.0 if clip > 1 else clip), norm, skip_nonfinite and not math.isfinite(norm)


def _engine_scalars(rule: type[Rule], group: dict[str, Any], factor: float) -> tuple[float, float, Any, Any]:
    """What the engine, not the rule, needs of a group: gradient factor, coupled decay, decay factor and step scale.

    The last two are tensors where lr is one and the step is differentiable.
    """
    lr = group["lr"] if group["differentiable"] else float(group["lr"])
    weight_decay = float(group["weight_decay"]) if WEIGHT_DECAY in rule.engine_hyper() else 0.0
    coupled_decay, decay_factor = (0.0, 1 - lr * weight_decay) if rule.is_decoupled(group) else (weight_decay, 1.0)
    step_scale = lr if rule.step_scale is StepScale.LR else 1.0
    return -factor if group["maximize"] else factor, coupled_decay, decay_factor, step_scale


def _place(g: Tensor | None) -> list[tuple[Any, ...]]:
    """What tells the memory of a gradient, where it has any."""
    return [(t.data_ptr(), t.shape, t.stride()) for t in memory.comparable([] if g is None else [memory.local(g)])]


def _real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def _like(p: Tensor, real: Tensor) -> Tensor:
    return torch.view_as_complex(real) if p.is_complex() else real


def _write(t: Tensor, real: Tensor) -> None:
    """Round a result of the compute type into a tensor, in place."""
    if t.is_conj() or t.is_neg():  # converted first: torch copies float32 into negated halves with the wrong sign
        t.copy_((torch.view_as_complex(real) if t.is_complex() else real).to(t.dtype))
    else:
        (torch.view_as_real(t) if t.is_complex() else t).copy_(real)
