"""State dicts: what an optimizer gives, and what it takes over of one from elsewhere; whatever does not fit raises."""

from __future__ import annotations

from collections import defaultdict
from copy import deepcopy

import torch
from torch import Tensor

from fusedopt import checks, codecs, options, state_checks, storage
from fusedopt.aliases import ParamGroup, ParamGroups, ParamState, StateDict, States
from fusedopt.rule import Rule
from fusedopt.state import adopt_state, widened


class KeepsState(torch.optim.Optimizer):
    """What an optimizer gives of its state, and takes."""

    rule: type[Rule]
    of_steps: tuple[str, ...] = ()  # keys that groups have for a step, and no checkpoint has

    def state_dict(self, *, dequantized: bool = False) -> StateDict:
        """The state, of tensors and Python's own types, as torch.optim's is.

        Args:
            dequantized: For programs that know states of float32 alone: ``state_dtype`` and ``master`` are left out,
                and what states of fewer bits hold is given as float32. Parameters are as they are; for what masters
                hold see ``fusedopt.master_weights``.
        """
        saved: StateDict = super().state_dict()
        if "param_groups" in saved:  # a hook may have made something else of it
            groups = [options.plain(group) for group in saved["param_groups"]]
            groups = [{k: v for k, v in group.items() if k not in self.of_steps} for group in groups]
            if dequantized:
                saved["state"] = dequantized_state(self.rule, self.param_groups, saved)
                groups = [{k: v for k, v in group.items() if k not in options.STORAGE} for group in groups]
            saved["param_groups"] = groups
        return saved

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state from here or from torch.optim. Tensors keep the dtype they were saved in.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If it does not fit: other groups, shapes, states or hyperparameters. Nothing has
                changed then.
        """
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            result = hook(self, state_dict)
            if result is not None:
                state_dict = result
        for part in ("state", "param_groups"):
            if part not in state_dict:
                raise ValueError(f"the loaded state dict has no {part!r}")
        groups = loaded_groups(self.rule, state_dict["param_groups"], self.param_groups)
        state = loaded_state(self.rule, state_dict, groups)
        self.__setstate__({"state": state, "param_groups": groups})
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


@torch.no_grad()
def dequantized_state(rule: type[Rule], groups: ParamGroups, saved: StateDict) -> States:
    """The states of a state dict, those of fewer than 32 bits as float32, without what codecs have besides.

    Args:
        rule: The optimizer's.
        groups: The optimizer's.
        saved: What torch made of them and its state.
    """
    specs, ours = {spec.name: spec for spec in rule.states}, storage.own_names(rule)
    found = dict(saved["state"])
    for group, numbers in zip(groups, (group["params"] for group in saved["param_groups"]), strict=True):
        for p, number in zip(group["params"], numbers, strict=True):
            state = found.get(number)
            if state is None:
                continue
            plain = {name: value for name, value in state.items() if name not in ours}
            for name in specs.keys() & plain.keys():
                if plain[name].dtype in (torch.uint8, torch.bfloat16, torch.float16):
                    operand = storage.state_operand(specs[name], group, state)
                    plain[name] = storage.spread(p, codecs.decode(operand, torch.float32), p.shape)
            found[number] = plain
    return found


def loaded_groups(rule: type[Rule], saved_groups: ParamGroups, own_groups: ParamGroups) -> ParamGroups:
    """An optimizer's param groups with saved options, and with parameters and other options of its own.

    Raises:
        ValueError, TypeError: If they do not fit.
    """
    if len(saved_groups) != len(own_groups):
        raise ValueError(f"the loaded state dict has {len(saved_groups)} param groups, the optimizer {len(own_groups)}")
    groups: ParamGroups = []
    for i, (saved, group) in enumerate(zip(saved_groups, own_groups, strict=True)):
        if len(saved["params"]) != len(group["params"]):
            raise ValueError(
                f"group {i} of the loaded state dict has {len(saved['params'])} parameters, "
                f"the optimizer's {len(group['params'])}"
            )
        own = {k: deepcopy(v) for k, v in saved.items() if k != "params"}
        loaded = {**group, **own, "params": group["params"]}
        options.settle(loaded, f" (group {i})")
        options.settle_numbers(rule, loaded)
        checks.group(rule, loaded, i, stepping=True)
        groups.append(loaded)
    return groups


def loaded_state(rule: type[Rule], state_dict: StateDict, groups: ParamGroups) -> defaultdict[object, ParamState]:
    """The states of a state dict by parameter, in the form that engines take.

    Args:
        rule: The optimizer's.
        state_dict: What was saved.
        groups: What ``loaded_groups`` made of its groups.

    Raises:
        ValueError: If a state does not fit its parameter.
    """
    places: dict[object, tuple[Tensor, ParamGroup, checks.Label]] = {}
    for g, (saved, group) in enumerate(zip(state_dict["param_groups"], groups, strict=True)):
        for i, (key, p) in enumerate(zip(saved["params"], group["params"], strict=True)):
            places[key] = (p, group, checks.Label(group, g, i, p))
    state: defaultdict[object, ParamState] = defaultdict(dict)
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
