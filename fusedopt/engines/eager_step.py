"""One parameter's step in plain torch, and what steps add up: the readable truth of every engine's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from fusedopt import memory, noise, options, storage
from fusedopt.aliases import Member, ParamGroup, Stored, Values
from fusedopt.codecs import decode, encode, real, write
from fusedopt.context import Context
from fusedopt.operands import Operand
from fusedopt.rule import WEIGHT_DECAY, Rule, StepScale
from fusedopt.state import numbers
from fusedopt.sums import CHANNEL, TENSOR, Sums


class Step:
    """One parameter's step, up to what is written.

    Args:
        context: Of the optimizer.
        i: The parameter's number, counted through all groups.
        p: The parameter.
        group: Its group.
        factor: What unscales and clips its gradient.
        new_state: Whether its state was made for this step.
        new_average: Whether its average was.

    Attributes:
        c: The rule's coefficients.
        s: Its scalars after the step, and what the engine counts.
    """

    p: Tensor
    is_differentiable: bool
    compute: torch.dtype
    c: Values
    s: Values

    def __init__(
        self, context: Context, i: int, p: Tensor, group: ParamGroup, factor: float, new_state: bool,
        new_average: bool,
    ) -> None:  # fmt: skip
        self.p, self._group, self._new_average = p, group, new_average
        self._rule, self._state = context.rule, context.state[p]
        self._context, self._number = context, i
        self.is_differentiable = bool(group["differentiable"])
        assert p.grad is not None
        for t in (p, p.grad, *self._state.values()):  # torch's operations don't look
            if isinstance(t, Tensor) and (short := memory.shortage(memory.local(t))):
                raise RuntimeError(f"a parameter, gradient or state was changed while a step was under way: {short}")
        self.c, self.s = prepared(self._rule, self._state, group, new_state, counts=True)
        scalars = _engine_scalars(self._rule, group, factor)
        gradient_factor, coupled_decay, self._decay_factor, self._step_scale = scalars
        self.compute = torch.float64 if p.dtype in (torch.float64, torch.complex128) else torch.float32
        names = [spec.name for spec in self._rule.active_states(group)]
        self._operands: dict[str, Operand] = {}
        self._slices: tuple[Tensor, ...] | None = None
        if self.is_differentiable:  # only a DTensor itself has an autograd graph, and this may keep what it reads
            self._value = real(p).to(self.compute, copy=True)
            g = real(added_up(p.grad, self.compute).to_dense() if p.grad.is_sparse else p.grad).to(self.compute)
            self._old = {name: real(self._state[name]).to(self.compute) for name in names}
        else:
            self._operands = self._find_operands()
            g = memory.local(p.grad)
            if g.is_sparse:
                g = added_up(g, self.compute)
                g = self._narrow_to(g) if self._rests(g) else g.to_dense()
            g = real(g).to(self.compute)
            self._value = decode(self._operands["param"], self.compute)
            self._old = {name: decode(self._operands[name], self.compute) for name in names}
        g = g * gradient_factor
        if group.get(options.NOISE):
            g = g + self._noise()
        self._replaces = self._rule.replaces in names
        self._g = g + coupled_decay * self._value if coupled_decay and not self._replaces else g

    def _find_operands(self) -> dict[str, Operand]:
        stored = [
            storage.state_operand(x, self._group, self._state) for x in options.states_of(self._rule, self._group)
        ]
        stored.append(storage.param_operand(self.p, self._group, self._state))
        return {operand.name: operand for operand in stored}

    def _rests(self, g: Tensor) -> bool:
        """Whether what a sparse gradient leaves out stays as it is, and is stored apart from what it has."""
        moved = self._group.get(options.NOISE) or options.average_state(self._group) or self._rule.has_sums()
        if moved or not self._rule.rests(self._group) or not g.sparse_dim():
            return False
        has_blocks = g.sparse_dim() == 1 and g.dim() > 1  # which lie inside slices of dimension 0
        codecs = [operand.codec for operand in self._operands.values()]
        return all((c.block == 1 or has_blocks) and not c.draws for c in codecs)

    def _narrow_to(self, g: Tensor) -> Tensor:
        """Leave in the operands the slices that a sparse gradient has. Returns what it has there."""
        self._slices, self._wholes = tuple(g.indices()), self._operands
        self._operands = {
            name: Operand(name, whole.codec, tuple(t[self._slices] for t in whole.tensors))
            for name, whole in self._wholes.items()
        }
        return g.values()

    def _noise(self) -> Tensor:
        eta, gamma, seed = self._group[options.NOISE]
        tensor, stream, _, _ = noise.place(self._context, self._number, self.p)
        drawn = noise.normal(noise.elements(self.p), tensor, int(self.s.step) - 1, (seed, stream))
        return (math.sqrt(float(eta) * self.s.step ** -float(gamma)) * drawn).to(self.compute).to(self.p.device)

    @torch.no_grad()
    def _put(self, name: str, values: Tensor) -> None:
        """Round values into an operand."""
        operand, words = self._operands[name], None
        if operand.codec.draws:
            step = int(self.s.step) - 1
            words = noise.rounding(self._context, self._number, self.p, self._group, name, step)
        encode(operand, values, words)
        if self._slices is not None:
            for whole, part in zip(self._wholes[name].tensors, operand.tensors, strict=True):
                whole[self._slices] = part

    def measure(self) -> tuple[Tensor, ...]:
        """What the rule measures."""
        rule = self._rule
        return _as_many(rule, "measure", rule.measure(self._value, self._g, self._old, self.c), rule.measures)

    def update(self) -> tuple[Tensor, ...]:
        """Write what the step changes; returns what the rule concludes.

        In the order of every engine: unscale, clip and maximize (one factor); noise; coupled decay; direction;
        decoupled decay; average; write.
        """
        rule, p = self._rule, self.p
        d, new = rule.direction(self._value, self._g, self._old, self.c)
        decayed = self._decay_factor * self._value
        if self._group.get(options.CAUTIOUS):
            decayed = torch.where(d * self._value >= 0, decayed, self._value)
        value = stepped = d if self._replaces else decayed - self._step_scale * d
        if average := options.average_state(self._group):
            new[average.name], value = self._averaged(average.name, stepped)
        if self.is_differentiable:
            write(p, value)
            for name in new:
                self._state[name] = torch.view_as_complex(new[name]) if p.is_complex() else new[name]
        else:
            for name, values in {"param": value, **new}.items():
                self._put(name, values)
        write_scalars(self._state, self.s, vars(self.s))
        if not rule.epilogue:
            return ()
        return _as_many(rule, "conclude", rule.conclude(stepped, self._g, d, new, self.c), rule.epilogue)

    def _averaged(self, name: str, value: Tensor) -> tuple[Tensor, Tensor]:
        """The average and the parameter after it."""
        stored = real(self._state[name]) if self.is_differentiable else real(memory.local(self._state[name]))
        asked, average = self._group[options.AVERAGE], stored.to(self.compute)
        if isinstance(asked, options.EMA):
            return torch.lerp(average, value, 1.0 if self._new_average else 1 - float(asked.decay)), value
        if self.s.step % float(asked.k):
            return average, value
        slow = torch.lerp(average, value, float(asked.alpha))
        return slow, slow


def added_up(g: Tensor, compute: torch.dtype) -> Tensor:
    """A sparse gradient in which no index repeats, of the compute type or of complex numbers of it."""
    return g.to(compute.to_complex() if g.is_complex() else compute).coalesce()


def _as_many(rule: type[Rule], verb: str, found: object, names: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What a rule returned, one value for each name."""
    values = cast("tuple[Tensor, ...]", found) if isinstance(found, tuple) else None
    if values is None or len(values) != len(names):
        what = found.__class__.__name__ if values is None else f"{len(values)} values"
        raise TypeError(f"{rule.__name__}.{verb} returned {what}; it must be a tuple of one for each of {names}")
    return values


