"""Does a peer compute the same update? Nobody is to race a wrong step."""

from __future__ import annotations

from dataclasses import replace

import torch

from fusedopt.bench.peers import Peer
from fusedopt.bench.suites import Suite
from fusedopt.bench.workload import DTYPES, Tensors, Workload, ours, step_of

SHAPES = ((300,), (33, 7), (4, 3, 5, 5), (1001,))
STEPS = 8  # RAdam's rectification starts in the sixth
LR = 0.05  # of a size at which bf16 parameters move
WEIGHT_DECAY = 0.5  # of which bf16 parameters lose a fifth in those steps
CLIP = 50.0  # somewhat less than the norm; fp16's second moments don't stand much
TINY = 3e-8  # near eps, so that where it is added shows; fp16 has no such numbers
# Measured: 99% of the elements of those that are right differ by up to 8.5 eps in half precision, and 56 in fp32.
ROUNDINGS, LEAST = 12, 1e-4
OUTLIERS = (
    0.02  # of each tensor; Lion's sign may turn where the momentum is rounding noise; second moments in fp16 may be 0
)


def same_update(peer: Peer, workload: Workload) -> bool:
    """Whether a peer's parameters after some steps are ours but for rounding.

    Two groups, weight decay, and gradients of which a quarter are as small as ``eps``; with the dtype, clipping and
    AMP of the workload, and in half precision, which hides small mistakes, in fp32 as well. Ours is the eager engine,
    which the equivalence gate holds to torch's and the authors' code.

    Args:
        peer: Who is checked. Whatever its package raises passes through.
        workload: What it is to be raced on.
    """
    exact = "fp64" if workload.dtype == "fp64" else "fp32"
    return all(_same(peer, replace(workload, dtype=dtype)) for dtype in dict.fromkeys((exact, workload.dtype)))


def _same(peer: Peer, workload: Workload) -> bool:
    small = replace(
        workload,
        suite=Suite("check", (SHAPES[:2], SHAPES[2:])),
        clip=workload.clip and CLIP,
        case=replace(workload.case, lr=LR * (0.1 if workload.case.name == "Lion" else 1), weight_decay=WEIGHT_DECAY),
    )
    results = []
    for build in (lambda groups: ours(small, groups, "eager"), peer.build):
        tensors = Tensors(small)
        optimizer = build(tensors.groups())
        step = step_of(optimizer, tensors.params, small)
        start = [p.detach().clone() for p in tensors.params]
        gradients = torch.Generator(small.device).manual_seed(1)
        for _ in range(STEPS):
            for p in tensors.params:
                p.grad = torch.randn(p.shape, generator=gradients, device=p.device, dtype=p.dtype)
                if p.dtype != torch.float16:
                    p.grad.view(-1)[::4] *= TINY
            step()
        results.append(tensors.params)
    eps = torch.finfo(DTYPES[workload.dtype]).eps
    for before, expected, got in zip(start, *results, strict=True):
        update = (expected - before).double().abs()
        allowed = max(LEAST, ROUNDINGS * eps) * update + ROUNDINGS * eps * before.double().abs()
        wrong = ~((got - expected).double().abs() <= allowed)  # NaN is wrong
        if wrong.sum() > OUTLIERS * wrong.numel():
            return False
    return True
