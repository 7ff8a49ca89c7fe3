"""How a group stores its parameters and states: what it may ask for, and what comes of it.

``state_dtype`` is for the rule's states, ``master`` for what bfloat16 and float16 parameters cannot hold of the values
that they are stepped as. Both are keys of groups, like the options of fusedopt/options.py.

=================  ====================================================  ==============================================
parameters         ``state_dtype``                                       ``master``
=================  ====================================================  ==============================================
float32            None (float32), torch.bfloat16, "8bit"                None
bfloat16           None (float32), torch.bfloat16, "8bit"                None, "fp32", "split", "stochastic"
float16            None (float32), torch.bfloat16, "8bit"                None, "fp32"
complex64          None, torch.bfloat16, "8bit": all are complex64       None
others             None (the parameter's)                                None
=================  ====================================================  ==============================================

States that a rule calls exact, and averages, are never narrower than float32. "8bit" is for tensors of at least 4096
elements whose slices of dimension 0 have at least 64, unless they have but one dimension; and of DTensors for those
whose blocks of 256 elements no shard cuts. The others' states are float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fusedopt import codecs, memory, options
from fusedopt.aliases import Group, Stored
from fusedopt.operands import (
    AVERAGES,
    BF16,
    BLOCK,
    MASTER_BF16,
    MASTER_FP16,
    PARTS,
    Q8_SIGNED,
    Q8_UNSIGNED,
    SPLIT,
    STOCHASTIC,
    Codec,
    Operand,
    plain,
)
from fusedopt.options import EIGHT_BIT, MASTER, STATE_DTYPE
from fusedopt.rule import Rule, State

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Shard

LOW, WHOLE = "param_low", "master"  # states that have what a parameter cannot hold
MASTER_STATES = {"split": LOW, "fp32": WHOLE}

SMALLEST = 4096  # elements of a tensor whose states are worth 8 bits
SHORTEST = 64  # of its slices

# By the parameter's dtype; what is not here may have neither.
_STATE_DTYPES = dict.fromkeys((torch.float32, torch.bfloat16, torch.float16, torch.complex64), options.STATE_DTYPES)
_MASTERS = {torch.bfloat16: options.MASTERS, torch.float16: (None, "fp32")}


def illegal(group: Group, dtype: torch.dtype) -> str | None:
    """What of a group's storage parameters of a dtype cannot have, and what they may; None if nothing."""
    for key, legal in ((STATE_DTYPE, _STATE_DTYPES), (MASTER, _MASTERS)):
        if group.get(key) not in legal.get(dtype, (None,)):
            may = ", ".join(map(repr, legal.get(dtype, (None,))))
            return f"{key}={group[key]!r} is not for parameters of {dtype}, for which it may be {may}"
    return None


# -------------------------------------------------------------------------------------------------------------- names


def scale_of(name: str) -> str:
    """The state that has the scales of another's codes."""
    return f"{name}_scale"


def master_state(group: Group) -> str | None:
    """The state that a group's parameters have for their masters."""
    return MASTER_STATES.get(group.get(MASTER) or "")


def own_names(rule: type[Rule]) -> set[str]:
    """Names of tensors that a parameter's state may have besides those of the rule and of averages."""
    return {LOW, WHOLE, *(scale_of(spec.name) for spec in rule.states if not spec.exact)}


def names_of(rule: type[Rule]) -> set[str]:
    """Names of all tensors that a parameter's state may have, scalars apart."""
    return {spec.name for spec in (*rule.states, *options.STATES.values())} | own_names(rule)


# -------------------------------------------------------------------------------------------------------------- rules


def fits_blocks(p: Tensor) -> bool:
    """Whether a parameter's states can have 8 bits; of a DTensor the same on all ranks."""
    _, length = codecs.slices_of(p.shape)
    if p.is_complex() or p.numel() < SMALLEST or (p.dim() > 1 and length < SHORTEST):
        return False
    return not memory.is_dtensor(p) or all(_cuts_no_block(p, d) for d in range(len(p.placements)))


