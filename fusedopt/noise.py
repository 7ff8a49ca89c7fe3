"""Random numbers that do not depend on who draws them: Philox, and where in it a step's words are.

The generator is Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011). Its counter is (element // 4, in two words,
the lower one first; tensor; step), and the word of an element is number ``element % 4`` of the four that come of it.
The key is (seed, stream). Tensors are counted through all of an optimizer's groups, steps are a parameter's own, from
0, and an element's number is its logical index in the whole tensor, of which ranks may have parts; complex numbers are
two. Where ranks have parts that nobody sees, 256 times the rank is added to the stream.

csrc/core/philox.h and triton_kernels/noise.py have the same words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fusedopt import memory
from fusedopt.aliases import Group
from fusedopt.context import Context

# Streams: of gradient noise, of what rounds the parameter, and of what rounds the first of the states that
# the group has, before those of the others.
GRADIENT, PARAM, STATES = 0, 1, 2
PREDICTED, RESCALED = 64, 128  # added to those that round, where a prediction or a rescaling does it, not a step
STREAMS = 256  # of a rank
ROUNDING_SEED = 0

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10

Words = tuple[Tensor, ...]  # int64, each from 0 to 2**32 - 1


def philox(counter: Iterable[Tensor], key: tuple[int, int]) -> Words:
    """Four random words for each counter of four words."""
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        (high, low), (other_high, other_low) = _product(a, _MULTIPLIERS[0]), _product(c, _MULTIPLIERS[1])
        a, b, c, d = other_high ^ b ^ k, other_low, high ^ d ^ m, low
        k, m = (k + _WEYL[0]) & _MASK, (m + _WEYL[1]) & _MASK
    return a, b, c, d


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Both words of a product of words; int64 does not hold it."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def words(elements: Tensor, tensor: int, step: int, key: tuple[int, int]) -> Words:
    """All four words of the groups of four in which elements are; see the module's text.

    Args:
        elements: int64, any shape.
        tensor: The tensor's number.
        step: The step's.
        key: Seed and stream.
    """
    group = elements >> 2
    fixed = (torch.full_like(group, number) for number in (tensor & _MASK, step & _MASK))
    return philox((group & _MASK, group >> 32, *fixed), (key[0] & _MASK, key[1] & _MASK))


def word(elements: Tensor, tensor: int, step: int, key: tuple[int, int]) -> Tensor:
    """Each element's own word; see ``words``."""
    a, b, c, d = words(elements, tensor, step, key)
    is_upper, is_odd = (elements & 2) != 0, (elements & 1) != 0
    return torch.where(is_upper, torch.where(is_odd, d, c), torch.where(is_odd, b, a))


def normal(elements: Tensor, tensor: int, step: int, key: tuple[int, int]) -> Tensor:
    """Standard normal numbers, float64: two of each two words, by the method of Box and Muller (1958).

    Of words a and b, of which the upper 24 bits are used, ``u = (a + 1) / 2**24`` and ``v = b / 2**24``, the numbers of
    an even element and the odd one after it are ``sqrt(-2 ln u)`` times ``cos 2 pi v`` and ``sin 2 pi v``.
    """
    a, b, c, d = words(elements, tensor, step, key)
    is_upper, is_odd = (elements & 2) != 0, (elements & 1) != 0
    u = ((torch.where(is_upper, c, a) >> 8) + 1).double() / 2**24
    angle = (torch.where(is_upper, d, b) >> 8).double() * (2 * math.pi / 2**24)
    return (-2 * u.log()).sqrt() * torch.where(is_odd, angle.sin(), angle.cos())


def whole_strides(p: Tensor) -> tuple[int, list[int]]:
    """What the logical index in the whole tensor is of a parameter's elements that are here.

    Returns:
        That of the first, and how much it grows along each dimension; complex numbers count once.
    """
    strides = [math.prod(p.shape[d + 1 :]) for d in range(p.dim())]
    return sum(offset * stride for offset, stride in zip(_offsets(p), strides, strict=True)), strides


def _offsets(p: Tensor) -> tuple[int, ...]:
    """Where the part of a parameter that is here begins in the whole."""
    if not memory.is_dtensor(p):
        return (0,) * p.dim()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return tuple(int(offset) for offset in offsets) or (0,) * p.dim()


def elements(p: Tensor) -> Tensor:
    """The logical index in the whole tensor of each element that is here, of complex numbers of each part.

    Returns:
        int64, of the shape of the part that is here, or of ``torch.view_as_real`` of it.
    """
    first, strides = whole_strides(p)
    shape = memory.local(p).shape
    device = "cpu" if p.device.type == "mps" else p.device  # which has no float64, in which numbers are drawn
    index = torch.full(shape, first, dtype=torch.int64, device=device)
    for d, stride in enumerate(strides):
        along = torch.arange(shape[d], device=device) * stride
        index += along.reshape([-1 if k == d else 1 for k in range(len(shape))])
    return torch.stack((2 * index, 2 * index + 1), -1) if p.is_complex() else index


def place(context: Context, i: int, p: Tensor) -> tuple[int, int, int, list[int]]:
    """By what an optimizer's i-th parameter draws its gradients' noise, besides the seed and the step.

    Returns:
        The tensor's number, the stream, the logical index in the whole tensor of its first element that is here, of
        complex numbers their parts', and how much that of numbers grows along each dimension.
    """
    first, strides = whole_strides(p)
    stream = GRADIENT + salt(p, context.process_group)
    return context.number_of(i), stream, first * (2 if p.is_complex() else 1), strides


def rounding(context: Context, i: int, p: Tensor, group: Group, name: str, step: int, added: int = 0) -> Tensor:
    """The words that round an operand of an optimizer's i-th parameter.

    Args:
        context: Of the optimizer.
        i: The parameter's number.
        p: The parameter.
        group: Its group.
        name: "param", or that of a state.
        step: The step's.
        added: To the stream.
    """
    own = [spec.name for spec in context.rule.active_states(group)]
    stream = PARAM if name == "param" else STATES + own.index(name)
    key = ROUNDING_SEED, stream + added + salt(p, context.process_group)
    return word(elements(p), context.number_of(i), step, key).to(p.device)


def salt(p: Tensor, process_group: object) -> int:
    """What tells a rank's part of a parameter from others', where the parameter does not: to be added to the stream."""
    if process_group is None or memory.is_dtensor(p):
        return 0
    return STREAMS * torch.distributed.get_rank(process_group)  # type: ignore[arg-type]
