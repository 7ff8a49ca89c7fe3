"""How many programs the Triton engine launches: by NVIDIA's rules of what a processor holds."""

from types import SimpleNamespace

import pytest
import torch

from fusedopt.engines import triton
from fusedopt.engines.occupancy import resident_blocks

# Compute capability, threads and shared memory of a processor.
DEVICES = {
    "V100": (7, 0, 2048, 98304), "T4": (7, 5, 1024, 65536), "A100": (8, 0, 2048, 167936), "A10": (8, 6, 1536, 102400),
    "L4": (8, 9, 1536, 102400), "H100": (9, 0, 2048, 233472), "B200": (10, 0, 2048, 233472),
    "RTX 5090": (12, 0, 1536, 102400),
}  # fmt: skip
# Registers, warps and shared memory of a block.
KERNELS = [
    (32, 4, 0), (64, 4, 0), (72, 4, 128), (100, 4, 1024), (128, 4, 0), (168, 4, 0), (255, 8, 0), (40, 4, 40000),
    (24, 1, 0), (96, 2, 64), (128, 16, 0), (65, 3, 0), (100, 1, 0),
]  # fmt: skip
# What cudaOccMaxActiveBlocksPerMultiprocessor of CUDA 13.0's cuda_occupancy.h says of them.
RESIDENT = {
    "V100": [16, 8, 7, 4, 4, 3, 1, 2, 32, 10, 1, 9, 16],
    "T4": [8, 8, 7, 4, 4, 3, 1, 1, 16, 10, 1, 9, 16],
    "A100": [16, 8, 7, 4, 4, 3, 1, 4, 32, 10, 1, 9, 16],
    "A10": [12, 8, 7, 4, 4, 3, 1, 2, 16, 10, 1, 9, 16],
    "L4": [12, 8, 7, 4, 4, 3, 1, 2, 24, 10, 1, 9, 16],
    "H100": [16, 8, 7, 4, 4, 3, 1, 5, 32, 10, 1, 9, 16],
    "B200": [16, 8, 7, 4, 4, 3, 1, 5, 32, 10, 1, 9, 16],
    "RTX 5090": [12, 8, 7, 4, 4, 3, 1, 2, 24, 10, 1, 9, 16],
}


def properties(name, processors=1):
    major, minor, threads, shared = DEVICES[name]
    return SimpleNamespace(
        major=major, minor=minor, max_threads_per_multi_processor=threads, shared_memory_per_multiprocessor=shared,
        multi_processor_count=processors,
    )  # fmt: skip


@pytest.mark.parametrize("name", DEVICES)
def test_as_many_blocks_as_nvidia_says(name):
    assert [resident_blocks(*kernel, properties(name)) for kernel in KERNELS] == RESIDENT[name]


def test_unknown_devices_are_refused():
    device = properties("H100")
    device.major = 20
    with pytest.raises(ValueError, match=r"compute capability 20\.0"):
        resident_blocks(32, 4, 0, device)


class Compiled:
    """As Triton's CompiledKernel: of 168 registers, so that a processor of an H100 holds three of its programs."""

    metadata = SimpleNamespace(num_warps=4, shared=0)
    n_regs = 168

    def __init__(self, launches):
        self.launches = launches

    def _init_handles(self):
        pass

    def __getitem__(self, grid):
        return lambda *args: self.launches.append(("kept", grid, args))


class Function:
    """As Triton's JITFunction."""

    arg_names = ("a", "b", "WIDTH", "TILE")

    def __init__(self, fails=False):
        self.fails, self.launches, self.warmed = fails, [], 0

    def warmup(self, *args, grid, **kwargs):
        self.warmed += 1
        if self.fails:
            raise AttributeError("another version")
        return Compiled(self.launches)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((grid, args, kwargs))


@pytest.fixture
def kernel(monkeypatch):
    def make(function, most=10_000):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties("H100", 132))
        triton.processors.cache_clear()
        # In another order than the function's.
        constants = {"TILE": 1024, "WIDTH": 7}
        return triton.Kernel(function, constants, {"num_warps": 4}, 1056, most, torch.device("cuda:0"))

    yield make
    triton.processors.cache_clear()


LAST = {"TILE": 1024, "WIDTH": 7, "num_warps": 4}


@pytest.mark.parametrize(("most", "grid"), [(10_000, 3 * 132), (50, 50)])
def test_the_grid_is_what_the_registers_let(kernel, most, grid):
    function = Function()
    launch = kernel(function, most)
    launch(1, 2), launch(3, 4)
    assert function.warmed == 1 and function.launches == [((grid,), (1, 2), LAST), ((grid,), (3, 4), LAST)]


def test_a_fixed_number_where_it_cannot_be_asked(kernel, monkeypatch):
    function = Function(fails=True)
    kernel(function)(1, 2)
    monkeypatch.setattr(Compiled, "n_regs", None)
    kernel(function)(1, 2)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    on_hip = Function()
    kernel(on_hip)(1, 2)
    assert {grid for grid, *_ in function.launches + on_hip.launches} == {(1056,)} and not on_hip.warmed


def test_a_number_of_programs_that_was_set(kernel, monkeypatch):
    monkeypatch.setattr(triton, "PROGRAMS_PER_PROCESSOR", 16)
    function = Function()
    kernel(function)(1, 2)
    assert function.launches[0][0] == (1056,)


def test_a_kept_kernel_is_given_its_constants_where_they_stand(kernel, monkeypatch):
    """Triton's launchers take all arguments of the function in order, constexpr or not."""
    monkeypatch.setattr(triton, "KEEPS_KERNELS", True)
    function = Function()
    kernel(function)(1, 2)
    assert function.launches == [("kept", (396, 1, 1), (1, 2, 7, 1024))]
