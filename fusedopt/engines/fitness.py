"""Whether an engine can step a parameter, as far as that is the same for several."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fusedopt import memory, storage
from fusedopt.aliases import Group, Stored
from fusedopt.context import KernelInfo
from fusedopt.operands import COMPLEX, FLOATING
from fusedopt.options import STEP
from fusedopt.rule import Rule

MOST_DIMS = 64  # that engines walk; a complex number is one of two parts. As many as torch has


def kernel_lacking(rule: type[Rule], group: Group, kernels: Mapping[str, KernelInfo], kind: str) -> str | None:
    """Why none of an engine's kernels, which are of a kind, steps a group by a rule; None if one does.

    A kernel of the rule's name may be another rule's: its names must be the rule's, too.
    """
    info = kernels.get(rule.name)
    if info is None or tuple(s.name for s in rule.active_states(group)) not in info.variants:
        return f"rule {rule.name!r} has no {kind} kernel"
    for what in ("scalars", "measures", "epilogue"):
        its, ours = getattr(info, what), tuple(getattr(rule, what))
        if its != ours:
            return f"its kernel has the {what} {its}, rule {rule.name!r} has {ours}"
    if unknown := set(info.hyper) - {h.name for h in rule.hyper}:
        return f"its kernel has hyperparameters that rule {rule.name!r} lacks: {', '.join(sorted(unknown))}"
    return None


def unsteppable(p: Tensor, group: Group, rule: type[Rule], state: Stored) -> str | None:
    """Why no engine but eager can step a parameter as it, its gradient and its states are; None if they can."""
    if group["differentiable"]:
        return "differentiable=True runs on engine 'eager'"
    g = None if p.grad is None else memory.local(p.grad)
    p = memory.local(p)
    if reason := memory.unreadable(p):
        return reason
    if p.dtype not in FLOATING + COMPLEX:
        return f"its dtype is {p.dtype}"
    if p.dim() + p.is_complex() > MOST_DIMS:
        return f"it has {p.dim()} dimensions"
    if memory.overlaps(p):
        return f"its elements may overlap in memory (strides {p.stride()})"
    if memory.misaligned(p):
        return f"its address {p.data_ptr():#x} is not a multiple of its elements' size"
    if g is not None and (reason := memory.unreadable(g, lazily=True)):  # lazy gradients are resolved first
        return f"of its gradient: {reason}"
    written = [p]
    for key in (*storage.names_of(rule), *rule.scalars, STEP):
        value = state.get(key)
        if isinstance(value, Tensor):
            value = memory.local(value)
            if reason := memory.unreadable(value):
                return f"of its state {key!r}: {reason}"
            written.append(value)
    if g is not None and memory.may_write_what_it_reads(g, written):
        return "its gradient shares memory with it or its states"
    return None
