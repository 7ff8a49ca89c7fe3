"""``fusedopt diagnose``: what a saved optimizer's settings mean for convergence, and for the loss it really minimises.

FILE is what ``torch.save`` wrote of an optimizer's ``state_dict``, or of a dict that has one as "optimizer",
"optimizer_state_dict" or the first of "optimizer_states". ``--with MODULE:FUNCTION`` names a function without arguments
that returns ``(model, optimizer, loss_fn, batch)``: the model with its weights, an optimizer of its parameters (which
then loads the state), ``loss_fn(model, batch)``, which returns the scalar loss, and a batch.

JSON::

    {"optimizer", "steps",
     "groups": [{"generic_adam": {"steps", "ratio", "holds", "reasons", "at", "curve"} or null,
                 "memory_coefficient": float or null, "notes": [str]}],
     "correction": {"loss", "term", "force_norm", "correction_norm", "within"} or null,
     "curvature": {"values", "bounds", "lr", "momentum", "plain_lr", "stability_limit", "reason", "batch_size"} or null,
     "notes": [str],
     "versions": {"fusedopt", "torch", "python", "numpy", "triton" if installed}}

Numbers that are not finite are null.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, cast
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from fusedopt import diagnostics
from fusedopt.aliases import Group, Json, StateDict
from fusedopt.cli import machine, report
from fusedopt.optimizers import OPTIMIZERS

HELP = "what a saved optimizer's settings mean: convergence condition, memory of momentum, curvature"
STEPS, FEWEST = 100_000, 10  # where the state counts none, or so few that nothing can be said of them
# Options of groups that say how a step is done, not which optimizer's it is.
OPTIONAL = {
    *("params", "param_names", "initial_lr", "foreach", "fused", "maximize", "capturable", "differentiable", "swa_lr"),
    *("decoupled_weight_decay", "average", "gradient_noise", "state_dtype", "master", "cautious_weight_decay"),
    *("rescale", "rescale_every", "rescale_step"),
}
PLACES = ("optimizer", "optimizer_state_dict", "optimizer_states")
REFUSED = (TypeError, ValueError, RuntimeError)  # what a diagnostic says that is not for this optimizer
CONSTANT = (
    "lr and betas are taken as constant, as the file has them. The condition is sufficient and not necessary: constant "
    "betas never meet it, and train. Give schedules to fusedopt.diagnostics.check_generic_adam"
)

LossFn = Callable[[nn.Module, object], Tensor]


class Run(NamedTuple):
    """What ``--with`` names."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss_fn: LossFn
    batch: object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a saved state_dict of an optimizer, or a dict with one"
    )
    parser.add_argument(
        "--optimizer", metavar="NAME", help="its class; default: the only one that has such param groups"
    )
    parser.add_argument(
        "--steps",
        type=report.positive,
        metavar="N",
        help=f"of the run; default: as many as the state counts (below {FEWEST}: {STEPS})",
    )
    parser.add_argument(
        "--with",
        dest="function",
        metavar="MODULE:FUNCTION",
        help="returns (model, optimizer, loss_fn, batch): adds memory's correction and curvatures",
    )
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="also draw into this folder")


def run(args: argparse.Namespace) -> int:
    """Diagnose, print, and write the JSON file if one was asked for."""
    if args.plot is not None and not args.plot.is_dir():
        raise report.CommandError(f"--plot is {args.plot}: there is no such folder")
    saved = _read(args.file)
    groups: list[Group] = saved["param_groups"]
    run = _function(args.function) if args.function else None
    if run is not None:
        if args.optimizer:
            raise report.CommandError("--optimizer is not needed with --with, whose function returns the optimizer")
        optimizer = _loaded(run.optimizer, saved)
    else:
        optimizer = _made(_name(args.optimizer, groups), groups)
    name, steps = type(optimizer).__name__, args.steps or _steps(saved)
    content: Json = {
        "optimizer": name,
        "steps": steps,
        "groups": [],
        "correction": None,
        "curvature": None,
        "notes": [],
    }
    report.console.print(f"{name}, {len(groups)} param group{'s' if len(groups) > 1 else ''}, {steps} steps")
    try:
        for index in range(len(groups)):
            content["groups"].append(_of_group(optimizer, index, steps, args.plot))
        if run is not None:
            _of_batch(content, run, args.plot)
    except (ImportError, OSError) as error:
        raise report.CommandError(str(error)) from error
    finally:  # what was found before an error is not lost
        report.write_json(args.json, _finite({**content, "versions": machine.versions()}))
    return 0


