"""DeepSpeed: CPUAdam and its like for CPUs, the multi-tensor FusedAdam and FusedLion for GPUs.

Its extensions are compiled when they are first used.
"""

from __future__ import annotations

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Peer, from_module

CPU = {
    "Adam": ("adam", "DeepSpeedCPUAdam", {"adamw_mode": False}),
    "AdamW": ("adam", "DeepSpeedCPUAdam", {"adamw_mode": True}),
    "Lion": ("lion", "DeepSpeedCPULion", {}),
    "Adagrad": ("adagrad", "DeepSpeedCPUAdagrad", {}),
}
GPU = {
    "Adam": ("adam", "FusedAdam", {"adam_w_mode": False}),
    "AdamW": ("adam", "FusedAdam", {"adam_w_mode": True}),
    "Lion": ("lion", "FusedLion", {}),
}


def peers(case: Case, device: str) -> list[Peer]:
    """What DeepSpeed has for an optimizer."""
    known = (CPU if device == "cpu" else GPU).get(case.name)
    if known is None:
        return []
    module, name, more = known
    options = {key: value for key, value in case.options.items() if key != "lr_decay"} | more
    make = from_module(f"deepspeed.ops.{module}", name)
    if device == "cpu":
        return [Peer("deepspeed-cpu", "deepspeed", make, options, calls=1)]
    return [Peer("deepspeed-fused", "deepspeed", make, options)]
