"""Reads machine code: which global memory accesses there are, and which stand in the loop over full tiles.

NVIDIA's SASS as cuobjdump prints it, and AMD's assembly as LLVM writes it. A kernel's *main loops* are its
innermost loops with an access of 16 bytes; what they do with other widths would be a tile read in small pieces.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import networkx

from fusedopt.inspection.flight import loads_in_flight
from fusedopt.inspection.instruction import Flow, Instruction

WIDE = 128


@dataclass(frozen=True, slots=True)
class Report:
    """What ``fusedopt inspect`` tells of a kernel; the first four counts are of its main loops.

    Attributes:
        norm_loads_in_flight: 16-byte loads that the best innermost loop without stores has under way at once; None for
            AMD's, whose registers are not looked at.
        scalar_loads_in_flight: The same of narrower loads in innermost loops with stores and without 16-byte accesses:
            of what is not a full tile.
    """

    name: str
    arch: str
    registers: int
    spills: int
    loads_128: int
    loads_other: int
    stores_128: int
    stores_other: int
    kernel_loads_128: int
    kernel_loads_other: int
    kernel_stores_128: int
    kernel_stores_other: int
    norm_loads_in_flight: int | None
    scalar_loads_in_flight: int | None


def report(name: str, arch: str, registers: int, spills: int, code: list[Instruction]) -> Report:
    """Count a kernel's accesses."""
    flow = _flow(code)
    loops = dict(_innermost(flow))

    def count(instructions: list[Instruction]) -> list[int]:
        return [
            sum(i.kind == kind and (i.bits >= WIDE) == wide for i in instructions)
            for kind in ("load", "store")
            for wide in (True, False)
        ]

    def in_flight(wide: bool, stores: bool) -> int | None:
        if not any(i.registers for i in code):
            return None
        chosen = [
            (header, body)
            for header, body in loops.items()
            if (body in mains) == wide and any(code[i].kind == "store" for i in body) == stores
        ]
        return max(
            (loads_in_flight(code, flow, *loop, lambda i: (i.bits >= WIDE) == wide) for loop in chosen), default=0
        )

    mains = [body for body in loops.values() if any(code[i].bits >= WIDE for i in body)]
    main = [code[i] for i in sorted(set[int]().union(*mains))]
    counts = name, arch, registers, spills, *count(main), *count(code)
    norm, scalar = in_flight(True, False), in_flight(False, True)
    return Report(*counts, norm_loads_in_flight=norm, scalar_loads_in_flight=scalar)


def _flow(code: list[Instruction]) -> Flow:
    """Which instruction may follow which."""
    places = {i.label: n for n, i in enumerate(code) if i.label}
    flow: Flow = networkx.DiGraph()
    flow.add_nodes_from(range(len(code)))
    for n, instruction in enumerate(code):
        if instruction.kind in ("branch", "jump") and instruction.target in places:
            flow.add_edge(n, places[instruction.target])
        if instruction.kind not in ("jump", "end") and n + 1 < len(code):
            flow.add_edge(n, n + 1)
    return flow


def _innermost(flow: Flow) -> Iterator[tuple[int, frozenset[int]]]:
    """The loops without another inside, by header."""
    loops = _loops(flow)
    return ((at, body) for at, body in loops.items() if not any(other < body for other in loops.values()))


def _loops(flow: Flow) -> dict[int, frozenset[int]]:
    """The natural loops: by header, all from where the header is reached again without leaving its rule."""
    above = cast("dict[int, int]", networkx.immediate_dominators(flow, 0))

    def dominates(a: int, b: int) -> bool:
        while b != a and above.get(b, b) not in (b, None):
            b = above[b]
        return a == b

    loops: dict[int, set[int]] = {}
    for tail, header in flow.edges:
        if tail in above and header <= tail and dominates(header, tail):
            body, todo = loops.setdefault(header, {header}), [tail]
            while todo:
                node = todo.pop()
                if node not in body:
                    body.add(node)
                    todo += flow.predecessors(node)
    return {header: frozenset(body) for header, body in loops.items()}


