"""The CUDA engine: launches that fail, on host threads, and its machine code; its numbers are in test_tiles.py."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builds import setup
from conftest import AVAILABLE
from helpers import RULES, fill_gradients, params

import fusedopt
from fusedopt.bench.variants import EXTENSION, VARIANTS, build
from fusedopt.engines import cuda
from fusedopt.inspection import cuda as inspection

on_threads = pytest.mark.skipif("cuda" not in AVAILABLE, reason="needs a C++ compiler, and no GPU")


@on_threads
def test_nothing_beyond_a_row_is_asked_for_ahead():
    """Rows that end where memory does. Host threads read what a GPU is asked to bring to its cache, and would crash."""
    program = f"""
import ctypes, mmap, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest, torch, fusedopt
protect = ctypes.CDLL(None).mprotect
def at_the_end(n, dtype):
    pages = mmap.mmap(-1, 5 * mmap.PAGESIZE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    last = whole.data_ptr() + 4 * mmap.PAGESIZE
    assert protect(ctypes.c_void_p(last), mmap.PAGESIZE, 0) == 0
    return whole[: 4 * mmap.PAGESIZE].view(dtype)[-n:]
for dtype in (torch.float32, torch.bfloat16):
    for n in (1, 8, 52, 256, 260, 2100):
        p = torch.nn.Parameter(at_the_end(n, dtype).normal_())
        p.grad = at_the_end(n, dtype).fill_(1.0)
        optimizer = fusedopt.AdamW([p], engine="cuda", max_grad_norm=1.0)
        for _ in range(2):
            optimizer.step()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, (run.returncode, run.stderr)


@on_threads
def test_a_failed_launch_is_an_error_with_its_name_and_changes_nothing():
    ps = params((5,))
    optimizer = fusedopt.AdamW(ps, engine="cuda")
    fill_gradients(ps)
    optimizer.step()
    before = ps[0].detach().clone()
    cuda.load().fail_next_launch()
    with pytest.raises(RuntimeError, match="cudaLaunchKernelEx failed: cudaErrorLaunchFailure"):
        optimizer.step()
    assert torch.equal(ps[0], before) and optimizer.state[ps[0]]["step"] == 1
    optimizer.step()
    assert optimizer.state[ps[0]]["step"] == 2


@on_threads
def test_two_launches_where_one_does_not_fit():
    results = []
    for refused in (False, True):
        torch.manual_seed(0)
        ps = params((700,), (3, 100))
        optimizer = fusedopt.AdamW(ps, engine="cuda", max_grad_norm=1.0)
        for t in range(3):
            torch.manual_seed(t)
            fill_gradients(ps)
            if refused and t == 1:
                cuda.load().refuse_next_cooperative_launch()
            optimizer.step()
        (plan,) = optimizer._plans
        assert plan._launcher.in_one_launch is not refused
        results.append([*(p.detach() for p in ps), optimizer.grad_norm, optimizer.state[ps[0]]["step"]])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- the built extension

# One for each variant of a rule, one for all where there are several; with both sizes of arguments, and with options.
ASKED = [rule.stem for rule in setup.asked_rules()]
N_VARIANTS = [len(RULES[name].variants()) for name in ASKED if name != "swats"]  # which nvcc does not get
N_KERNELS = 3 * sum(n + (n > 1) for n in N_VARIANTS)
built = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")


@built
def test_imports_without_a_gpu_and_says_so():
    program = (
        "import fusedopt._cuda as extension; print(extension.no_device());"
        "from fusedopt.engines import cuda; print(cuda.available())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if not torch.cuda.is_available():
        assert run.stdout.splitlines()[0].startswith("no device") and "no device" in run.stdout.splitlines()[1]


@built
@pytest.mark.parametrize("arch", ["90", *(pytest.param(a, marks=pytest.mark.nightly) for a in ("80", "100"))])
def test_machine_code_is_wide_and_spills_nothing(arch, tmp_path):
    file = tmp_path / "inspect.json"
    command = [sys.executable, "-m", "fusedopt", "inspect", "--engine", "cuda", "--arch", arch, "--json", str(file)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    kernels = json.loads(file.read_text())["kernels"]
    assert len(kernels) == N_KERNELS
    for k in kernels:
        has_options = k["name"].endswith(" options")
        if has_options and k["name"].count("<") > 1:
            assert k["spills"] <= 48, k  # what calls save; its loops are too long to be told
            continue
        assert k["spills"] == 0 and k["loads_128"] >= 4 and k["stores_128"] >= 2, k
        # Of a row, by which is drawn, and of a state its scale, in one pass or two.
        n_states = n_operands(k["name"]) - 2
        words = (4 + 3 * n_states) * (1 + bool(RULES[rule_of(k["name"])].measures)) if has_options else 0
        assert k["loads_other"] <= words and k["stores_other"] <= n_states * has_options, k
        assert k["norm_loads_in_flight"] >= 8, k
        assert k["scalar_loads_in_flight"] >= CHOICES["MASKED_ELEMENTS"] * n_operands(k["name"]), k


POLICY = Path(__file__).parent.parent / "csrc" / "cuda" / "policy.h"
CHOICES = {name: int(value) for name, value in re.findall(r"#define FUSEDOPT_(\w+) (\d+)", POLICY.read_text())}


def rule_of(kernel):
    """The name of a kernel's rule."""
    return re.match(r"\w+", kernel)[0].lower()


def n_operands(kernel):
    """Of the largest variant that a kernel steps; each switch that is on adds a state."""
    found = re.findall(r"(\w+)(?:<([\w, ]+)>)?", kernel.removesuffix(" large").removesuffix(" options"))
    always = {name: sum(not state.when for state in rule.states) for name, rule in RULES.items()}
    return max(2 + always[struct.lower()] + arguments.count("true") for struct, arguments in found)


@built
@pytest.mark.nightly
def test_fewer_loads_in_flight_are_seen(monkeypatch):
    """The machine code of builds that read one tile, and one element, at a time."""
    chosen = [v for v in VARIANTS if str(v) in ("cuda norm-tiles-1", "cuda masked-elements-1")]
    assert set(build(chosen, "90").values()) == {None}
    found = []
    for variant in chosen:
        monkeypatch.setattr(inspection, "_extension", lambda variant=variant: str(variant.folder / EXTENSION))
        small, *_ = inspection.inspect({"adam"}, "90")
        found.append((small.norm_loads_in_flight, small.scalar_loads_in_flight))
    (norm, _), (_, scalar) = found
    assert norm < 8 and scalar < CHOICES["MASKED_ELEMENTS"] * 4