def prepared(
    rule: type[Rule], state: Stored, group: ParamGroup, new_state: bool, *, counts: bool
) -> tuple[Values, Values]:
    """A parameter's coefficients and scalars after ``prepare``, of a step that counts or of none."""
    h = Values(**{x.name: float(x.of(group)) for x in rule.hyper})
    names = options.scalars_of(rule, group) if options.STEP in state else rule.scalars
    s = Values(**{name: float(state[name]) for name in names})
    if options.STEP in vars(s) and counts:
        s.step += 1
    return rule.prepare(h, s, new_state), s


@torch.no_grad()
def write_scalars(state: Stored, s: Values, names: Iterable[str]) -> None:
    """Put scalars into a parameter's state."""
    for name in names:
        state[name].fill_(getattr(s, name))


class EagerSums:
    """What a plan's step adds up.

    Args:
        context: Of the optimizer.
        sums: The plan's, which all this is written to.
        active: The plan's parameters that have a gradient, with their groups, by number.
    """

    def __init__(self, context: Context, sums: Sums, active: Mapping[int, Member]) -> None:
        self._context, self._rule, self._scope = context, context.rule, context.scope
        self._sums, self._places, self._active = sums, sums.places, active

    def _rows(self, i: int) -> slice:
        """The segments of a parameter."""
        return slice(self._places.first[i], self._places.first[i + 1])

    @torch.no_grad()
    def add_segments(self, step: Callable[[int], Step]) -> None:
        """The sums of all segments."""
        self._sums.segments.zero_()
        for i in self._active:
            rows = self._rows(i)
            for k, values in enumerate(step(i).measure()):
                self._sums.segments[rows, k] = _sums_of(values, rows.stop - rows.start)

    @torch.no_grad()
    def add_scopes(self, step: Callable[[int], Step]) -> None:
        """Those of all scopes, and the largest scores."""
        wholes, largest = self._sums.wholes, self._sums.largest
        wholes.zero_()
        largest.fill_(-math.inf)
        for i in self._active:
            scope, rows = self._places.scopes[i], self._sums.segments[self._rows(i)]
            wholes[scope, :-1] += rows.sum(0)
            wholes[scope, -1] += 1
            if self._rule.score:
                c = step(i).c
                for row in _rows_of(rows):
                    score = self._rule.score(c, Values(**dict(zip(self._rule.measures, row, strict=True))))
                    largest[scope] = max(float(largest[scope]), score)

    def finish(self, i: int, step: Step) -> None:
        """Put what follows from the sums into a step's coefficients."""
        if not self._rule.measures:
            return
        if step.is_differentiable:
            self._rule.finish(step.c, step.s, self._told(i, [values.double().sum() for values in step.measure()]))
            return
        rows = _rows_of(self._sums.segments[self._rows(i)])
        if self._scope != CHANNEL:
            self._rule.finish(step.c, step.s, self._told(i, rows[0]))
            return
        finished: list[tuple[Values, Values]] = []
        for row in rows or [[0.0] * len(self._rule.measures)]:
            c, after = Values(**vars(step.c)), Values(**vars(step.s))
            self._rule.finish(c, after, self._told(i, row))
            finished.append((c, after))
        step.s = finished[0][1]
        n_dims = real(memory.local(step.p)).dim()
        for name in vars(step.c):
            column = torch.tensor([getattr(c, name) for c, _ in finished], dtype=step.compute, device=step.p.device)
            setattr(step.c, name, column[: len(rows)].reshape([-1, *[1] * n_dims][:n_dims]))

    def _told(self, i: int, row: Sequence[float | Tensor]) -> Values:
        """What ``finish`` is told of a segment."""
        own = dict(zip(self._rule.measures, row, strict=True))
        scope = self._places.scopes[i]
        if self._scope == TENSOR:
            m = Values(**own, whole=Values(**own))
            m.largest = -math.inf
            return m
        whole = dict(zip(self._rule.measures, numbers(self._sums.wholes[scope]), strict=False))
        return Values(**own, whole=Values(**whole), largest=float(self._sums.largest[scope]))

    def add_epilogue(self, i: int, concluded: tuple[Tensor, ...]) -> None:
        """What a step concluded."""
        for k, values in enumerate(concluded):
            self._sums.epilogue[self._places.scopes[i], k] += _sums_of(values.detach(), 1)[0]

    def _is_live(self, i: int) -> bool:
        """Whether anything of a parameter's scope is stepped."""
        if self._scope in (TENSOR, CHANNEL):
            return i in self._active
        return bool(self._sums.wholes[self._places.scopes[i], -1])

    def share_scalars(self, others: Sequence[int]) -> None:
        """Scalars that a scope shares advance where there is no gradient, too."""
        if not self._rule.shared:
            return
        zeros = [0.0] * len(self._rule.measures)
        for i, (p, group) in zip(others, self._context.members(others), strict=True):
            state = self._context.state.get(p, {})
            if self._is_live(i) and all(name in state for name in self._rule.scalars):
                c, s = prepared(self._rule, state, group, False, counts=False)
                if self._rule.measures:
                    self._rule.finish(c, s, self._told(i, zeros))
                write_scalars(state, s, self._rule.shared)

    def write_epilogue(self, members: list[int]) -> None:
        """Put what was concluded into scalars."""
        for i, (p, _) in zip(members, self._context.members(members), strict=True):
            state, found = self._context.state.get(p, {}), numbers(self._sums.epilogue[self._places.scopes[i]])
            if self._is_live(i) and all(name in state for name in self._rule.epilogue):
                s = Values(**dict(zip(self._rule.epilogue, found, strict=True)))
                write_scalars(state, s, self._rule.epilogue)


def _rows_of(segments: Tensor) -> list[list[float]]:
    """A matrix's elements."""
    return cast("list[list[float]]", segments.tolist())


def _sums_of(values: Tensor, n: int) -> Tensor:
    """The sums of n equal slices, one after another."""
    if not values.numel():
        return torch.zeros(n, dtype=torch.float64)
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    return values.to(wide).reshape(n, -1).sum(1).cpu().double()


def _engine_scalars(
    rule: type[Rule], group: ParamGroup, factor: float
) -> tuple[float, float, float | Tensor, float | Tensor]:
    """What the engine, not the rule, needs of a group: gradient factor, coupled decay, decay factor and step scale.

    The last two are tensors where lr is one and the step is differentiable.
    """
    lr = group["lr"] if group["differentiable"] else float(group["lr"])
    weight_decay = float(group["weight_decay"]) if WEIGHT_DECAY in rule.engine_hyper() else 0.0
    coupled_decay, decay_factor = (0.0, 1 - lr * weight_decay) if rule.is_decoupled(group) else (weight_decay, 1.0)
    step_scale = lr if rule.step_scale is StepScale.LR else 1.0
    return -factor if group["maximize"] else factor, coupled_decay, decay_factor, step_scale