def _finite(content: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON has none of."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in cast("Json", content).items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in cast("list[object]", content)]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _read(path: Path) -> StateDict:
    """The optimizer's state in a file."""
    try:
        content: object = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise report.CommandError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # whatever bytes that are no pickle make an unpickler raise
        raise report.CommandError(_unreadable(path, error)) from error
    places: list[object] = [content]
    if isinstance(content, dict):
        places += [cast("StateDict", content)[place] for place in PLACES if place in content]
    places = [cast("list[object]", place)[0] if _is_list(place) else place for place in places]
    for place in places:
        if _is_state(place):
            return cast("StateDict", place)
    if any(_has_groups(place) for place in places):
        raise report.CommandError(f"{path} has param groups, but no state beside them")
    raise report.CommandError(f"{path} has no optimizer's state_dict, also not as {', '.join(PLACES)}")


def _is_list(found: object) -> bool:
    """Whether it is one of several state_dicts, as Lightning saves them."""
    return isinstance(found, (list, tuple)) and bool(cast("list[object]", found))


def _has_groups(found: object) -> bool:
    """Whether it has param groups, as a state_dict of an optimizer."""
    groups: object = cast("StateDict", found).get("param_groups") if isinstance(found, dict) else None
    return (
        isinstance(groups, list)
        and bool(cast("list[object]", groups))
        and all(isinstance(g, dict) for g in cast("list[object]", groups))
    )


def _is_state(found: object) -> bool:
    """Whether it is a state_dict of an optimizer."""
    return _has_groups(found) and isinstance(cast("StateDict", found).get("state"), dict)


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file cannot be loaded, in one line."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused or is_zipfile(path):
        what = f"{refused[1]}, which" if refused else "what"
        return f"{path} holds {what} weights_only does not load; save the optimizer's state_dict alone"
    return f"{path} is no file of torch.save, or is damaged"


def _steps(saved: StateDict) -> int:
    """The most steps that a parameter has had."""
    counts: list[float] = []
    for state in cast("dict[object, object]", saved["state"]).values():
        step = cast("StateDict", state).get("step") if isinstance(state, dict) else None
        if isinstance(step, (int, float)) or (isinstance(step, Tensor) and step.numel() == 1):
            counts.append(float(step))
    most = max((count for count in counts if math.isfinite(count)), default=0.0)
    return int(most) if most >= FEWEST else STEPS


def _name(asked: str | None, groups: list[Group]) -> str:
    """Which of our classes the groups are of."""
    if asked is not None:
        known = {name.lower(): name for name in OPTIMIZERS}
        if asked.lower() not in known:
            raise report.CommandError(f"no optimizer is called {asked!r}; there are {', '.join(OPTIMIZERS)}")
        return known[asked.lower()]
    keys = set(groups[0]) - OPTIONAL
    fitting = [name for name, kind in OPTIMIZERS.items() if set(_defaults(kind)) - OPTIONAL == keys]
    is_decoupled = groups[0].get("decoupled_weight_decay")
    if fitting == ["Adam", "AdamW"] and is_decoupled is not None:
        return "AdamW" if is_decoupled else "Adam"
    if len(fitting) != 1:
        which = " or ".join(fitting) if fitting else "no optimizer that is known"
        raise report.CommandError(f"its param groups ({', '.join(sorted(keys))}) are of {which}; say --optimizer NAME")
    return fitting[0]


def _defaults(kind: type[torch.optim.Optimizer]) -> Group:
    """A param group of a class."""
    make = cast("Callable[..., torch.optim.Optimizer]", kind)
    return make([nn.Parameter(torch.zeros(1))]).param_groups[0]


def _made(name: str, groups: list[Group]) -> torch.optim.Optimizer:
    """An optimizer with these groups, of one parameter each."""
    make = cast("Callable[..., torch.optim.Optimizer]", OPTIMIZERS[name])
    _check_keys(name, _defaults(OPTIMIZERS[name]), groups)
    own = [{k: v for k, v in group.items() if k != "param_names"} for group in groups]
    try:
        optimizer = make([{"params": [nn.Parameter(torch.zeros(1))]} for _ in own])
        known = optimizer.state_dict()
        known["param_groups"] = [
            {**ours, **theirs, "params": ours["params"]}
            for ours, theirs in zip(known["param_groups"], own, strict=True)
        ]
        optimizer.load_state_dict(known)
    except (*REFUSED, KeyError) as error:
        raise report.CommandError(f"its param groups are not {name}'s: {error}") from error
    return optimizer


def _check_keys(name: str, wanted: Group, groups: list[Group]) -> None:
    """The groups have what this optimizer's have."""
    for index, group in enumerate(groups):
        if missing := set(wanted) - OPTIONAL - set(group):
            raise report.CommandError(
                f"group {index} of the file is not {name}'s: it has no {', '.join(sorted(missing))}"
            )


def _function(asked: str) -> Run:
    """What the function that ``--with`` names returns."""
    module, _, name = asked.partition(":")
    if not module or not name:
        raise report.CommandError(f"--with is {asked!r}; it must be MODULE:FUNCTION")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function: object = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise report.CommandError(f"--with {asked}: {error}") from error
    except Exception as error:  # the user's own module
        raise report.CommandError(f"--with {asked}: importing it raised {_named(error)}") from error
    if not callable(function):
        raise report.CommandError(f"--with {asked}: it is {type(function).__name__}, not a function")
    try:
        found: object = function()
    except Exception as error:
        raise report.CommandError(f"--with {asked}: it raised {_named(error)}") from error
    kinds = (nn.Module, torch.optim.Optimizer)
    if not isinstance(found, tuple) or len(cast("tuple[object, ...]", found)) != 4:
        raise report.CommandError(f"--with {asked}: it must return a tuple (model, optimizer, loss_fn, batch)")
    model, optimizer, loss_fn, _ = parts = cast("tuple[object, ...]", found)
    if not isinstance(model, kinds[0]) or not isinstance(optimizer, kinds[1]) or not callable(loss_fn):
        said = ", ".join(type(part).__name__ for part in parts)
        raise report.CommandError(f"--with {asked}: it returned ({said}), not (model, optimizer, loss_fn, batch)")
    return Run(model, optimizer, _naming(cast("LossFn", loss_fn), asked), parts[3])


def _naming(loss_fn: LossFn, asked: str) -> LossFn:
    """The same, whose own errors are told from those of a diagnostic."""

    def named(model: nn.Module, batch: object) -> Tensor:
        try:
            return loss_fn(model, batch)
        except Exception as error:
            raise report.CommandError(f"--with {asked}: its loss_fn raised {_named(error)}") from error

    return named


def _named(error: Exception) -> str:
    """A user's exception, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _loaded(optimizer: torch.optim.Optimizer, saved: StateDict) -> torch.optim.Optimizer:
    """The function's optimizer, with the file's state."""
    _check_keys(type(optimizer).__name__, optimizer.param_groups[0], saved["param_groups"])
    try:
        optimizer.load_state_dict(saved)
    except (*REFUSED, KeyError) as error:
        raise report.CommandError(f"{type(optimizer).__name__} does not load the state: {error}") from error
    return optimizer


def _of_group(optimizer: torch.optim.Optimizer, index: int, steps: int, folder: Path | None) -> Json:
    """What can be said of one param group."""
    group, notes = optimizer.param_groups[index], list[str]()
    found: Json = {"generic_adam": None, "memory_coefficient": None, "notes": notes}
    if len(optimizer.param_groups) > 1:
        report.console.print(f"\nGroup {index}")
    if type(optimizer).__name__ in ("Adam", "AdamW") and not group.get("amsgrad"):
        try:
            plot = folder and folder / f"generic_adam_{index}.png"
            check = diagnostics.check_generic_adam(group["lr"], group["betas"], steps, plot=plot)
            found["generic_adam"] = asdict(check)
            notes.append(CONSTANT)
        except REFUSED as error:
            notes.append(f"convergence condition: {error}")
    else:
        notes.append("convergence condition: it is of Adam and AdamW without amsgrad")
    try:
        plot = folder and folder / f"memory_{index}.png"
        found["memory_coefficient"] = diagnostics.memory_coefficient(optimizer, group=index, plot=plot)
    except REFUSED as error:
        notes.append(f"memory of momentum: {error}")
    for note in notes:
        report.console.print(note, markup=False)
    return found


def _of_batch(content: Json, run: Run, folder: Path | None) -> None:
    """What can be said with a model and a batch."""
    notes: list[str] = content["notes"]
    with _noted(notes, "memory's correction"):
        found = diagnostics.memory_correction(
            run.optimizer,
            lambda batch: run.loss_fn(run.model, batch),
            run.batch,
            plot=folder and folder / "correction.png",
        )
        force, correction = (
            math.sqrt(sum(float((t.double() ** 2).sum()) for t in ts)) for ts in (found.force, found.correction)
        )
        kept = {"loss": found.loss, "term": found.term, "within": found.within}
        content["correction"] = {**kept, "force_norm": force, "correction_norm": correction}
    with _noted(notes, "curvature"):
        plot = folder and folder / "curvature.png"
        content["curvature"] = asdict(diagnostics.lanczos_lr(run.loss_fn, run.model, run.batch, plot=plot))
    for note in notes:
        report.console.print(note, markup=False)


@contextmanager
def _noted(notes: list[str], what: str) -> Generator[None]:
    """What a diagnostic refuses is a note."""
    try:
        yield
    except REFUSED as error:
        notes.append(f"{what}: {error}")
