"""How many blocks of a kernel a processor of an NVIDIA GPU holds at once, by the rules of CUDA's cuda_occupancy.h."""

from __future__ import annotations

from typing import Protocol

WARP = 32
REGISTERS = 65536  # of a processor, from compute capability 7.0 to 12.1
QUARTERS = 4  # of a processor, each with its own registers and warps
REGISTERS_AT_A_TIME = 256  # for a warp
MAX_BLOCKS = {(7, 5): 16, (8, 0): 32, (8, 9): 24, (10, 1): 24}  # of some compute capabilities, else by the first number
MAX_BLOCKS_OF_MAJOR = {7: 32, 8: 16, 9: 32, 10: 32, 11: 24, 12: 24}
SHARED_AT_A_TIME = {7: 256}  # by the first number, else 128
SHARED_OF_SYSTEM = 1024  # of each block, from compute capability 8.0 on


class Properties(Protocol):
    """What torch.cuda.get_device_properties tells, as far as it is used here."""

    major: int
    minor: int
    regs_per_multiprocessor: int
    shared_memory_per_multiprocessor: int
    max_threads_per_multi_processor: int


def resident_blocks(registers: int, warps: int, shared: int, device: Properties) -> int:
    """How many blocks are resident at once.

    Args:
        registers: Of a thread.
        warps: Of a block.
        shared: Bytes of shared memory of a block.
        device: As torch.cuda.get_device_properties describes it.

    Raises:
        ValueError: For a device that the rules do not know.
    """
    major, minor = device.major, device.minor
    most = MAX_BLOCKS.get((major, minor), MAX_BLOCKS_OF_MAJOR.get(major))
    if most is None:
        raise ValueError(f"no rules are known for compute capability {major}.{minor}")
    of_warp = _rounded(registers * WARP, REGISTERS_AT_A_TIME)
    by_registers = REGISTERS // QUARTERS // of_warp * QUARTERS // warps
    by_warps = device.max_threads_per_multi_processor // WARP // warps
    system = SHARED_OF_SYSTEM if major >= 8 else 0
    of_block = _rounded(shared + system, SHARED_AT_A_TIME.get(major, 128))
    by_shared = device.shared_memory_per_multiprocessor // of_block if of_block else most
    return min(most, by_registers, by_warps, by_shared)


def _rounded(amount: int, unit: int) -> int:
    return -(-amount // unit) * unit