_SASS = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")


_SASS_KINDS = {"LDG": "load", "LD": "load", "STG": "store", "ST": "store", "LDL": "spill", "STL": "spill"}


def sass(text: str) -> list[Instruction]:
    """NVIDIA's machine code of one kernel."""
    code: list[Instruction] = []
    for address, predicate, opcode, operands in _SASS.findall(text):
        first, *modifiers = opcode.split(".")
        kind = _SASS_KINDS.get(first, "")
        bits = 0
        target = ""
        if kind in ("load", "store"):
            bits = next((int(m) for m in modifiers if m in ("64", "128", "256")), 32)
        elif first == "BRA":
            kind = "branch" if predicate or "DIV" in modifiers or re.match(r"!?U?P\d", operands) else "jump"
            found = re.findall(r"0x([0-9a-f]+)", operands)
            target = f"{int(found[-1], 16):x}" if found else ""
        elif first in ("EXIT", "RET") and not predicate:
            kind = "end"
        label, guard = f"{int(address, 16):x}", predicate.strip(" @")
        predicates = frozenset(re.findall(r"\bU?P\d\b", operands))
        named, written = _registers(kind, bits, operands)
        code.append(Instruction(kind, bits, label, target, named, written, guard, predicates))
    return code


def _registers(kind: str, bits: int, operands: str) -> tuple[frozenset[int], frozenset[int]]:
    """The numbers of the registers that an instruction of NVIDIA's names, and of those that it loads."""
    named = {int(n) + k for n, pair in re.findall(r"\bR(\d+)(\.64)?", operands) for k in range(1 + bool(pair))}
    data = re.search(r"(?:^|\s)R(\d+)", operands) if kind in ("load", "store") else None  # no address, in brackets
    moved = range(int(data[1]), int(data[1]) + max(bits // 32, 1)) if data else range(0)
    return frozenset(named.union(moved)), frozenset(moved if kind == "load" else ())


_AMD_WIDTH = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64}


def amdgcn(text: str) -> list[Instruction]:
    """AMD's assembly of one kernel."""
    code: list[Instruction] = []
    label = ""
    for line in text.splitlines():
        line = line.partition(";")[0].strip()
        if line.endswith(":"):
            label = line[:-1]
            code.append(Instruction("", 0, label))
            continue
        words = line.split()
        if not words or words[0].startswith("."):
            continue
        opcode = words[0]
        access = re.match(r"(?:global|buffer|flat)_(load|store)_(?:\w+_)?(\w+)$", opcode)
        if access:
            code.append(Instruction(access[1], _AMD_WIDTH.get(access[2], 32)))
        elif opcode.startswith("scratch_"):
            code.append(Instruction("spill"))
        elif opcode.startswith(("s_cbranch", "s_branch")):
            code.append(Instruction("jump" if opcode == "s_branch" else "branch", target=words[-1]))
        elif opcode == "s_endpgm":
            code.append(Instruction("end"))
        else:
            code.append(Instruction(""))
    return code


def of_cubin(name: str, arch: str, cubin: bytes, cuobjdump: str) -> Report:
    """The report of a kernel compiled for NVIDIA's GPUs.

    Args:
        name: What reports call it.
        arch: Its architecture.
        cubin: A file with this kernel alone.
        cuobjdump: The program that prints it.
    """
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout

        usage, code = dump("-res-usage"), sass(dump("-sass"))
    registers = int(re.findall(r"REG:(\d+)", usage)[-1])
    return report(name, arch, registers, sum(i.kind == "spill" for i in code), code)


def of_amdgcn(name: str, arch: str, text: str) -> Report:
    """The report of a kernel compiled for AMD's GPUs. Scalars that move to vector registers are not spilled."""

    def told(what: str) -> int:
        return int(re.findall(rf"\.{what}:\s+(\d+)", text)[0])

    return report(name, arch, told("vgpr_count"), told("vgpr_spill_count"), amdgcn(text))