def _cuts_no_block(p: DTensor, mesh_dim: int) -> bool:
    """Whether a placement leaves blocks whole, and shards of scales are the scales of shards."""
    placements = cast("tuple[Shard, ...]", p.placements)  # as far as they have a dimension
    placed = placements[mesh_dim]
    if placed.is_replicate() or (placed.dim == 0 and p.dim() > 1):
        return True
    alone = [other.dim for other in placements if not other.is_replicate()].count(placed.dim) == 1
    if placed.is_partial() or placed.dim > 1 or not alone:
        return False
    size = p.device_mesh.size(mesh_dim)
    inner = math.prod(p.shape[placed.dim + 1 :])
    shard = -(-p.shape[placed.dim] // size) * inner
    blocks = codecs.scales_shape(p.shape)[-1]
    return shard % BLOCK == 0 and -(-blocks // size) * BLOCK == shard


def param_codec(dtype: torch.dtype, group: Group) -> Codec:
    """How a parameter is stored."""
    whole = MASTER_BF16 if dtype == torch.bfloat16 else MASTER_FP16
    return {"split": SPLIT, "fp32": whole, "stochastic": STOCHASTIC}.get(group.get(MASTER) or "") or _plain(dtype)


def state_codec(spec: State, dtype: torch.dtype, group: Group, fits: bool = True) -> Codec:
    """How a state of parameters of a dtype is to be stored, whose states can have 8 bits if it ``fits``."""
    wide = _plain(torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype)
    asked = None if spec.exact or dtype.is_complex else group.get(STATE_DTYPE)
    if asked == torch.bfloat16:
        return STOCHASTIC if group.get(MASTER) == "stochastic" else BF16
    if asked == EIGHT_BIT and fits:
        return Q8_SIGNED if spec.signed else Q8_UNSIGNED
    return wide


def codec_of(spec: State, p: Tensor, group: Group) -> Codec:
    """How a parameter's state is to be stored."""
    return state_codec(spec, p.dtype, group, group.get(STATE_DTYPE) == EIGHT_BIT and fits_blocks(p))


def _plain(dtype: torch.dtype) -> Codec:
    codec = plain(dtype)
    assert codec, dtype
    return codec


def _like(p: Tensor, dtype: torch.dtype, value: float | None = None) -> Tensor:
    if value is None:
        return torch.empty_like(p, dtype=dtype, memory_format=torch.preserve_format).detach()
    fill = complex(value, value) if dtype.is_complex else value
    return torch.full_like(p, fill, dtype=dtype, memory_format=torch.preserve_format).detach()


def spread(p: Tensor, here: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of a shape that has the part ``here`` on this rank, and is spread as a parameter is."""
    if not memory.is_dtensor(p):
        return here
    from torch.distributed.tensor import DTensor

    stride = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    size = torch.Size(shape)
    return DTensor.from_local(here, p.device_mesh, p.placements, run_check=False, shape=size, stride=tuple(stride))


def new_state(spec: State, p: Tensor, group: Group, value: float | None) -> dict[str, Tensor]:
    """A parameter's state with one value everywhere; None: with the parameter's values."""
    codec, here = codec_of(spec, p, group), memory.local(p)
    if codec.block == 1:
        dtype = codec.dtypes[0]
        made = _like(p, p.dtype if PARTS.get(p.dtype) == dtype else dtype, value)
        return {spec.name: made.copy_(p.detach()) if value is None else made}
    if value is None:
        return state_of(spec, p, here.detach().to(torch.float32), codec)
    scales = torch.full(codecs.scales_shape(here.shape), value, device=here.device)
    codes = _like(p, torch.uint8, codecs.constant(value, codec))
    return {spec.name: codes, scale_of(spec.name): spread(p, scales, codecs.scales_shape(p.shape))}


def new_master(p: Tensor, group: Group) -> dict[str, Tensor]:
    """What a parameter has for its master before its first step."""
    name = master_state(group)
    if name is None:
        return {}
    if name == LOW:
        return {name: _like(p, torch.bfloat16, 0.0)}
    return {name: _like(p, torch.float32).copy_(p.detach())}


def state_of(spec: State, p: Tensor, values: Tensor, codec: Codec) -> dict[str, Tensor]:
    """A parameter's state with these values on this rank, float32, in a codec."""
    if codec.block == 1:
        return {spec.name: spread(p, values.to(codec.dtypes[0]), p.shape)}
    codes, scales = codecs.quantized(values, codec)
    return {
        spec.name: spread(p, codes, p.shape),
        scale_of(spec.name): spread(p, scales, codecs.scales_shape(p.shape)),
    }


def master_of(p: Tensor, values: Tensor, group: Group) -> dict[str, Tensor]:
    """What a parameter has that stands for these values on this rank."""
    name = master_state(group)
    if name is None:
        return {}
    master = values.to(torch.float32, copy=True)
    return {name: spread(p, codecs.split(master)[1] if name == LOW else master, p.shape)}


# ----------------------------------------------------------------------------------------------------------- operands


def param_operand(p: Tensor, group: Group, state: Stored) -> Operand:
    """A parameter as it is stored on this rank; before its first step it has no master yet."""
    here, name = memory.local(p), master_state(group)
    if name is None:
        return Operand("param", param_codec(here.dtype, group), (here,))
    if name not in state:
        return Operand("param", _plain(here.dtype), (here,))
    return Operand("param", param_codec(here.dtype, group), (here, memory.local(state[name])))


def values(p: Tensor, group: Group, state: Stored) -> Tensor:
    """What a parameter stands for on this rank: its master, if it has one, else itself."""
    operand = param_operand(p, group, state)
    return memory.local(p) if len(operand.tensors) == 1 else codecs.decode(operand, torch.float32)


def state_operand(spec: State, group: Group, state: Stored) -> Operand:
    """A state as it is stored on this rank."""
    here = memory.local(state[spec.name])
    if here.dtype == torch.uint8:
        codec = Q8_SIGNED if spec.signed else Q8_UNSIGNED
        return Operand(spec.name, codec, (here, memory.local(state[scale_of(spec.name)])))
    codec = _plain(here.dtype)
    if codec == BF16 and group.get(MASTER) == "stochastic" and spec.name not in AVERAGES:
        codec = STOCHASTIC
    return Operand(spec.name, codec, (here,))


def operands_of(rule: type[Rule], p: Tensor, g: Tensor, group: Group, state: Stored) -> list[Operand]:
    """A row's operands on this rank, in the order of their roles.

    Args:
        rule: The optimizer's.
        p: The parameter.
        g: The gradient, or what is like it, here.
        group: The parameter's.
        state: The parameter's, in which nothing is missing.
    """
    stored = [state_operand(spec, group, state) for spec in options.states_of(rule, group)]
    return [param_operand(p, group, state), Operand("grad", _plain(g.dtype), (g,)), *stored]


def tensors_of(rule: type[Rule], group: Group, state: Stored) -> list[str]:
    """The names of all state tensors that a step of a parameter uses, missing ones among them."""
    names = [spec.name for spec in options.states_of(rule, group)]
    names += [scale_of(name) for name in names if getattr(state.get(name), "dtype", None) == torch.uint8]
    return names + list(filter(None, [master_state(group)]))
