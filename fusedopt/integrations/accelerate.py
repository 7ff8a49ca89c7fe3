"""Accelerate: ``accelerator.clip_grad_norm_`` without a pass over the gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fusedopt.integrations import unwrapped
from fusedopt.optimizer import FusedOptimizer

# Their gradients are not what the optimizer's parameters have.
_ELSEWHERE = ("DEEPSPEED", "MEGATRON_LM", "XLA")


def fuse_clipping(accelerator: Any) -> None:
    """Have an Accelerator's ``clip_grad_norm_`` leave clipping to the step of the optimizer whose parameters it gets.

    It returns the optimizer's ``grad_norm``, which the next step fills: read it after ``step()``. A ``max_norm`` of 0
    stands for no clipping. With a GradScaler it also sets ``handles_amp=False``, so that the accelerator knows of the
    steps that it skips, and schedulers with it; their norm is NaN.

    Where the parameters are not those of one fused optimizer, where they are clipped by another norm than the L2 norm,
    and where DeepSpeed, Megatron-LM, XLA or FSDP1 (without the optimizer's ``process_group``) have the gradients, the
    accelerator clips as before.

    Args:
        accelerator: Of accelerate. Its optimizers may be prepared before or after.
    """
    clip = accelerator.clip_grad_norm_

    def clip_grad_norm_(parameters: Iterable[Tensor] | Tensor, max_norm: float, norm_type: float = 2) -> Tensor | None:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        optimizer = _owner(accelerator, parameters) if float(norm_type) == 2 else None
        if optimizer is None:
            return clip(parameters, max_norm, norm_type)
        norm = optimizer.clip_next_step(max_norm or math.inf)
        if accelerator.scaler is not None:
            optimizer.handles_amp = False
            norm.fill_(math.nan)
        return norm

    accelerator.clip_grad_norm_ = clip_grad_norm_


def _owner(accelerator: Any, parameters: list[Tensor]) -> FusedOptimizer | None:
    """The optimizer that steps all these, and no others, and knows their norm."""
    kind = accelerator.distributed_type.value
    clipped = {id(p) for p in parameters if p.grad is not None}
    for optimizer in map(unwrapped, accelerator._optimizers):
        if optimizer is None or kind in _ELSEWHERE:
            continue
        if kind == "FSDP" and not accelerator.is_fsdp2 and optimizer.process_group is None:
            continue
        if clipped == {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}:
            return optimizer
    return None
