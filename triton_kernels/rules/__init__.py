"""One file per rule. Each has names, as its eager rule has them, and two functions on values or more.

``name, states, scalars, hyper, coefficients``: ``states`` are all that the rule may have, in order.
``prepare(h, s, new_state) -> c, s``: hyperparameters and scalars, as doubles in the order of their names, to the
coefficients of a step, in the order of theirs, and the scalars after it. ``step``, if there, is first and already
counts this step; ``new_state`` is true when the state was created for it. Values may be scalars or blocks.
``step_scale = "one"``: if there, the engine does ``p -= d``, not ``p -= lr * d``.
``replaces``: if there, the state with which the engine does ``p = d``, and never reads p.
``direction(p, g, state, c, STATES) -> d, state``: elementwise, of the compute type; ``state`` holds the
states that the parameter has, and STATES (constexpr) their names, joined by commas.

Rules that add up have more, see fusedopt/rule.py for what over and when; of sums there are none where names are absent.

``measures``: names of the sums before the step.
``measure(p, g, state, c, STATES) -> values``: as ``direction``; a tuple in the order of ``measures``.
``score(c, m) -> value``: if there: of segments, by coefficients and sums in double.
``finish(c, s, m, whole, largest) -> c, s``: coefficients and scalars as ``prepare`` made them, in double, to those of
the step; ``m`` and ``whole`` are sums over the segment and the scope, in the order of ``measures``.
``epilogue``: names of the sums of what is there after the step, which are scalars.
``conclude(p, g, d, state, c, STATES) -> values``: elementwise, a tuple in the order of ``epilogue``.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType


def lists(module: ModuleType, name: str) -> tuple[str, ...]:
    """The names of a rule's measures or of its epilogue."""
    return getattr(module, name, ())


@cache
def by_name() -> dict[str, ModuleType]:
    """The rules' modules, by the name of their rule."""
    modules = [import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)]
    return {m.name: m for m in modules}
