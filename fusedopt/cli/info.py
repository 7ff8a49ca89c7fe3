"""``fusedopt info``: which engines run here, or why not, and what they step.

JSON::

    {"versions": {"fusedopt", "torch", "python", "numpy", "triton" if installed},
     "machine": {"platform", "cpu", "isa", "threads", "gpus"},
     "reading": how tensors are read before a step: "torch's C ABI", "DLPack" or "Python",
     "engines": {name: {"available": bool, "reason": str or null}},
     "optimizers": {name: [names of the engines that step it in every storage]},
     "bytes": [{"dtype", "state_dtype", "master", "adamw", "lion"}, ...], what is held for each parameter
     "build": {engine: {"failure": str or null, "compiler", "targets", "seconds"}}}, of the installation
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from typing import cast

import torch
from rich.markup import escape

from fusedopt import host, options, storage
from fusedopt.aliases import Json
from fusedopt.cli import machine, report
from fusedopt.engines import ENGINES
from fusedopt.optimizer import FusedOptimizer
from fusedopt.optimizers import OPTIMIZERS
from fusedopt.rule import Rule

HELP = "engines available here or the reason why not, versions, and what steps what"

STORAGE = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options: it has none of its own."""


def run(args: argparse.Namespace) -> int:
    """Print the tables, and write the JSON file if one was asked for."""
    engines = _engines()
    stepped = _stepped([name for name, entry in engines.items() if entry["available"]])
    content = {
        "versions": machine.versions(),
        "machine": machine.machine(),
        "reading": host.reading_path(),
        "engines": engines,
        "optimizers": {
            name: [engine for engine, storages in row.items() if len(storages) == len(STORAGE)]
            for name, row in stepped.items()
        },
        "bytes": _bytes(),
        "build": host.build_report(),
    }
    _print(content, stepped)
    report.write_json(args.json, content)
    return 0


def _engines() -> dict[str, Json]:
    reasons = {name: engine.available() for name, engine in ENGINES.items()}
    return {name: {"available": reason is None, "reason": reason} for name, reason in reasons.items()}


def _stepped(engines: list[str]) -> dict[str, dict[str, list[str]]]:
    """For every optimizer and engine, the storages of parameters that it steps: found by trying."""
    return {
        name: {engine: [label for label, dtype in STORAGE.items() if _steps(name, engine, dtype)] for engine in engines}
        for name in sorted(OPTIMIZERS)
    }


def _steps(name: str, engine: str, dtype: torch.dtype) -> bool:
    make = cast("Callable[..., FusedOptimizer]", OPTIMIZERS[name])
    p = torch.nn.Parameter(torch.ones(3, dtype=dtype, device=ENGINES[engine].home()))
    p.grad = torch.ones_like(p)
    try:
        optimizer = make([p], engine=engine)
        optimizer.param_groups[0]["lr"] = 0.0  # steps that measure a loss can do without one then
        optimizer.step()
    except (LookupError, RuntimeError, TypeError, ValueError):
        return False
    return True


def _bytes() -> list[Json]:
    """What optimizers with two states and with one hold for each parameter besides its gradient."""
    rows: list[Json] = []
    for label, dtype in STORAGE.items():
        for state_dtype, master in product(options.STATE_DTYPES, options.MASTERS):
            group = {options.STATE_DTYPE: state_dtype, options.MASTER: master}
            if storage.illegal(group, dtype):
                continue
            held = {name: _held(OPTIMIZERS[name].rule, dtype, group) for name in ("AdamW", "Lion")}
            name = options.plain(group).get(options.STATE_DTYPE)
            row = {"dtype": label, "state_dtype": name, "master": master}
            rows.append({**row, **{kind.lower(): round(n, 3) for kind, n in held.items()}})
    return rows


def _held(rule: type[Rule], dtype: torch.dtype, group: Json) -> float:
    specs = [spec for spec in rule.states if spec.name in rule.variants()[0]]
    codecs = [storage.param_codec(dtype, group), *(storage.state_codec(spec, dtype, group) for spec in specs)]
    return sum(codec.dtypes[0].itemsize + sum(t.itemsize / codec.block for t in codec.dtypes[1:]) for codec in codecs)


def _print(content: Json, stepped: dict[str, dict[str, list[str]]]) -> None:
    here = content["machine"]
    about = report.table("This machine", "", "")
    about.show_header = False
    for package, version in content["versions"].items():
        about.add_row(package, version)
    about.add_row("reads tensors", "in Python" if content["reading"] == "Python" else f"through {content['reading']}")
    about.add_row("platform", here["platform"])
    about.add_row("CPU", f"{here['cpu']}, {here['threads']} threads, ISA level {here['isa'] or 'unknown'}")
    for gpu in here["gpus"] or ["none that torch sees"]:
        about.add_row("GPU", gpu)
    report.console.print(about, "")

    engines = report.table("Engines", "engine", "available", "reason")
    for name, entry in content["engines"].items():
        engines.add_row(name, "yes" if entry["available"] else "no", escape(entry["reason"] or ""))
    report.console.print(engines, "")

    available = [name for name, entry in content["engines"].items() if entry["available"]]
    optimizers = report.table("Parameters that each optimizer steps, by engine", "optimizer", *available)
    for name, row in stepped.items():
        optimizers.add_row(name, *(" ".join(row[engine]) or "none" for engine in available))
    report.console.print(optimizers)
    held = report.table(
        "Bytes held for each parameter, without its gradient", "parameters", "state_dtype", "master", "AdamW", "Lion",
        numeric=("AdamW", "Lion"),
    )  # fmt: skip
    for row in content["bytes"]:
        asked = [row["dtype"], str(row["state_dtype"]), str(row["master"])]
        held.add_row(*asked, *(f"{row[name]:.4g}" for name in ("adamw", "lion")))
    report.console.print("", held)
    report.console.print(
        "\nBy default states of bf16 and fp16 parameters are fp32, for small changes are lost in less; torch's are as "
        "narrow as the parameter, which is state_dtype=torch.bfloat16."
    )
    report.console.print(f"\n{escape(_built(content['build']))}")


def _built(build: dict[str, Json]) -> str:
    """What was compiled, by what and for what, in a line."""
    parts = [
        f"{engine} for {', '.join(made['targets'])} by {made['compiler']} in {made['seconds']:.0f} s"
        if made["failure"] is None
        else f"{engine} was not"
        for engine, made in build.items()
    ]
    return f"Built: {'; '.join(parts) or 'nothing'}."
