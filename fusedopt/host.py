"""What reads an optimizer before every step: the host extension, or where it is not built, Python."""

from __future__ import annotations

import json
import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedopt import checks
from fusedopt.rule import LR, WEIGHT_DECAY, Rule
from fusedopt.scan import Scan

REPORT = Path(__file__).parent / "_build_report.json"


@cache
def load() -> Any:
    """The host extension, which has learned how to read torch's tensors.

    Raises:
        ImportError: With the real reason.
    """
    try:
        host = import_module("fusedopt._host")
    except ImportError as error:
        raise ImportError(build_failure("cpu") or str(error)) from error
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        raise ImportError(f"torch {torch.__version__} has no DLPack C exchange API; 2.10 or newer has")
    host.bind_torch(torch.Tensor, torch.nn.Parameter, capsule, torch._C.TensorBase.grad)
    host.learn_anatomy(_specimens())
    return host


def build_failure(part: str) -> str | None:
    """Why the installation left an extension out."""
    if not REPORT.exists():
        return "the extension was not built"
    reason = json.loads(REPORT.read_text()).get(part)
    return f"it was not built: {reason}" if reason else None


def _specimens() -> list[tuple[Any, ...]]:
    """Tensors of distinctive geometry and every dtype, and what torch says of them; see csrc/host/anatomy.h."""
    tensors: list[Tensor] = [torch.frombuffer(bytearray(40_000), dtype=t) for t in checks.FLOATING]
    tensors = [t.as_strided((2, 3, 5), (307, 67, 11), 37 + i) for i, t in enumerate(tensors)]
    tensors += [
        torch.nn.Parameter(torch.empty(9_000, dtype=t, device="cpu").as_strided((7, 2), (131, 17), 53))
        for t in checks.FLOATING
    ]
    tensors += [torch.empty(9_000, device="cpu").as_strided((3, 2, 2, 5), (211, 101, 29, 3), 71).requires_grad_()]
    facts = []
    for t in tensors:
        storage = t.untyped_storage()
        handles = (t._cdata, storage._cdata, storage.data_ptr())
        keys = torch._C._dispatch_keys(t).raw_repr()
        tag = checks.FLOATING.index(t.dtype)
        facts.append((t, *handles, t.storage_offset(), keys, tag, list(t.shape), list(t.stride())))
    return facts


def group_spec(rule: type[Rule], group: Any, kernel: Any, hyper: list[str]) -> tuple[Any, ...]:
    """What a scan must know of a param group: its kernel, and where the kernel's hyperparameters are."""
    by_name = {h.name: h for h in rule.hyper}
    hypers = (LR, WEIGHT_DECAY, *(by_name[name] for name in hyper))
    keys = [(h.key, h.index, *checks.step_domain(h)) for h in hypers]
    switches = [(key, bool(group[key])) for key in rule.switches()]
    return kernel, keys, switches, rule.decoupled


def device_scan(
    optimizer: Any, hyper: tuple[str, ...], members: list[Tensor], fresh: list[Tensor], device: torch.device
) -> Any:
    """A scan for an engine that keeps counters on a device and looks rows up in tables there.

    Args:
        optimizer: Whose parameters.
        hyper: Names of the rule's hyperparameters, in the order of the engine.
        members: The parameters that the engine steps, all on the device.
        fresh: Those whose states were made for the coming step.
        device: Where they are.
    """
    rule, groups = optimizer.rule, optimizer.param_groups
    mine, new = {id(p) for p in members}, {id(p) for p in fresh}
    names = [([s.name for s in rule.active_states(group)], list(rule.scalars), list(hyper)) for group in groups]
    try:
        if os.environ.get("FUSEDOPT_HOST") == "python":
            raise ImportError
        host = load()
    except ImportError:
        specs = [group_spec(rule, g, n, n[2]) for g, n in zip(groups, names, strict=True)]
        return Scan(groups, specs, optimizer.state, mine, new, device)
    specs = [group_spec(rule, g, host.describe(rule.name, *n), n[2]) for g, n in zip(groups, names, strict=True)]
    return host.Plan(groups, specs, optimizer.state, mine, new)
