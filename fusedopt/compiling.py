"""What torch.compile leaves alone."""

from __future__ import annotations

import torch

_left: set[tuple[type, str]] = set()


def leave_alone(cls: type, method: str) -> None:
    """Have a method run as it is, with whatever it calls, where a compiled function calls it.

    Dynamo's import takes seconds, so this is for when torch has it anyway: torch's optimizers do when they are made.
    """
    if (cls, method) not in _left:
        setattr(cls, method, torch.compiler.disable(getattr(cls, method)))
        _left.add((cls, method))
