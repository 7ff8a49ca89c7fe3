"""The parts of a visit to a machine with a GPU, and the commands of each; see gpu.py, which runs them."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DRY = ROOT / "build" / "dry"  # where it is built without a GPU: less than what may be in the checkout
PARTS, DEFAULT = ("build", "smoke", "tune", "test", "bench", "ncu", "sanitize", "gate"), 6  # the first six
ENGINES = ("cuda", "triton")
NO_GPU = "torch sees no GPU"


@dataclass
class Command:
    """One process of the visit.

    Attributes:
        name: Of its log; like the other files it writes, it begins with its part's.
        command: What is run.
        seconds: How long it may take, if its part has so much left.
        does: What for, where the command itself does not say it.
        skip: Why it cannot be run here; empty if it can.
        optional: Counts as skipped if it cannot be run or finished.
        environment: Variables of its own.
    """

    name: str
    command: list[str]
    seconds: float
    does: str = ""
    skip: str = ""
    optional: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def about(self) -> str:
        """What it does, on one line."""
        return self.does or shlex.join(self.command).replace(f"{sys.executable} ", "python ").removeprefix("python -m ")


@dataclass
class Part:
    """Stages, one after another, of commands that run at the same time; what earlier parts left of theirs is added."""

    name: str
    stages: list[list[Command]]
    seconds: float


# The CPU engine without a GPU: one build of three, which every such processor runs.
ONE_LEVEL = {"FUSEDOPT_CPU_LEVELS": "v2"} if platform.machine().lower() in ("x86_64", "amd64") else {}
# And the CUDA engine: a sixth of what it takes to compile all rules, and it is the default of `fusedopt bench tune`.
ONE_RULE = """
import json, pathlib, runpy, sys
setup, package = runpy.run_path("setup.py"), pathlib.Path(sys.argv[1])
ninja = setup["cuda_ninja"](pathlib.Path("build", "tune").resolve())
rules, choices = [rule for rule in setup["RULES"] if rule.stem == "adam"], ("default_", "-DFUSEDOPT_FIRST_VARIANT=1")
archs = setup["cuda_archs"](setup["find_nvcc"]())
setup["add_cuda_engine"](ninja, package / "_cuda.so", rules, archs, *choices)
ninja.run()
report = package / setup["REPORT"]
made = {"failure": None, "compiler": "nvcc", "targets": [f"sm_{arch}" for arch in archs], "seconds": 0.0}
report.write_text(json.dumps(json.loads(report.read_text()) | {"cuda": made}))
print(f"_cuda.so for {', '.join(map(str, archs))}: {', '.join(rule.stem for rule in rules)}")
"""
STEPS = """
import sys, torch, fusedopt
from fusedopt.bench import suites
name, suite, clip = sys.argv[1:]
device, results = fusedopt.engines.ENGINES[name].home(), []
for engine in (name, "eager"):
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in suites.find(suite).shapes]
    optimizer = fusedopt.AdamW(ps, lr=0.01, max_grad_norm=float(clip) or None, engine=engine)
    for _ in range(3):
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer.step()
    results.append(torch.cat([p.detach().flatten() for p in ps]))
