"""What can be known of tensors' memory: where it is, whether it is all there, whose it is too. Nothing here raises."""

# DTensors and functorch have no public names for what is asked of them.
# pyright: reportPrivateUsage=false

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.parameter import is_lazy

from fusedopt.aliases import Group, Stored

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What a class has for __torch_dispatch__ if operations on it are torch's own.
NO_DISPATCH = getattr(Tensor, "__torch_dispatch__", None)
# How hard to think about whether interleaved tensors share an element; beyond it they are taken to.
_MOST_WORK = 10_000


def dtensor_type() -> type | None:
    """The class DTensor, if anybody has imported it, without which there is none."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


def is_dtensor(t: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, of which this rank has a part."""
    kind = dtensor_type()
    return kind is not None and isinstance(t, kind)


def local(t: Tensor) -> Tensor:
    """What a tensor is on this rank: of a DTensor the part that is here, else the tensor itself."""
    return t._local_tensor if is_dtensor(t) else t


def has_own_operations(t: Tensor) -> bool:
    """Whether it is a subclass with operations of its own, so that its memory need not hold what it is."""
    return getattr(type(t), "__torch_dispatch__", None) is not NO_DISPATCH


def unreadable(t: Tensor, *, lazily: bool = False) -> str | None:
    """Why what lies at a tensor's address is not what the tensor is; None if it is.

    Args:
        t: The tensor.
        lazily: Whether it may be lazily conjugated or negated.
    """
    if is_lazy(t):
        return "it is not initialized yet"
    if has_own_operations(t):
        return f"{type(t).__name__} is a tensor subclass with operations of its own"
    if t.layout != torch.strided:
        return f"its layout is {t.layout}"
    if t.is_nested:
        return "it is a nested tensor"
    if is_functorch_wrapped_tensor(t):
        return "it is inside of a transformation of torch.func"
    if t._is_zerotensor():
        return "it is a tensor of zeros without memory"
    if not lazily and (t.is_conj() or t.is_neg()):
        return f"it is lazily {'conjugated' if t.is_conj() else 'negated'}"
    return None


def reach(t: Tensor) -> int:
    """Over how many elements of its storage a strided tensor reaches, from its first on."""
    if not t.numel():
        return 0
    if t.is_contiguous():
        return t.numel()
    return 1 + sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True))


def shortage(t: Tensor) -> str | None:
    """What is wrong with the memory of a tensor whose storage was resized or given back; None if nothing.

    Tensors whose memory is not read by its address have none to miss.
    """
    if is_lazy(t) or t.device.type == "meta" or has_own_operations(t):
        return None
    if t.layout != torch.strided or t.is_nested:
        return None
    if is_functorch_wrapped_tensor(t) or t._is_zerotensor() or not t.numel():
        return None
    needed, has = (t.storage_offset() + reach(t)) * t.element_size(), t.untyped_storage().nbytes()
    if has >= needed and t.data_ptr():
        return None
    return f"its storage has {has if t.data_ptr() else 0} bytes, and it needs {needed}"


def misaligned(t: Tensor) -> bool:
    """Whether elements (of complex tensors their parts) do not lie at multiples of their size, as kernels expect."""
    return not unreadable(t) and t.data_ptr() % (t.element_size() // (2 if t.is_complex() else 1)) != 0


def overlaps(t: Tensor) -> bool:
    """Whether elements may share memory, so that they cannot be stepped in place."""
    reached = 1
    dims = sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1)
    for stride, size in dims:
        if stride < reached and t.numel():
            return True
        reached = stride * (size - 1) + reached
    return False


def has_gaps(t: Tensor) -> bool:
    """Whether a tensor without overlaps leaves memory between its elements."""
    return reach(t) != t.numel()


def begins_with_slices(t: Tensor) -> bool:
    """Whether the slices of dimension 0 of a tensor without gaps lie one after another."""
    return t.dim() < 2 or t.shape[0] < 2 or t.stride(0) == t.numel() // t.shape[0]


def significant(t: Tensor) -> tuple[int, ...]:
    """The strides that matter: those of dimensions with more than one element, in a tensor with any."""
    return tuple(stride if size > 1 and t.numel() else 0 for stride, size in zip(t.stride(), t.shape, strict=True))


