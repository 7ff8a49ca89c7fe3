"""What of a state dict an optimizer takes over. Nothing here changes anything; whatever does not fit raises."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy
from typing import Any

from fusedopt import checks, options, state_checks
from fusedopt.rule import Rule
from fusedopt.state import adopt_state, widened

Groups = list[dict[str, Any]]


def loaded_groups(rule: type[Rule], saved_groups: Groups, own_groups: Groups) -> Groups:
    """An optimizer's param groups with saved options, and with parameters and other options of its own.

    Raises:
        ValueError, TypeError: If they do not fit.
    """
    if len(saved_groups) != len(own_groups):
        raise ValueError(f"the loaded state dict has {len(saved_groups)} param groups, the optimizer {len(own_groups)}")
    groups = []
    for i, (saved, group) in enumerate(zip(saved_groups, own_groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {i} of the loaded state dict has {len(saved['params'])} parameters, "
                f"the optimizer's {len(group['params'])}"
            )
        own = {k: deepcopy(v) for k, v in saved.items() if k != "params"}
        loaded = {**group, **own, "params": group["params"]}
        options.settle(loaded, f" (group {i})")
        checks.group(rule, loaded, i, stepping=True)
        groups.append(loaded)
    return groups


def loaded_state(rule: type[Rule], state_dict: dict[str, Any], groups: Groups) -> defaultdict[Any, Any]:
    """The states of a state dict by parameter, in the form that engines take.

    Args:
        rule: The optimizer's.
        state_dict: What was saved.
        groups: What :func:`loaded_groups` made of its groups.

    Raises:
        ValueError: If a state does not fit its parameter.
    """
    places = {}
    for g, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for i, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
            places[key] = (p, group, checks.Label(group, g, i, p))
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, value in state_dict["state"].items():
        if key not in places:
            state[key] = value
            continue
        p, group, name = places[key]
        value = widened(rule, value)
        state_checks.state_tensors(rule, p, value, name)
        state_checks.whole_state(rule, value, group, name)
        state[p] = adopt_state(rule, p, value, copy=True)
    return state
