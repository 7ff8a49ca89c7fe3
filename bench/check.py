"""Does a peer compute the same update? Nobody is to race a wrong step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fusedopt.bench.peers import Peer
from fusedopt.bench.suites import Suite
from fusedopt.bench.workload import DTYPES, Tensors, Workload, ours, step_of

SHAPES = ((300,), (33, 7), (4, 3, 5, 5), (1001,))
# More than one chunk of a multi-tensor kernel, and enough for low-bit states, which small tensors do not get; more
# tensors than one launch of such a kernel takes. Not for what is compiled for each of them.
MORE_SHAPES = ((70_001,), *((5,),) * 120, (8192,))
STEPS = 8  # RAdam's rectification starts in the sixth
LR = 0.05  # of a size at which bf16 parameters move
WEIGHT_DECAY = 0.5  # of which bf16 parameters lose a fifth in those steps
CLIP = 0.8  # of the norm that random gradients would have; fp16's second moments don't stand much less
TINY = 3e-8  # near eps, so that where it is added shows; fp16 has no such numbers
# Measured: 99% of the elements of those that are right differ by up to 8.5 eps in half precision, and 56 in fp32.
ROUNDINGS, LEAST = 12, 1e-4
NEAR = 0.5  # of the update's norm; measured: torchao's 8-bit states 0.01 to 0.15, 4-bit states 0.22 to 0.32
OUTLIERS = 0.02  # of each tensor: Lion's sign may turn where momentum is noise, and second moments in fp16 may be 0


def objection(peer: Peer, workload: Workload) -> str | None:
    """What is wrong with a peer's step; None if it may be raced.

    Its parameters after some steps have to be ours but for rounding: in two groups, with weight decay, and gradients of
    which a quarter are as small as ``eps``; with the dtype, clipping and AMP of the workload, and in half precision,
    which hides small mistakes, in fp32 as well. Where states are kept in few bits, they have to be near ours. Ours is
    the eager engine, which the equivalence gate holds to torch's and the authors' code. A peer whose algorithm is said
    to be another one has to move parameters to finite values.

    Args:
        peer: Who is checked. Whatever its package raises passes through.
        workload: What it is to be raced on.
    """
    exact = "fp64" if workload.dtype == "fp64" else "fp32"
    for dtype in dict.fromkeys((exact, workload.dtype)):
        before, expected, got = _stepped(peer, replace(workload, dtype=dtype))
        if all(torch.equal(p, q) for p, q in zip(before, got, strict=True)):
            return f"it leaves {dtype} parameters as they were"
        if any(_too_many(~torch.isfinite(p)) for p in got):
            return f"it makes {dtype} parameters infinite or NaN"
        if peer.storage != "full":
            if (distance := _distance(before, expected, got)) > NEAR:
                return f"its update is {distance:.0%} away from ours"
        elif peer.differs is None and not _same(before, expected, got, torch.finfo(DTYPES[dtype]).eps):
            return f"it does not compute the same update in {dtype}"
    return None


def _stepped(peer: Peer, workload: Workload) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters before some steps, after ours, and after a peer's."""
    case, shapes = workload.case, SHAPES + MORE_SHAPES
    if peer.most_dims is not None:
        shapes = tuple(shape for shape in shapes if len(shape) <= peer.most_dims)
    if peer.compiles:
        shapes = SHAPES if peer.storage == "full" else MORE_SHAPES[-1:] * 2
    half = (len(shapes) + 1) // 2
    suite = Suite("check", (shapes[:half], shapes[half:]))
    small = replace(
        workload,
        suite=suite,
        clip=workload.clip and CLIP * math.sqrt(suite.numel),
        case=replace(case, lr=LR * (0.1 if case.name == "Lion" else 1), weight_decay=WEIGHT_DECAY),
    )
    start, expected = _of_ours(small)
    return start, expected, _after(peer.build, small)[1]


@lru_cache(maxsize=4)  # the same for every peer
def _of_ours(workload: Workload) -> tuple[list[Tensor], list[Tensor]]:
    return _after(lambda groups: ours(workload, groups, "eager"), workload)


def _after(build: Callable[[list[dict[str, Any]]], Any], workload: Workload) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters before and after an optimizer's steps."""
    tensors = Tensors(workload)
    optimizer = build(tensors.groups())
    step = step_of(optimizer, tensors.params, workload)
    start = [p.detach().clone() for p in tensors.params]
    gradients = torch.Generator(workload.device).manual_seed(1)
    for _ in range(STEPS):
        for p in tensors.params:
            p.grad = torch.randn(p.shape, generator=gradients, device=p.device, dtype=p.dtype)
            if p.dtype != torch.float16:
                p.grad.view(-1)[::4] *= TINY
        step()
    return start, [p.detach() for p in tensors.params]


def _same(before: list[Tensor], expected: list[Tensor], got: list[Tensor], eps: float) -> bool:
    """Whether results are the same but for rounding, in all but a few elements of each tensor."""
    for p, q, r in zip(before, expected, got, strict=True):
        update = (q - p).double().abs()
        allowed = max(LEAST, ROUNDINGS * eps) * update + ROUNDINGS * eps * p.double().abs()
        if _too_many(~((r - q).double().abs() <= allowed)):  # NaN is wrong
            return False
    return True


def _too_many(wrong: Tensor) -> bool:
    return int(wrong.sum()) > max(1, OUTLIERS * wrong.numel())


def _distance(before: list[Tensor], expected: list[Tensor], got: list[Tensor]) -> float:
    """How far updates are apart: the norm of their difference over that of ours."""

    def moved(after: list[Tensor]) -> Tensor:
        return torch.cat([(q - p).double().flatten() for p, q in zip(before, after, strict=True)])

    return float((moved(got) - moved(expected)).norm() / moved(expected).norm())
