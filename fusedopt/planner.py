"""Planning: everything is checked, engines are chosen, missing states are made, and plans of engines come of it."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt import checks, engines, memory, options, state_checks, storage
from fusedopt.aliases import ParamGroup, ParamState, Stored
from fusedopt.context import Context, Plan
from fusedopt.ranks import Ranks, Reduction
from fusedopt.state import New, NewState, StepCounters, initial_options, initial_state
from fusedopt.sums import ALL, GROUP

Assigned = list[tuple[str, Tensor, ParamGroup]]  # the engine that steps a parameter, the parameter, its group


def plan(context: Context, new_state: NewState, measures: bool, ranks: Ranks) -> list[Plan]:
    """Plans for an optimizer as it is now, in the order in which they are to be run.

    Args:
        context: Of the optimizer, which gets the states that parameters with gradients lack.
        new_state: Gets an entry for each of them, also when an exception comes.
        measures: Whether the step measures gradients. Where it does, or the rule adds anything up, parameters that are
            sharded otherwise are of other plans, so that each can be asked for its sums.
        ranks: Of the optimizer's parameters.

    Raises:
        RuntimeError, TypeError, ValueError: For whatever cannot be stepped.
    """
    adds_up = measures or context.rule.has_sums()
    for g, group in enumerate(context.param_groups):
        options.settle(group, f" (group {g})")
        options.settle_numbers(context.rule, group)
    if adds_up:
        ranks.refuse_overlap()
    checks.tensors_are_whole(context.rule, context.scope, context.param_groups, context.optimizer)
    if adds_up and ranks.are_hidden:
        checks.norm_is_whole(context.param_groups)
    assigned = _assign(context)
    # States that are yet to be made share no memory.
    waves = memory.waves([_used(p, context.state.get(p, {})) for _, p, _ in assigned])
    if any(waves):
        _leave_to_eager(context, assigned, waves)
    _create_states(context, assigned, new_state)
    new = New.of(context.rule, new_state)
    which: dict[tuple[int, str, torch.device | None, Reduction], list[int]] = {}
    for i, (name, p, _) in enumerate(assigned):
        reduction = Reduction.of(p) if adds_up and ranks.are_many else Reduction()
        which.setdefault((waves[i], name, engines.plan_device(name, p), reduction), []).append(i)
    plans: list[Plan] = []
    for (_, name, device, reduction), members in sorted(which.items(), key=lambda item: item[0][0]):
        nth = sum(plan.device == device for plan in plans)
        plans.append(engines.plan(name, context, members, new.among(members), nth))
        plans[-1].reduction = reduction
    return plans


def check(context: Context) -> None:
    """Raise for whatever of an optimizer could not be stepped; see ``plan``."""
    for g, group in enumerate(context.param_groups):
        options.settle(group, f" (group {g})")
        options.settle_numbers(context.rule, group)
    _assign(context)


def _assign(context: Context) -> Assigned:
    assigned: Assigned = []
    rule = context.rule
    for g, group in enumerate(context.param_groups):
        checks.group(rule, group, g, stepping=True)
        for i, p in enumerate(group["params"]):
            label, state = checks.Label(group, g, i, p), context.state.get(p, {})
            state_checks.parameter(rule, p, group, state, label, context.optimizer)
            try:
                engine = engines.choose(context.engine, p, group, rule, state, label)
            except (RuntimeError, TypeError, ValueError):
                if p.grad is not None:
                    raise
                engine = "eager"  # which looks again when there is a gradient
            assigned.append((engine, p, group))
    return assigned


def _leave_to_eager(context: Context, assigned: Assigned, waves: list[int]) -> None:
    """Lazy gradients over memory that an earlier wave writes: other engines resolve gradients before the first."""
    labels = checks.labels(context.param_groups)
    for i, (name, p, group) in enumerate(assigned):
        g = None if p.grad is None else memory.local(p.grad)
        if waves[i] and name != "eager" and g is not None and (g.is_conj() or g.is_neg()):
            if context.engine != "auto":
                raise RuntimeError(
                    f"{labels[i]}: engine {name!r} cannot step it: its gradient is lazily conjugated or negated, and "
                    "may be in memory that the step of a parameter before it writes"
                )
            assigned[i] = ("eager", p, group)


def _used(p: Tensor, state: Stored) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that a parameter's step writes and reads here, as far as their addresses can be compared."""
    written = [p, *(value for value in state.values() if isinstance(value, Tensor))]
    read = [] if p.grad is None else [p.grad]
    return memory.comparable(map(memory.local, written)), memory.comparable(map(memory.local, read))


def _create_states(context: Context, assigned: Assigned, new_state: NewState) -> None:
    """Make the states that parameters with gradients lack; mend all counters."""
    rule, all_states = context.rule, context.state
    counters = StepCounters((all_states.get(p, {}) for _, p, _ in assigned), {options.STEP, *rule.scalars})
    common = _in_common(context, assigned)
    made: dict[int, tuple[str, ...]] = {}
    for i, (engine, p, group) in enumerate(assigned):
        if id(p) in made:  # given twice: a first step both times, as torch's is
            new_state.append((i, p, made[id(p)]))
            continue
        device, has = engines.step_device(engine, p), all_states.get(p, {})
        names = [*options.scalars_of(rule, group), *storage.tensors_of(rule, group, has)]
        new: ParamState = {}
        if p.grad is not None and any(has.get(name) is None for name in names):
            initial = initial_options(rule, p, group) | initial_state(rule, p, group)
            for name, value in common.get(_scope(context, group), {}).items():
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


def _scope(context: Context, group: ParamGroup) -> int:
    """What tells a group's scope from others."""
    return id(group) if context.scope == GROUP else 0


def _in_common(context: Context, assigned: Assigned) -> dict[int, dict[str, float]]:
    """Scalars that the parameters of a scope have in common, of those that have any."""
    rule = context.rule
    names = (*rule.shared, *rule.epilogue) if context.scope in (GROUP, ALL) else ()
    common: dict[int, dict[str, float]] = {}
    for _, p, group in assigned if names else ():
        state, scope = context.state.get(p, {}), _scope(context, group)
        if scope not in common and all(name in state for name in names):
            common[scope] = {name: float(state[name]) for name in names}
    return common
