"""Makes what mkdocs builds the site of: the pages of docs/, and those that follow from the code.

Run ``python docs/generate.py build/docs``, or ``make docs``. Generated are a page for each optimizer, their table, the
page of the public names, and the support matrix; results of the benchmark are copied beside them.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import fusedopt
from fusedopt import options, storage
from fusedopt.optimizers import OPTIMIZERS
from fusedopt.state import initial_options, initial_state
from fusedopt.verification.cases import CASES

DOCS, ROOT = Path(__file__).parent, Path(__file__).parents[1]
# Pages that say more of a class than its docstring.
GUIDES = {
    "AdamP": "adamp", "SGDP": "adamp", "AMSGD": "amsgd", "AMAdamW": "amadamw", "SWATS": "swats", "KoalaM": "koala",
    "KoalaV": "koala", "Muon": "muon", "NSGD": "nsgd", "ScheduleFreeAdamW": "schedule_free",
    "ScheduleFreeSGD": "schedule_free", "MBF": "mbf", "EntropySGD": "entropy", "ReplicatedSGD": "entropy",
}  # fmt: skip
FUNCTIONS = (
    "fuse", "step_in_backward", "master_weights", "convert_state", "scale_invariant_groups", "muon_groups", "grad_init",
)  # fmt: skip
OPTIONS = ("EMA", "Lookahead", "GradientNoise", "InputPowers", "GradInit")
PLACES = {"fuse": "fusedopt.fuse.fuse"}  # or a module of that name would be found
SHOWN = {
    "FusedOptimizer": (
        "show_bases: false",
        "inherited_members: true",
        "members: [step, grad_norm, clip_next_step, skipped_steps, engines, averaged, average_of, state_dict,"
        " load_state_dict, add_param_group]",
    )
}
INTEGRATIONS = ("accelerate", "transformers", "lightning", "timm")
STORAGES: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {}),
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.float32, {"state_dtype": "8bit"}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"master": "fp32"}),
    (torch.bfloat16, {"master": "split"}),
    (torch.bfloat16, {"master": "split", "state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"master": "split", "state_dtype": "8bit"}),
    (torch.bfloat16, {"master": "stochastic", "state_dtype": torch.bfloat16}),
)
SHORT = {"float32": "fp32", "float64": "fp64", "bfloat16": "bf16", "float16": "fp16"}
NUMEL = 256 * 64
PUBLIC = {"FusedOptimizer", *FUNCTIONS, *OPTIONS}


def short(value: Any) -> str:
    """A value as a reader writes it."""
    return f"`{value!r}`".replace("torch.", "", 1)


def markdown(text: str) -> str:
    """Of a docstring: code in single quotes, public names as links."""

    def code(match: re.Match[str]) -> str:
        name = match[1].removeprefix("fusedopt.")
        if name in OPTIMIZERS:
            return f"[`{name}`]({name.lower()}.md)"
        return f"[`{name}`](api.md#{PLACES.get(name, f'fusedopt.{name}')})" if name in PUBLIC else f"`{match[1]}`"

    return re.sub(r"``(.+?)``", code, text, flags=re.DOTALL)


@dataclass(frozen=True)
class Docstring:
    """The parts of a class's docstring."""

    text: str
    arguments: dict[str, str]
    example: str
    reference: str

    @classmethod
    def of(cls, kind: type) -> Docstring:
        """Split it at its headings."""
        parts = re.split(r"^(Args|Raises|Example|Reference|Returns):\n", inspect.getdoc(kind) or "", flags=re.MULTILINE)
        sections = dict(zip(parts[1::2], parts[2::2], strict=True))
        arguments = {}
        for names, meaning in re.findall(
            r"^    ([\w, \n]+?):\s(.*?)(?=^    \w[\w, ]*?:\s|^    [\w, ]+,$|\Z)",
            sections.get("Args", "") + "\n",
            re.MULTILINE | re.DOTALL,
        ):
            for name in names.replace("\n", " ").split(","):
                arguments[name.strip()] = " ".join(meaning.split())
        example = "\n".join(re.findall(r"^\s*(?:>>>|\.\.\.) ?(.*)$", sections.get("Example", ""), re.MULTILINE))
        return cls(parts[0].strip(), arguments, example, " ".join(sections.get("Reference", "").split()))


def engines_of(kind: Any) -> list[str]:
    """The engines that have all of a class's rules."""
    names = {rule.name for rule in (kind.rule, *kind.rules)}
    headers = {path.stem: path.read_text() for path in (ROOT / "csrc" / "rules").glob("*.h")}
    triton = {path.stem for path in (ROOT / "triton_kernels" / "rules").glob("*.py")}
    found = ["cpu"] if names <= headers.keys() else []
    found += ["cuda"] if names <= {name for name, text in headers.items() if "!defined(__CUDACC__)" not in text} else []
    return [*found, *(["triton"] if names <= triton else []), "eager"]


