"""The CUDA engine's kernels, as they stand in the built extension."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from fusedopt.inspection.code import Report, report, sass


def cuobjdump() -> str | None:
    """The program that prints machine code: CUDA's, or the one that triton brings."""
    spec = find_spec("triton")
    places = [Path("/usr/local/cuda/bin/cuobjdump")]
    if spec and spec.origin:
        places.append(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return shutil.which("cuobjdump") or next((str(p) for p in places if p.exists()), None)


def unavailable(arch: str) -> str | None:
    """Why the kernels cannot be looked at; None if they can."""
    from fusedopt import host

    if not _extension():
        return f"the CUDA engine is not there: {host.build_failure('cuda')}"
    if not cuobjdump():
        return "cuobjdump is missing; CUDA's toolkit and triton bring it"
    listing = _run("-lelf")
    built = sorted(set(re.findall(r"sm_(\d+)", listing)), key=int)
    if arch not in built:
        return f"the CUDA engine was built for {', '.join(built)}, not for {arch}"
    return None


def inspect(rules: set[str], arch: str) -> list[Report]:
    """The kernels of rules.

    Args:
        rules: Names.
        arch: A compute capability for which the extension has code.
    """
    usage = _run("-res-usage", "-arch", f"sm_{arch}")
    registers = {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    found: list[Report] = []
    for section in _run("-sass", "-arch", f"sm_{arch}").split("Function : ")[1:]:
        mangled = section.split(None, 1)[0]
        label, rule = _label(mangled)
        if rule in rules:
            code = sass(section)
            found.append(report(label, f"sm_{arch}", registers[mangled], sum(i.kind == "spill" for i in code), code))
    return sorted(found, key=lambda r: r.name)


def _extension() -> str | None:
    spec = find_spec("fusedopt._cuda")
    return spec.origin if spec else None


def _run(*options: str) -> str:
    command = [cuobjdump() or "", *options, _extension() or ""]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _label(mangled: str) -> tuple[str, str]:
    """What reports call a kernel, and its rule: ``Adam<false>``, or with `` large`` or `` options``.

    A kernel is step<words, rule, more rules...> of namespace fusedopt::cuda; rules have boolean arguments or none, and
    may be those of Optioned.
    """
    words, rest = re.fullmatch(r"_ZN8fusedopt4cuda4stepILi(\d+)E(.*?)EvNS0_9Arguments.*", mangled).groups()  # type: ignore[union-attr]
    name = re.search(r"NS_(\d+)(\w+)", rest)
    assert name
    rule = name[2][: int(name[1])]
    variants = [
        ", ".join("true" if bit == "1" else "false" for bit in re.findall(r"Lb([01])E", arguments))
        for arguments in re.findall(r"I((?:Lb[01]E)+)E", rest)
    ]
    label = ", ".join(f"{rule}<{v}>" for v in variants) or rule
    kind = " options" if "Optioned" in rest else " large" if int(words) > 1000 else ""
    return label + kind, rule.lower()