difference = (results[0] - results[1]).abs().max().item()
print(f"{name} on {device}: at most {difference:.1e} from eager after 3 steps")
sys.exit(not difference < 1e-5)
"""
PROFILES = {"gpt2": "gpt2 0", "gpt2-clip": "gpt2 1", "10000x64": "10000x64 0"}
# Of the third launch; the clocks are the machine's.
NCU = "--clock-control none --set full --kernel-name regex:^step --launch-skip 2 --launch-count 1 --page details"
DECISIVE = ("gpt2", "gpt2 --clip 1", "gpt2 --dtype bf16", "1000x1000", "10000x64")
RIVALS = "--optimizer AdamW --peer torch-foreach --peer torch-fused --peer apex --peer transformer-engine"
ON_CPU = "--device cpu --suite 10x10000 --optimizer AdamW --repeats 3 --peer torch-foreach --peer torch-fused"
# The log names the test that was under way, and soon before the limit its lines.
TESTS = "-m pytest tests/test_gpu.py tests/test_tiles.py tests/test_layouts.py -vv -rs -p no:cacheprovider"
TESTS += " --durations=5 -o faulthandler_timeout=60"
# Expressions of pytest's -k. A fault on the device is the end of its process, so what is apart fails apart.
APART = {"tiles": "test_tiles and not mixed_states", "mixed": "mixed_states", "layouts": "test_layouts"}
APART |= {
    "launches": "launches_per_step or nothing_waits",
    "graphs": "graph or capture",
    "streams": "side_stream or other_current",
    "sizes": "beyond_two or twenty_thousand",
}
BETWEEN, GATE = "agree_with_one_another", "test_gate"
REST = f"not ({' or '.join([*APART.values(), BETWEEN, GATE])})"
DTYPES = {dtype: dtype for dtype in ("float32", "float64", "bfloat16")} | {"float16": "float16 and not bfloat16"}
SANITIZED = "cuda and (nothing_beyond_a_row or engines_agree and (AdamW or SGD or NAdam))"
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that the sanitizer sees where a tensor ends
WIDE = {"COLUMNS": "180"}  # so that its table is one
FEW = {"MAX_JOBS": str(os.cpu_count() or 1)}  # so that what is stopped has finished more than it has begun
BESIDE = {"OMP_NUM_THREADS": "2"}  # for one of many processes


def parts(out: Path, gpu: bool) -> list[Part]:
    """All parts of a visit, in order, with a GPU or without."""
    python, need = sys.executable, "" if gpu else NO_GPU
    pytest = [python, *TESTS.split()]
    fusedopt, dry = [python, "-m", "fusedopt"], [] if gpu else ["--dry-run"]
    bench = [*fusedopt, "bench"]
    ncu, without_ncu = tool("ncu")
    sanitizer, without_sanitizer = tool("compute-sanitizer")

    def test(name: str, select: str, seconds: float = 85) -> Command:
        return Command(name, [*pytest, "-k", select], seconds, f"pytest -k '{select}'", need, environment=BESIDE)

    def step(engine: str, skip: str = need) -> Command:
        command = [python, "-c", STEPS, engine, "10x1000", "1"]
        return Command(f"smoke-{engine}", command, 20, f"3 steps of AdamW by {engine} and by eager", skip)

    def decisive(suite: str) -> Command:
        name = f"bench-{suite.replace(' --', '-').replace(' ', '-')}"
        command = [*bench, "--suite", *suite.split(), *RIVALS.split(), "--json", str(out / f"{name}.json")]
        return Command(name, command, 25, skip=need)

    def profile(name: str, arguments: str) -> Command:
        exported = ["--force-overwrite", "--export", str(out / f"ncu-{name}")]
        command = [ncu, *NCU.split(), *exported, python, "-c", STEPS, "cuda", *arguments.split()]
        return Command(f"ncu-{name}", command, 20, f"ncu on AdamW, {name}", need or without_ncu, optional=True)

    def sanitize(kind: str) -> Command:
        command = [sanitizer, "--tool", kind, "--error-exitcode", "1", *pytest, "-k", SANITIZED]
        return Command(f"sanitize-{kind}", command, 240, "", need or without_sanitizer, environment=UNPOOLED | BESIDE)

    tests = [test(f"test-{e}-{name}", f"{e} and ({select})") for name, select in APART.items() for e in ENGINES]
    tests += [*(test(f"test-{e}-rest", f"{e} and {REST}") for e in ENGINES), test("test-between", BETWEEN)]
    collect = Command("test-collect", [*pytest, "--collect-only"], 20, environment={"FUSEDOPT_TEST_ENGINES": "eager"})
    # It may take too long, where Triton compiles for each of its cells.
    info = Command("smoke-info", [*fusedopt, "info", "--json", str(out / "smoke-info.json")], 20, optional=gpu)
    driver = Command("smoke-driver", ["nvidia-smi"], 10, skip=need, optional=True)
    standard = [*bench, "--json", str(out / "bench.json"), *([] if gpu else ON_CPU.split())]
    report = Command("bench-report", [*bench, "report", str(out)], 30)
    tuned = [*bench, "tune", "--json", str(out / "tune.json"), *dry]
    tune = Command("tune", tuned, 150 if gpu else 90, optional=not gpu, environment=WIDE if gpu else WIDE | FEW)
    stages = {
        "build": [[command] for command in builds(gpu)],
        "smoke": [[driver, info, step("cpu", ""), *map(step, ENGINES)]],
        "tune": [[tune]],
        "test": [tests if gpu else [collect, *tests]],
        "bench": [*([decisive(suite)] for suite in DECISIVE), [Command("bench", standard, 210)], [report]],
        "ncu": [[profile(*row)] for row in PROFILES.items()],
        "sanitize": [[sanitize(kind) for kind in ("memcheck", "racecheck", "initcheck", "synccheck")]],
        "gate": [[test(f"gate-{e}-{d}", f"{GATE} and {e} and {w}", 150) for e in ENGINES for d, w in DTYPES.items()]],
    }
    # Without a GPU there are two cores to build with, and little else is done.
    limits = (110, 30, 90, 90, 140, 60, 240, 150) if gpu else (150, 20, 45, 20, 45, 1, 1, 1)
    return [Part(name, stages[name], seconds) for name, seconds in zip(PARTS, limits, strict=True)]


def builds(gpu: bool) -> list[Command]:
    """What builds the engines; of all rules in the checkout where they are to be run, else less in a folder."""
    build, no_cuda = [sys.executable, "setup.py", "build_ext"], {"FUSEDOPT_CUDA": "0"}
    if gpu:
        build.append("--inplace")
        return [Command("build", build, 110, environment=no_cuda), Command("build-cuda", build, 150)]
    build += ["--build-lib", str(DRY), "--build-temp", str(DRY / "temp")]
    one_rule = [sys.executable, "-c", ONE_RULE, str(DRY / "fusedopt")]
    return [
        Command("build", build, 110, "the host and one build of the CPU engine", environment=no_cuda | ONE_LEVEL),
        Command("build-cuda", one_rule, 75, "the CUDA engine with AdamW's kernels alone", optional=True),
    ]


def tool(name: str) -> tuple[str, str]:
    """A program of CUDA, and why it cannot be run; empty if it can."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    return found or name, "" if found else f"no {name} in PATH or /usr/local/cuda/bin"