def equals(name: str) -> list[str]:
    """What a class is compared with, such as ``torch.optim.AdamW``."""
    oracles = dict.fromkeys(case.oracle for case in CASES if case.optimizer == name)
    packages = {"torch": "torch.optim", "timm": "timm.optim"}
    found = [oracle.split(":") for oracle in oracles if not oracle.startswith("none")]
    return [f"{packages.get(package, package)}.{cls}" for package, cls in found]


def held_bytes(kind: Any, dtype: torch.dtype, how: dict[str, Any]) -> float:
    """Bytes of a parameter and its states, per element."""
    p = torch.nn.Parameter(torch.zeros(64, NUMEL // 64, dtype=dtype))
    optimizer = kind([p], **how)
    group = optimizer.param_groups[0]
    made = initial_options(kind.rule, p, group) | initial_state(kind.rule, p, group)
    tensors = [p, *(t for t in made.values() if isinstance(t, torch.Tensor) and t.dim())]
    return sum(t.numel() * t.element_size() for t in tensors) / p.numel()


def arguments_table(kind: Any, said: Docstring) -> list[str]:
    """Of the constructor: what every class has is said once, on the page of the public names."""
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for name, parameter in inspect.signature(kind).parameters.items():
        meaning = said.arguments.get(name)
        if meaning is None or meaning.startswith("See ``fusedopt."):
            continue
        default = "" if parameter.default is inspect.Parameter.empty else short(parameter.default)
        lines.append(f"| `{name}` | {default} | {markdown(meaning)} |".replace("|t|", "&#124;t&#124;"))
    common = [name for name, meaning in said.arguments.items() if meaning.startswith("See ``fusedopt.")]
    if common:
        lines += [
            "",
            f"And, as every class has them ([meaning](api.md#fusedopt.FusedOptimizer)): `{'`, `'.join(common)}`.",
        ]
    return lines


def storages_table(kind: Any) -> list[str]:
    """Bytes per parameter, besides the gradient."""
    lines = ["| parameters | `state_dtype` | `master` | bytes per parameter, with it |", "|---|---|---|---|"]
    for dtype, how in STORAGES:
        state_dtype, master = (short(how.get(key)) for key in (options.STATE_DTYPE, options.MASTER))
        name = str(dtype).removeprefix("torch.")
        lines.append(f"| {name} | {state_dtype} | {master} | {held_bytes(kind, dtype, how):.4g} |")
    return lines


def states_of(kind: Any) -> str:
    """Names of the states, and what switches some on."""
    names = [f"`{s.name}`" + (f" (with `{s.when}`)" if s.when else "") for s in kind.rule.states]
    return ", ".join(names) or "none"


def differences(name: str, kind: Any) -> list[str]:
    """From torch's class of the same name, where there is one: of the signatures, and what holds for all."""
    if not hasattr(torch.optim, name):
        return []
    theirs, ours = (inspect.signature(cls).parameters for cls in (getattr(torch.optim, name), kind))
    listed = [f"`{key}`" for key in ours if key not in theirs]
    other = [key for key in theirs if key not in ours or ours[key].default != theirs[key].default]
    lines = [
        "",
        "## Differences from torch",
        "",
        f"* Arguments in torch's order with torch's defaults, and beyond them {', '.join(listed)}.",
        "* `foreach`, `fused` and `capturable` are taken and choose nothing: a step is a launch that can be captured.",
        "* States of bfloat16 and float16 parameters are float32; `state_dtype=torch.bfloat16` is torch's way.",
        "* What cannot be honoured raises, and an error leaves parameters, states and step counts as they were.",
        f"* `state_dict` goes both ways, and `fusedopt.fuse` takes over a live `torch.optim.{name}`.",
    ]
    if other:
        raise SystemExit(f"{name} differs from torch's in {', '.join(other)}, and its page does not say so")
    return lines


def optimizer_page(name: str, kind: Any) -> str:
    """Equation, arguments, memory, engines, reference."""
    said = Docstring.of(kind)
    facts = {
        "equal to": ", ".join(f"`{oracle}`" for oracle in equals(name)) or "the authors' equations",
        "states": states_of(kind),
        "engines": ", ".join(f"`{engine}`" for engine in engines_of(kind)),
        "reference": markdown(said.reference),
    }
    if name in GUIDES:
        facts["more"] = f"[what it is for, and how it is used](../optimizers/{GUIDES[name]}.md)"
    first, *rows = (f"| {key} | {value} |" for key, value in facts.items() if value)
    lines = [f"# {name}", "", markdown(said.text), "", first, "|---|---|", *rows]
    if said.example:
        lines += ["", "```python", "import fusedopt", "", said.example, "```"]
    lines += ["", "## Arguments", "", *arguments_table(kind, said), *differences(name, kind)]
    lines += ["", "## Memory", "", *storages_table(kind)]
    lines += ["", f"[What the ways to store are](../storage.md). `fusedopt bench --optimizer {name}` times it here."]
    return "\n".join(lines) + "\n"


def optimizers_page() -> str:
    """All classes in a table."""
    lines = ["# Optimizers", "", "| class | equal to | states | bytes in fp32 | engines |", "|---|---|---|---|---|"]
    for name, kind in OPTIMIZERS.items():
        oracles = ", ".join(equals(name)) or "the authors' equations"
        held = f"{held_bytes(kind, torch.float32, {}) - 4:.3g}"
        lines.append(
            f"| [{name}]({name.lower()}.md) | {oracles} | {states_of(kind)} | {held} | {', '.join(engines_of(kind))} |"
        )
    lines += ["", "Bytes are those of the states per parameter, with the arguments' defaults."]
    return "\n".join(lines) + "\n"


def api_page() -> str:
    """Every public name."""
    lines = ["# Public names", ""]
    for name in ("FusedOptimizer", *FUNCTIONS, *OPTIONS):
        lines += [f"::: {PLACES.get(name, f'fusedopt.{name}')}"]
        lines += ["    options:", *(f"      {line}" for line in SHOWN.get(name, [f"heading: fusedopt.{name}"])), ""]
    lines += ["`fusedopt.__version__` is the version, a string.", "", "## Optimizers", ""]
    lines += [f"* [`fusedopt.{name}`]({name.lower()}.md)" for name in OPTIMIZERS]
    lines += ["", "## Diagnostics", "", "What they are for: [Diagnostics](../diagnostics.md).", ""]
    for name in fusedopt.diagnostics.__all__:
        lines += [f"::: fusedopt.diagnostics.{name}", ""]
    lines += ["", "## Integrations", ""]
    for name in INTEGRATIONS:
        lines += [f"::: fusedopt.integrations.{name}", ""]
    return "\n".join(lines)


def tested(of_engine: dict[str, bool]) -> str:
    """The types that passed, and those that did not."""
    names = [SHORT.get(dtype, dtype) if passed else f"**{dtype} failed**" for dtype, passed in of_engine.items()]
    return " ".join(sorted(names))


def support_page() -> str:
    """What goes with what: of a run of the tests (`make support`), and of the table that the code itself asks."""
    told = json.loads((DOCS / "support.json").read_text())
    engines = ("cpu", "cuda", "triton", "eager")
    lines = [
        "# Support",
        "",
        f"Written by a run of the tests at commit `{told['commit'][:10]}` with torch {told['versions']['torch']}, on a "
        "machine without a GPU: `cuda` stands for its kernels on host threads, `triton` for Triton's interpreter.",
        "",
        "## Optimizers on engines",
        "",
        "Types of parameters whose error against float64 was at most twice the reference's ([how](../numerics.md)); "
        "*storages* where all ways to store were held to a slow model, too. An empty cell: the engine does not "
        "have it.",
        "",
        f"| optimizer | {' | '.join(engines)} |",
        "|---" * (1 + len(engines)) + "|",
    ]
    for name, kind in OPTIMIZERS.items():
        cells = []
        for engine in engines:
            if engine not in engines_of(kind):  # host threads may have what nvcc does not get
                cells.append("")
                continue
            stored = told["storage"].get(name, {}).get(engine)
            words = tested(told["gate"].get(name, {}).get(engine, {}))
            cells.append(words + {True: ", *storages*", False: ", **storages failed**", None: ""}[stored])
        lines.append(f"| [{name}]({name.lower()}.md) | {' | '.join(cells)} |")
    lines += ["", "## Storage", "", "| parameters | `state_dtype` | `master` | |", "|---|---|---|---|"]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
        for state_dtype in options.STATE_DTYPES:
            for master in options.MASTERS:
                group = {options.STATE_DTYPE: state_dtype, options.MASTER: master}
                reason = storage.illegal({key: value for key, value in group.items() if value}, dtype)
                name = str(dtype).removeprefix("torch.")
                said = "no: " + reason if reason else "yes"
                lines.append(f"| {name} | {short(state_dtype)} | {short(master)} | {said} |")
    lines += ["", "## Clients", "", "| client | version | what passed |", "|---|---|---|"]
    for client, features in told["clients"].items():
        words = [feature if passed else f"**failed: {feature}**" for feature, passed in features.items()]
        lines.append(f"| {client} | {told['versions'][client]} | {'; '.join(words)} |")
    lines += ["", "More versions of torch, beside one wheel: [Versions of torch](../torch_versions.md)."]
    return "\n".join(lines) + "\n"


def main(out: Path) -> None:
    """Write the folder anew."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(DOCS, out, ignore=shutil.ignore_patterns("*.py", "*.json", "__pycache__"))
    for folder in (ROOT / "bench" / "results").iterdir():
        shutil.copytree(folder, out / "results" / folder.name)
    for page in out.rglob("*.md"):
        page.write_text(page.read_text().replace("](../bench/results/", "](results/"))
    reference = out / "reference"
    reference.mkdir()
    pages = {name.lower(): optimizer_page(name, kind) for name, kind in OPTIMIZERS.items()}
    pages |= {"optimizers": optimizers_page(), "api": api_page(), "support": support_page()}
    for name, text in pages.items():
        (reference / f"{name}.md").write_text(text)
    if missing := set(fusedopt.__all__) - {*PUBLIC, *OPTIMIZERS, "__version__", "diagnostics"}:
        raise SystemExit(f"no page has {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
