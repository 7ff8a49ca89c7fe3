"""Compiles the kernels ahead of time, for GPUs that need not be there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any, Protocol

from fusedopt import storage
from fusedopt.aliases import Arguments, Group
from fusedopt.engines import triton as engine
from fusedopt.operands import Signature, named
from fusedopt.rule import Rule

TYPES: dict[str, str | tuple[str, ...]] = {
    "rows": "*i64",
    "tiles": "*i64",
    "shares": "*i64",
    "borders": "*i64",
    "layouts": "*i64",
    "step_table": "*i64",
    "partials": "*fp64",
    "numbers": "*fp64",
    "counts": "*i32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
    "n_rows": "i32",
    "n_shares": "i32",
    "n_borders": "i32",
    "n_scopes": "i32",
    "passes": "i32",
    "row_sums": "*i64",
    "sums": ("*i64", "*fp64", "*fp64", "*fp64", "*fp64", "*fp64"),
    "concluded": "*fp64",
}


class Compiled(Protocol):
    """A compiled kernel.

    Attributes:
        asm: Its code, by the name of the form: "ptx", "cubin", "amdgcn"; text but for "cubin", which is bytes.
    """

    asm: dict[str, Any]


@dataclass(frozen=True)
class Specialised:
    """A kernel with all that it is specialised to.

    Attributes:
        name: Such as ``adam bf16``, ``adam+max_exp_avg_sq bf16``, ``adam 8bit split bf16``, ``lamb sums bf16`` or
            ``norm bf16``: the rule, states that it does not always have, how it is stored, which kernel if it is not
            the step, and the parameter's and gradient's type.
        kernel: The jit function.
        constants: Its constexpr arguments.
        has_codes: Whether states have 8 bits.
    """

    name: str
    kernel: engine.JitFunction
    constants: Arguments
    has_codes: bool = False


def specialised(rules: Iterable[type[Rule]], elements: Iterable[str], arch: str, group: Group) -> list[Specialised]:
    """The norm kernel for every element type, and the others for every rule, set of states and element type.

    Args:
        rules: Eager rules, see fusedopt.rule.
        elements: Of parameters and gradients; states are fp64 beside fp64, else fp32.
        arch: A compute capability times ten, such as 90, or one of AMD's, such as gfx942.
        group: ``state_dtype`` and ``master``, if anything; those that the elements cannot have are left out.
    """
    ours = import_module("fusedopt.triton_kernels.kernels")
    elements, rules = list(elements), list(rules)
    found: list[Specialised] = []
    asked = group.get(storage.STATE_DTYPE), group.get(storage.MASTER)
    stored_as = [str(value).removeprefix("torch.") for value in asked if value]
    for element, rule in product(elements, rules):
        dtype = named(element).dtypes[0]
        if storage.illegal(group, dtype):
            continue
        for states in rule.variants():
            codecs = [storage.state_codec(s, dtype, group) for s in rule.states]
            stored = {s.name: codec for s, codec in zip(rule.states, codecs, strict=True) if s.name in states}
            param = storage.param_codec(dtype, group)
            signature = Signature(False, (("param", param), ("grad", named(element)), *stored.items()))
            has_codes = any(codec.block > 1 for codec in stored.values())
            tile = engine.tile_of(_backend(arch), has_codes)
            always = set(rule.variants()[0]).intersection(*rule.variants())
            switched = [name for name in states if name not in always]
            label = " ".join(["+".join([rule.name, *switched]), *stored_as])
            more = [rule, [signature], tile, engine.STAGES, rule.scopes[0]]
            for kernel, chosen in ours.constants(*more, options=bool(group)).items():
                name = {"norm": "norm", "step": label}.get(kernel, f"{label} {kernel}")
                if kernel != "norm" or (rule is rules[0] and states == rule.variants()[0]):
                    found.append(Specialised(f"{name} {element}", ours.KERNELS[kernel], chosen, has_codes))
    return found


def compiled(what: Specialised, arch: str) -> Compiled:
    """The compiled kernel.

    Args:
        what: Which.
        arch: For what; the same that it was specialised for.
    """
    triton, compiler = import_module("triton"), import_module("triton.compiler")
    target = import_module("triton.backends.compiler").GPUTarget
    absent = import_module("fusedopt.triton_kernels.kernels").absent
    names = what.kernel.arg_names
    constants = {k: v for k, v in (absent(what.constants) | what.constants).items() if k in names}
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    backend = _backend(arch)
    wave = 64 if arch.startswith("gfx9") else 32
    source = compiler.ASTSource(what.kernel, signature, constexprs=constants)
    return triton.compile(
        source,
        target=target(backend, arch if backend == "hip" else int(arch), wave),
        options=engine.options(backend, what.has_codes),
    )


def _backend(arch: str) -> str:
    return "hip" if arch.startswith("gfx") else "cuda"
