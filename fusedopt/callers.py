"""Who has called this package."""

from __future__ import annotations

import inspect

OWN = ("fusedopt", "torch")


def stack_level() -> int:
    """What ``warnings.warn``, called where this is, takes as ``stacklevel`` to point at the user's own program."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in OWN:
        level, frame = level + 1, frame.f_back
    return level
