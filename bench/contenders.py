"""Who takes part in a race, and what hears of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from fusedopt.bench.peers import Groups, Peer
from fusedopt.bench.stored import Stored
from fusedopt.bench.workload import Step, Tensors

FAILURES = (Exception, SystemExit)  # whatever a package raises; one ends the process when it finds no triton


class Course(Protocol):
    """What races belong to.

    Attributes:
        repeats: Timed rounds.
        report: Told what is being done.
    """

    repeats: int
    report: Callable[[str], object]

    def note(self, text: str) -> None:
        """Keep a line about what was left out, once."""
        ...


@dataclass(frozen=True)
class Contender:
    """Somebody whose step is timed.

    Attributes:
        variant: The name in reports.
        version: Of the package.
        build: Makes the optimizer of param groups.
        peer: Who it is; None for ours.
        option: What selects it on the command line.
        stored: How ours stores less than its rule has; None if in full.
    """

    variant: str
    version: str
    build: Callable[[Groups], torch.optim.Optimizer]
    peer: Peer | None
    option: tuple[str, ...]
    stored: Stored | None = None


@dataclass(frozen=True)
class Running:
    """A contender's optimizer on tensors of a workload.

    Attributes:
        contender: Who.
        tensors: Which.
        optimizer: Its optimizer, which has states.
        step: What its users call for a step.
    """

    contender: Contender
    tensors: Tensors
    optimizer: torch.optim.Optimizer
    step: Step


def summary(error: BaseException) -> str:
    """The first line of an error, and its kind."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:120]}"
