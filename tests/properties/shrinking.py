"""Makes a failing program smaller. Hypothesis could not where the process dies; and this knows what matters less."""

import copy
import time

PLAIN = [0, 1, 0, 0]
SIMPLE = (("layout", PLAIN), ("shape", [3]), ("dtype", "float64"), ("seed", 0))


def shrink(program, fails, seconds):
    """The smallest program found that still fails.

    Args:
        program: One that fails.
        fails: Whether a program fails in the same way.
        seconds: When to stop.
    """
    end = time.monotonic() + seconds
    while True:
        for candidate in smaller(program):
            if time.monotonic() > end:
                return program
            if fails(candidate):
                program = candidate
                break
        else:
            return program


def smaller(program):
    """Programs with something left out, the largest cuts first."""
    ops, groups = program["ops"], program["groups"]
    for size in (8, 4, 2, 1):
        for k in range(0, len(ops), size):
            yield {**program, "ops": ops[:k] + ops[k + size :]}
    if program["many"]:
        yield {**program, "many": 0}
    for g in range(len(groups)) if len(groups) > 1 else ():
        yield {**program, "groups": groups[:g] + groups[g + 1 :]}
    for g, group in enumerate(groups):
        for k in range(len(group["params"])) if len(group["params"]) > 1 else ():
            yield changed(program, lambda new, g=g, k=k: new["groups"][g]["params"].pop(k))
    yield from simpler(program)


def simpler(program):
    """Programs of the same length with something plain in the place of something else."""
    for g, group in enumerate(program["groups"]):
        for k, p in enumerate(group["params"]):
            for key, value in SIMPLE:
                if p[key] != value:
                    yield changed(program, lambda new, at=(g, k, key), v=value: set_in(new, at, v))
        for key in group["options"]:
            yield changed(program, lambda new, g=g, key=key: new["groups"][g]["options"].pop(key))
    for key in program["options"]:
        if key not in ("lr", "eps"):  # the comparison relies on eps
            yield changed(program, lambda new, key=key: new["options"].pop(key))
    for key, value in (("clip", None), ("skip", False)):
        if program[key] != value:
            yield {**program, key: value}
    for k, op in enumerate(program["ops"]):
        if op[0] in ("fill", "move", "replace_state", "flatten") and op[-1] != PLAIN:
            yield changed(program, lambda new, k=k: new["ops"][k].__setitem__(-1, PLAIN))


def set_in(program, at, value):
    g, k, key = at
    program["groups"][g]["params"][k][key] = value


def changed(program, change):
    new = copy.deepcopy(program)
    change(new)
    return new
