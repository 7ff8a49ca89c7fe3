"""One file per rule. Each has names, as its eager rule has them, and two functions on values.

``name, states, scalars, hyper, coefficients``: ``states`` are all that the rule may have, in order.
``prepare(h, s, new_state) -> c, s``: hyperparameters and scalars, as doubles in the order of their names, to the
coefficients of a step, in the order of theirs, and the scalars after it. ``step``, if there, is first and already
counts this step; ``new_state`` is true when the state was created for it. Values may be scalars or blocks.
``step_scale = "one"``: if there, the engine does ``p -= d``, not ``p -= lr * d``.
``direction(p, g, state, c, STATES) -> d, state``: elementwise, of the compute type; ``state`` holds the
states that the parameter has, and STATES (constexpr) their names, joined by commas.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


@cache
def by_name() -> dict[str, ModuleType]:
    """The rules' modules, by the name of their rule."""
    modules = [import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)]
    return {m.name: m for m in modules}
