"""The kernels by their names, and what those that a rule needs are specialised to.

Arguments of all of them:

=====================================================  ==============================================================
``rows``, ``tiles``, ``shares``, ``borders``,          the tables of fusedopt/layout.py
``layouts``, ``step_table``, ``partials``,
``numbers``, ``counts``, ``row_sums``
``grad_scale``, ``found_inf``                          one float32 each: the loss scale, and what is not 0 to skip
``sums``                                               the rule's tables, see adding.py; None if it adds nothing up
``concluded``                                          what was added up of each scope, see fusedopt/sums.py
``n_rows``, ``n_shares``, ``n_borders``, ``n_scopes``  how many there are
``passes``                                             bits of Pass, for kernels that do parts of several
``DIRECTION``, ``PREPARE``, ``MEASURE``, ``SCORE``,    the rule's, see rules/; None if it has none
``FINISH``, ``CONCLUDE``, ``STEP_SCALE``
``N_STATES``                                           how many states rows have at most, averages among them
``N_SCALARS``, ``N_HYPER``                             how many the rule has
``OPTIONS``, ``SUMS``, ``SIGNATURES``                  see signatures.py
``WIDTH``                                              words of a row of ``rows``
``TILE``                                               elements of a tile, a power of two
``STAGES``                                             rounds of the loops over full tiles that are under way at once;
                                                       None to leave that to Triton
=====================================================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from fusedopt.layout import row_width
from fusedopt.operands import Signature
from fusedopt.options import STEP
from fusedopt.rule import Rule, StepScale
from fusedopt.sums import CHANNEL, TENSOR
from fusedopt.triton_kernels import norm, rules, scopes, step, sums
from fusedopt.triton_kernels.signatures import describe

KERNELS = {f.__name__: f for f in (norm.norm, sums.sums, scopes.fold, scopes.scopes, step.step, scopes.epilogue)}


def constants(
    rule: type[Rule],
    signatures: Iterable[Signature | str],
    tile: int,
    stages: int | None = None,
    scope: str = TENSOR,
    joined: bool = False,
    options: bool = False,
    has_average: bool = False,
) -> dict[str, dict[str, Any]]:
    """What a rule's kernels are specialised to, by the kernels' names.

    Args:
        rule: The optimizer's.
        signatures: Of the rows.
        tile: Elements of a tile.
        stages: Rounds of the loops over full tiles under way at once; None to leave that to Triton.
        scope: Over what sums are taken.
        options: Whether groups ask for averages, noise or cautious decay.
        has_average: Whether rows have room for the address of an average.
        joined: Whether the step finds the sums over tensors complete, as where others have changed them.
    """
    ours = rules.by_name()[rule.name]
    measures, epilogue = rules.lists(ours, "measures"), rules.lists(ours, "epilogue")
    described = ""
    if measures or epilogue:
        numbers = ([ours.scalars.index(name) for name in names] for names in (epilogue, rule.shared))
        described = describe(scope, len(measures), *numbers, joined)
    n_states, n_scalars = len(ours.states) + has_average, len(ours.scalars)
    who = "" if not options else "rule" if STEP in ours.scalars else "engine"
    width = {"SUMS": described, "WIDTH": row_width(n_states, n_scalars)}
    counts = {"N_STATES": n_states, "N_SCALARS": n_scalars, "N_HYPER": len(ours.hyper), "OPTIONS": who, **width}
    described_rows = (signature_of(ours, str(signature)) for signature in signatures)
    walk = {"SIGNATURES": ";".join(described_rows), "TILE": tile, "STAGES": stages}
    functions = {
        "DIRECTION": ours.direction,
        "PREPARE": ours.prepare,
        "FINISH": ours.finish if measures else None,
        "CONCLUDE": ours.conclude if epilogue else None,
        "STEP_SCALE": getattr(ours, "step_scale", StepScale.LR.value),
    }
    found = {
        "norm": {**width, "SUMS": described if scope == CHANNEL else "", **walk},
        "step": {**functions, **counts, **walk},
    }
    if measures:
        found["sums"] = {"MEASURE": ours.measure, "PREPARE": ours.prepare, **counts, **walk}
        found["fold"] = {"SUMS": described, "TILE": tile}
    if described and scope != TENSOR:
        found["scopes"] = {"SCORE": getattr(ours, "score", None), "PREPARE": ours.prepare, **counts}
    if epilogue:
        found["epilogue"] = {"N_STATES": n_states, **width}
    return found


def signature_of(rule: ModuleType, signature: str) -> str:
    """A signature as kernels take it: they are told of rows that the rule replaces."""
    state = getattr(rule, "replaces", "")
    if not state or f" {state}=" not in signature:
        return signature
    first, rest = signature.split(" ", 1)
    shape, plus, noise = first.partition("+")
    return f"{shape}+replaced{plus}{noise} {rest}"


def absent(constants: dict[str, Any]) -> dict[str, None]:
    """The tables that a kernel specialised like this takes no part of, and is given None for."""
    described = constants.get("SUMS", "")
    names = ("row_sums", "sums")[: 2 if not described else 0 if described.startswith(CHANNEL) else 1]
    return dict.fromkeys(names)
