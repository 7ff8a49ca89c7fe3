"""What is checked of a parameter's states. A check raises, or returns nothing; none changes anything."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fusedopt import checks, codecs, memory, operands, storage
from fusedopt.aliases import Group, Stored
from fusedopt.options import MASTER, STATE_DTYPE, STATES, STEP
from fusedopt.rule import Rule


def parameter(rule: type[Rule], p: Tensor, group: Group, state: Stored, name: object, optimizer: str) -> None:
    """A parameter's gradient and state, as far as it has them, can be stepped with."""
    if p.grad is not None:
        checks.gradient(rule, p, p.grad, group, name, optimizer)
        if group["differentiable"]:
            checks.differentiable(p, name)
    if state:
        state_tensors(rule, p, state, name)
        state_devices(rule, p, state, name)
        storage_stays(rule, p, group, state, name)


def state_tensors(rule: type[Rule], p: Tensor, state: Stored, name: object) -> None:
    """The states that a parameter has fit it; those it lacks are not asked for."""
    for spec in (*rule.states, *STATES.values()):
        key, value = spec.name, state.get(spec.name)
        if value is None:
            continue
        state_tensor(p, value, p.shape, f"state {key!r} of {name}")
        if value.is_complex() != p.is_complex():
            raise ValueError(f"state {key!r} of {name} has dtype {value.dtype}")
        if reason := operands.illegal("exact state" if spec.exact else "state", value.dtype):
            raise ValueError(f"state {key!r} of {name} has dtype {reason}")
        if value.dtype == torch.uint8:
            if p.dtype in checks.WIDE or p.is_complex():
                raise ValueError(f"state {key!r} of {name} has 8 bits, which is not for parameters of {p.dtype}")
            if state.get(storage.scale_of(key)) is None:
                raise ValueError(f"state {key!r} of {name} has 8 bits without {storage.scale_of(key)!r}")
            own_tensor(p, state, storage.scale_of(key), codecs.scales_shape(p.shape), torch.float32, name)
    own_tensor(p, state, storage.LOW, p.shape, torch.bfloat16, name)
    own_tensor(p, state, storage.WHOLE, p.shape, torch.float32, name)
    for key in {STEP, *rule.scalars} & set(state):
        value = state[key]
        if isinstance(value, Tensor) and (short := memory.shortage(value)):
            raise ValueError(f"state {key!r} of {name} is without its memory: {short}")
        if not _is_float_elsewhere(value):
            checks.number(value, f"state {key!r} of {name}", "")


def own_tensor(p: Tensor, state: Stored, key: str, shape: Sequence[int], dtype: torch.dtype, name: object) -> None:
    """A state that is not the rule's, if there is one, is what a codec has there."""
    value, what = state.get(key), f"state {key!r} of {name}"
    if value is None:
        return
    state_tensor(p, value, shape, what)
    if value.dtype != dtype:
        raise ValueError(f"{what} has dtype {value.dtype}; it must be {dtype}")
    here = memory.local(value)
    if dtype == torch.float32 and key not in (storage.LOW, storage.WHOLE) and not here.is_contiguous():
        raise ValueError(f"{what} is not contiguous (strides {here.stride()})")


def state_tensor(p: Tensor, value: object, shape: Sequence[int], what: str) -> None:
    """A state is a tensor of a shape, spread as its parameter is, and with all of its memory."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is {type(value).__name__}, not a tensor")
    if value.shape != torch.Size(shape):
        raise ValueError(f"{what} has shape {tuple(value.shape)}")
    if memory.is_dtensor(value) or memory.is_dtensor(p):
        checks.placement(p, value, what, ValueError, is_like=value.shape == p.shape)
        value = memory.local(value)
    if short := memory.shortage(value):
        raise ValueError(f"{what} is without its memory: {short}")
    if memory.misaligned(value):
        raise ValueError(f"{what} is at an address that is not a multiple of its elements' size")
    if value.layout != torch.strided or memory.overlaps(value):
        raise ValueError(f"{what} is not a tensor with memory of its own for each element")


def storage_stays(rule: type[Rule], p: Tensor, group: Group, state: Stored, name: object) -> None:
    """What a parameter's states are stored as is what its group asks for."""
    convert = f"fusedopt.convert_state(optimizer, {STATE_DTYPE}=..., {MASTER}=...) converts it"
    for spec in rule.active_states(group):
        value = state.get(spec.name)
        if value is None:
            continue
        wanted, asked = storage.codec_of(spec, p, group).dtypes[0], group.get(STATE_DTYPE)
        found = operands.PARTS.get(value.dtype, value.dtype)
        if found != wanted and (asked is not None or found == torch.uint8):
            raise ValueError(
                f"state {spec.name!r} of {name} is stored as {value.dtype}; with {STATE_DTYPE}={asked!r} in its group "
                f"it would be {wanted}; {convert}"
            )
    for key in {storage.LOW, storage.WHOLE} - {storage.master_state(group)}:
        if state.get(key) is not None:
            raise ValueError(
                f"{name} has a master in its state {key!r}, and {MASTER} of its group is {group.get(MASTER)!r}; "
                f"{convert}"
            )


def _is_float_elsewhere(value: object) -> bool:
    """Whether a value is a number for which a device would have to be waited for."""
    return isinstance(value, Tensor) and value.device.type != "cpu" and value.numel() == 1 and value.is_floating_point()


def state_devices(rule: type[Rule], p: Tensor, state: Stored, name: object) -> None:
    """A parameter's states are where it is."""
    for key in storage.names_of(rule) & set(state):
        if state[key] is not None and state[key].device != p.device:
            raise RuntimeError(f"state {key!r} of {name} is on {state[key].device}, the parameter on {p.device}")


def whole_state(rule: type[Rule], state: Stored, group: Group, name: object) -> None:
    """A loaded state is empty, or has all that its group's options ask for."""
    needed = {s.name for s in rule.active_states(group)}
    required = needed | rule.scalars.keys()
    present = {key for key, value in state.items() if value is not None}
    if present and needed and required - present:
        raise ValueError(f"the state of {name} lacks {', '.join(sorted(required - present))}")
