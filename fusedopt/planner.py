"""Planning: everything is checked, engines are chosen, missing states are made, and plans of engines come of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedopt import checks, engines, memory, options, state_checks, storage
from fusedopt.ranks import Ranks, Reduction
from fusedopt.state import New, StepCounters, initial_options, initial_state
from fusedopt.sums import ALL, GROUP

NewState = list[tuple[int, Tensor, tuple[str, ...]]]  # which parameter, and the names of states made for this step
Assigned = list[tuple[str, Tensor, dict[str, Any]]]  # the engine that steps a parameter, the parameter, its group


def plan(optimizer: Any, new_state: NewState, measures: bool, ranks: Ranks) -> list[Any]:
    """Plans for an optimizer as it is now, in the order in which they are to be run.

    Args:
        optimizer: Gets the states that parameters with gradients lack.
        new_state: Gets an entry for each of them, also when an exception comes.
        measures: Whether the step measures gradients. Where it does, or the rule adds anything up, parameters that are
            sharded otherwise are of other plans, so that each can be asked for its sums.
        ranks: Of the optimizer's parameters.

    Raises:
        RuntimeError, TypeError, ValueError: For whatever cannot be stepped.
    """
    adds_up = measures or optimizer.rule.has_sums()
    for g, group in enumerate(optimizer.param_groups):
        options.settle(group, f" (group {g})")
        options.settle_numbers(optimizer.rule, group)
    if adds_up:
        ranks.refuse_overlap()
    checks.tensors_are_whole(optimizer)
    if adds_up and ranks.are_hidden:
        checks.norm_is_whole(optimizer.param_groups)
    assigned = _assign(optimizer)
    # States that are yet to be made share no memory.
    waves = memory.waves([_used(p, optimizer.state.get(p, {})) for _, p, _ in assigned])
    if any(waves):
        _leave_to_eager(optimizer, assigned, waves)
    _create_states(optimizer, assigned, new_state)
    new = New.of(optimizer.rule, new_state)
    which: dict[Any, list[int]] = {}
    for i, (name, p, _) in enumerate(assigned):
        reduction = Reduction.of(p) if adds_up and ranks.are_many else Reduction()
        which.setdefault((waves[i], name, engines.plan_device(name, p), reduction), []).append(i)
    plans = []
    for (_, name, device, reduction), members in sorted(which.items(), key=lambda item: item[0][0]):
        nth = sum(plan.device == device for plan in plans)
        plans.append(engines.plan(name, optimizer, members, new.among(members), nth))
        plans[-1].reduction = reduction
    return plans


def _assign(optimizer: Any) -> Assigned:
    assigned: Assigned = []
    rule = optimizer.rule
    for g, group in enumerate(optimizer.param_groups):
        checks.group(rule, group, g, stepping=True)
        for i, p in enumerate(group["params"]):
            label, state = checks.Label(group, g, i, p), optimizer.state.get(p, {})
            state_checks.parameter(rule, p, group, state, label, type(optimizer).__name__)
            try:
                engine = engines.choose(optimizer.engine, p, group, rule, state, label)
            except (RuntimeError, TypeError, ValueError):
                if p.grad is not None:
                    raise
                engine = "eager"  # which looks again when there is a gradient
            assigned.append((engine, p, group))
    return assigned


def _leave_to_eager(optimizer: Any, assigned: Assigned, waves: list[int]) -> None:
    """Lazy gradients over memory that an earlier wave writes: other engines resolve gradients before the first."""
    labels = checks.labels(optimizer.param_groups)
    for i, (name, p, group) in enumerate(assigned):
        g = None if p.grad is None else memory.local(p.grad)
        if waves[i] and name != "eager" and g is not None and (g.is_conj() or g.is_neg()):
            if optimizer.engine != "auto":
                raise RuntimeError(
                    f"{labels[i]}: engine {name!r} cannot step it: its gradient is lazily conjugated or negated, and "
                    "may be in memory that the step of a parameter before it writes"
                )
            assigned[i] = ("eager", p, group)


def _used(p: Tensor, state: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a parameter's step writes and reads here, as far as their addresses can be compared."""
    written = [p, *(value for value in state.values() if isinstance(value, Tensor))]
    read = [] if p.grad is None else [p.grad]
    return memory.comparable(map(memory.local, written)), memory.comparable(map(memory.local, read))


def _create_states(optimizer: Any, assigned: Assigned, new_state: NewState) -> None:
    """Make the states that parameters with gradients lack; mend all counters."""
    rule, all_states = optimizer.rule, optimizer.state
    counters = StepCounters((all_states.get(p, {}) for _, p, _ in assigned), {options.STEP, *rule.scalars})
    common = _in_common(optimizer, assigned)
    made: dict[int, tuple[str, ...]] = {}
    for i, (engine, p, group) in enumerate(assigned):
        if id(p) in made:  # given twice: a first step both times, as torch's is
            new_state.append((i, p, made[id(p)]))
            continue
        device, has = engines.step_device(engine, p), all_states.get(p, {})
        names = [*options.scalars_of(rule, group), *storage.tensors_of(rule, group, has)]
        new: dict[str, Any] = {}
        if p.grad is not None and any(has.get(name) is None for name in names):
            initial = initial_options(rule, p, group) | initial_state(rule, p, group)
            for name, value in common.get(_scope(optimizer, group), {}).items():
                initial[name].fill_(value)
            new = {name: value for name, value in initial.items() if has.get(name) is None}
            scales = {storage.scale_of(name) for name in new} & initial.keys()
            new |= {name: initial[name] for name in scales}
        scalars = {name: new.get(name, has.get(name)) for name in options.scalars_of(rule, group)}
        unfit = {k: v for k, v in scalars.items() if v is not None and counters.unfit(v, device)}
        if new:
            made[id(p)] = tuple(new)
            new_state.append((i, p, made[id(p)]))  # before they are there: whatever comes, they are taken back
        if new or unfit:
            all_states.setdefault(p, {}).update(new)
        for name, value in unfit.items():
            counters.want(all_states[p], name, value, device)
    counters.make()


def _scope(optimizer: Any, group: dict[str, Any]) -> int:
    """What tells a group's scope from others."""
    return id(group) if optimizer.scope == GROUP else 0


def _in_common(optimizer: Any, assigned: Assigned) -> dict[int, dict[str, float]]:
    """Scalars that the parameters of a scope have in common, of those that have any."""
    rule = optimizer.rule
    names = (*rule.shared, *rule.epilogue) if optimizer.scope in (GROUP, ALL) else ()
    common: dict[int, dict[str, float]] = {}
    for _, p, group in assigned if names else ():
        state, scope = optimizer.state.get(p, {}), _scope(optimizer, group)
        if scope not in common and all(name in state for name in names):
            common[scope] = {name: float(state[name]) for name in names}
    return common
