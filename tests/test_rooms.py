"""No module imports upward, or in a circle: docs/architecture.md says which rooms there are."""

import ast
from functools import cache

import pytest
from builds import ROOT

# From the ground up; a module may import those of its own room, and of lower ones.
ROOMS = {
    "words": "aliases layout operands passes rule",
    "Python": "callers compiling forking interrupts printing",
    "tensors": "checks codecs memory newton_schulz options ranks scaling state state_checks status storage sums",
    "kernels": "triton_kernels triton_kernels.*",
    "seam": "context",
    "host": "host launch noise plans rescaling scan",
    "engines": "engines engines.*",
    "steps": "planner stepper",
    "optimizer": "amp averages checkpoint clipping optimizer stepping",
    "optimizers": "optimizers optimizers.*",
    "functions": "backward conversion fuse initialization invariance matrix_groups diagnostics diagnostics.* "
    "integrations integrations.*",
    "package": "fusedopt",
    "tools": "inspection inspection.* verification verification.* cli.gpt cli.machine cli.plot cli.report cli.training",
    "bench": "bench bench.*",
    "commands": "cli cli.* __main__",
}
FOLDERS = {"": "fusedopt", "triton_kernels": "triton_kernels", "bench": "bench"}


@cache
def modules():
    """Their files, by names without that of the package."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [name, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(part for part in parts if part and part != "__init__") or "fusedopt"] = path
    return found


def imported(tree):
    """The names of what a module imports, anywhere in it: for types alone, in functions, and by ``import_module``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, "") for name in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module, name.name) for name in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value, ""


def own(name, member):
    """Which of our modules that is, if it is one."""
    package, _, rest = name.partition(".")
    if package != "fusedopt":
        return None
    inner = ".".join(part for part in (rest, member) if part)
    return inner if inner in modules() else rest or "fusedopt"


@cache
def imports():
    """What each module imports of ours."""
    found = {}
    for name, path in modules().items():
        tree = ast.parse(path.read_text())
        found[name] = {own(*one) for one in imported(tree)} - {None, name}
    return found


def room_of(name):
    """The first that names it, or the folder in which it is."""
    for number, members in enumerate(ROOMS.values()):
        exact = members.split()
        if name in exact:
            return number
    for number, members in enumerate(ROOMS.values()):
        if any(part.endswith(".*") and name.startswith(part[:-1]) for part in members.split()):
            return number
    pytest.fail(f"{name} is in no room")


@pytest.mark.parametrize("name", sorted(modules()))
def test_nothing_imports_upward(name):
    rooms = list(ROOMS)
    upward = {other for other in imports()[name] if room_of(other) > room_of(name)}
    assert not upward, f"{name} of {rooms[room_of(name)]!r} imports {', '.join(sorted(upward))}"


def test_nothing_imports_in_a_circle():
    left = {name: set(others) for name, others in imports().items()}
    while ready := {name for name, others in left.items() if not others}:
        left = {name: others - ready for name, others in left.items() if name not in ready}
    assert not left


def test_kernels_know_no_engine_and_engines_no_optimizer():
    for name, others in imports().items():
        room = list(ROOMS)[room_of(name)]
        of = {list(ROOMS)[room_of(other)] for other in others}
        assert room != "kernels" or of <= {"words", "tensors", "kernels"}, name
        assert room != "engines" or of <= {"words", "Python", "tensors", "kernels", "seam", "host", "engines"}, name
    assert "engines" not in imports()["engines.eager"]


def test_imports_are_seen():
    """Whatever form they have."""
    program = "import fusedopt\nfrom fusedopt import rule, EMA\ndef f():\n    import_module('fusedopt.engines.cpu')\n"
    assert {own(*one) for one in imported(ast.parse(program))} == {"fusedopt", "rule", "engines.cpu"}


def test_core_is_what_engines_share():
    """It knows neither Python nor a job of the CPU's, and nothing of an engine."""
    files = [*(ROOT / "csrc" / "core").glob("*.h"), *(ROOT / "csrc" / "rules").glob("*.h")]
    assert files
    for path in files:
        included = [line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('#include "')]
        assert all(name.partition("/")[0] in ("core", "families") for name in included), path
        assert "pybind11" not in path.read_text() and "Python.h" not in path.read_text(), path


SIZES = {"file": 400, ast.ClassDef: 200, ast.FunctionDef: 60}
OURS = ("fusedopt", "triton_kernels", "bench", "csrc", "tests", "docs", "examples")


def test_sizes():
    """What is longer than a few screens is several things."""
    long = []
    for path in (path for folder in OURS for path in sorted((ROOT / folder).rglob("*"))):
        if path.suffix not in (".py", ".h", ".cpp", ".cu", ".cuh"):
            continue
        lines = path.read_text().splitlines()
        if len(lines) > SIZES["file"]:
            long.append(f"{path}: {len(lines)}")
        for node in ast.walk(ast.parse("\n".join(lines))) if path.suffix == ".py" else ():
            if (most := SIZES.get(type(node))) is not None:
                first = min(one.lineno for one in (node, *node.decorator_list))
                if node.end_lineno - first >= most:
                    long.append(f"{path}: {node.name} {node.end_lineno - first + 1}")
    assert not long