def resolved(g: Tensor) -> Tensor:
    """g, or what it stands for when it is lazily conjugated or negated."""
    return g.resolve_conj().resolve_neg()


def comparable(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those with memory of which the address is known."""
    return [t for t in tensors if t.device.type != "meta" and not unreadable(t, lazily=True)]


def written(param_groups: Iterable[Group], state: Mapping[Tensor, object]) -> list[Tensor]:
    """All that an optimizer's step writes here and that has an address.

    States that a differentiable step puts in place of others are left out.
    """
    tensors: list[Tensor] = []
    for group in param_groups:
        for p in group["params"]:
            own: object = None if group.get("differentiable") else state.get(p)
            values = cast("Stored", own).values() if isinstance(own, Mapping) else ()
            tensors += [p, *(value for value in values if isinstance(value, Tensor))]
    return comparable(map(local, tensors))


def span(t: Tensor) -> tuple[int, int]:
    """The addresses from a strided tensor's first byte to after its last."""
    begin = t.data_ptr()
    return begin, begin + reach(t) * t.element_size()


def may_write_what_it_reads(g: Tensor, written: Sequence[Tensor]) -> bool:
    """Whether a step of elements in any order may write a part of its gradient before it reads it.

    It does not where the gradient is one of the tensors that are written: an element is read before it is written.
    """
    begin, end = span(g)
    for t in written:
        same = t.data_ptr() == begin and t.dtype == g.dtype and significant(t) == significant(g)
        other_begin, other_end = span(t)
        if not same and begin < other_end and other_begin < end and _share(g, t):
            return True
    return False


def waves(steps: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> list[int]:
    """When each of several steps may be done, if those of which one writes what the other uses keep their order.

    Args:
        steps: For each step the tensors that it writes, and those that it only reads. Those without readable memory are
            left out.

    Returns:
        For each step a number; none of one number writes what another uses, and of two where one does, the later has a
        higher one.
    """
    spans: list[tuple[int, int, int, bool, Tensor]] = []
    for i, (written, read) in enumerate(steps):
        spans += [(*span(t), i, writes, t) for writes, ts in ((True, written), (False, read)) for t in ts]
    spans.sort(key=lambda span: span[:3])
    earlier: dict[int, set[int]] = {}
    live: list[tuple[int, int, int, bool, Tensor]] = []
    for now in spans:
        live = [other for other in live if other[1] > now[0]] if live else live
        for other in live:
            if other[2] != now[2] and (other[3] or now[3]) and _share(other[4], now[4]):
                first, second = sorted((other[2], now[2]))
                earlier.setdefault(second, set()).add(first)
        if now[1] > now[0]:
            live.append(now)
    result = [0] * len(steps)
    for i in sorted(earlier):
        result[i] = 1 + max(result[j] for j in earlier[i])
    return result


class Spans:
    """Memory that several tensors take up, to be asked whether another tensor reaches into it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        for begin, end in sorted(span(t) for t in tensors):
            if self._ends and begin <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            elif end > begin:
                self._begins.append(begin)
                self._ends.append(end)

    def meet(self, t: Tensor) -> bool:
        """Whether a tensor may share memory with them."""
        begin, end = span(t)
        after = bisect_right(self._ends, begin)
        return after < len(self._begins) and self._begins[after] < end


class _Array:
    """What numpy must know of a tensor to say whether it shares memory; its values are never looked at."""

    def __init__(self, t: Tensor) -> None:
        size = t.element_size()
        self.__array_interface__ = {
            "version": 3,
            "typestr": f"|V{size}",
            "data": (t.data_ptr(), True),
            "shape": tuple(t.shape),
            "strides": tuple(stride * size for stride in t.stride()),
        }


def _share(a: Tensor, b: Tensor) -> bool:
    if a.device != b.device:
        return False
    try:
        a_memory, b_memory = np.asarray(_Array(a)), np.asarray(_Array(b))
        return np.shares_memory(a_memory, b_memory, max_work=_MOST_WORK)  # pyright: ignore[reportArgumentType]
    except (np.exceptions.TooHardError, ValueError):  # or more dimensions than numpy has
        return True
