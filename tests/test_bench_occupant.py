"""A kernel beside the step that is timed: it is under way before, outlasts it, and leaves its processors no room."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fusedopt.bench import suites, timing, tune

REGISTERS_OF_A_PROCESSOR = 65_536

COMPILE = """
import sys, triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fusedopt.bench import occupant
from fusedopt.inspection.code import of_cubin

for arch in (80, 90, 100):
    source = ASTSource(occupant.occupy, {"unused": "*i32", "nanoseconds": "i32"}, constexprs={})
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=occupant.OPTIONS)
    found = of_cubin("occupy", f"sm_{arch}", kernel.asm["cubin"], knobs.nvidia.cuobjdump.path)
    print(found.registers, found.spills, kernel.metadata.num_warps, kernel.metadata.shared)
"""


@pytest.mark.filterwarnings("ignore")
def test_one_program_takes_all_registers_of_a_processor():
    pytest.importorskip("triton")
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=compiling)
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        registers, spills, warps, _ = map(int, line.split())
        # Registers come in eights.
        assert -(-registers // 8) * 8 * 32 * warps == REGISTERS_OF_A_PROCESSOR and not spills
    assert run.stdout.count("\n") == 3


def test_it_is_there_before_the_step_and_over_before_the_next(monkeypatch):
    done = []

    def say(what):
        return lambda *_: done.append(what)

    watch = timing.Stopwatch(
        torch.device("cpu"),
        "warm",
        hold=5,
        beside=SimpleNamespace(start=say("occupy"), wait=say("free")),
    )
    event = SimpleNamespace(record=say("event"), synchronize=say("wait"), elapsed_time=lambda last: 2.0)
    monkeypatch.setattr(watch, "_gpu", SimpleNamespace(Event=lambda enable_timing: event))
    monkeypatch.setattr(torch.cuda, "_sleep", say("hold"))
    monkeypatch.setattr(timing, "WARM_STEPS", 0)
    assert watch(say("step")) == 2e-3
    assert done == ["occupy", "hold", "event", "step", "event", "wait", "free"]


@pytest.mark.parametrize("case", tune.WORKLOADS, ids=lambda case: case.name)
def test_it_is_beside_the_workloads_that_say_so(case, monkeypatch):
    class Found(Exception):
        pass

    def stopwatch(device, cache, renew=None, hold=0, beside=None):
        raise Found(hold, beside)

    monkeypatch.setattr(suites, "find", lambda name, find=suites.find: find("20x5"))
    monkeypatch.setattr(tune, "_beside", lambda: "beside")
    monkeypatch.setattr(timing, "Stopwatch", stopwatch)
    with pytest.raises(Found) as found:
        tune.raced(case, [], 1, "cpu")
    hold, beside = found.value.args
    assert hold == tune.HOLD + 20 * tune.HOLD_TENSOR
    assert beside == ("beside" if "16 SMs" in case.name else None)


def test_it_outlasts_the_hold_and_a_slow_step():
    pytest.importorskip("triton")
    from fusedopt.bench import occupant

    tensors = len(suites.find("gpt2").shapes)
    held = (tune.HOLD + tensors * tune.HOLD_TENSOR) / 1e9  # at 1 GHz, which no GPU that this is for goes below
    assert occupant.SECONDS > held + 2 * 28 * suites.find("gpt2").numel / 3e12
    assert occupant.PROCESSORS == 16
