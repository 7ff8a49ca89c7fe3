"""prodigyopt, by Prodigy's authors."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch

from fusedopt.bench.optimizers import Case
from fusedopt.bench.peers.peer import Groups, Peer, from_module


def _make(groups: Groups, **options: Any) -> torch.optim.Optimizer:
    with redirect_stdout(StringIO()):  # it prints which decay it takes
        return from_module("prodigyopt", "Prodigy")(groups, **options)


def peers(case: Case, device: str) -> list[Peer]:
    """Prodigy."""
    return [Peer("prodigyopt", "prodigyopt", _make, case.options)] if case.name == "Prodigy" else []
