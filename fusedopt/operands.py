"""How the operands of a step are stored.

An operand has a role (the parameter, its gradient, a state of the rule) and a codec, which says how its elements become
values of the compute type, and values elements. The list of a row's codecs is its signature: kernels are specialised to
signatures, and know roles by their order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Codec:
    """A way to store an operand.

    Attributes:
        name: As engines call it.
        dtypes: Of the real tensor at each of its addresses, of which layout.ADDRESSES are the most.
        block: How many elements are encoded together, at most 256, which lie inside slices of dimension 0.
        draws: Whether random bits round it.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]
    block: int = 1
    draws: bool = False


FP32 = Codec("fp32", (torch.float32,))
FP64 = Codec("fp64", (torch.float64,))
BF16 = Codec("bf16", (torch.bfloat16,))
FP16 = Codec("fp16", (torch.float16,))

# The value, rounded to nearest. In the order of DType in csrc/core/operands.h.
PLAIN = (FP32, FP64, BF16, FP16)

BLOCK = 256  # elements that have a scale in common
STOCHASTIC = Codec("stochastic", (torch.bfloat16,), draws=True)
SPLIT = Codec("split", (torch.bfloat16, torch.bfloat16))
MASTER_BF16 = Codec("master_bf16", (torch.bfloat16, torch.float32))
MASTER_FP16 = Codec("master_fp16", (torch.float16, torch.float32))
Q8_SIGNED = Codec("q8_signed", (torch.uint8, torch.float32), block=BLOCK)
Q8_UNSIGNED = Codec("q8_unsigned", (torch.uint8, torch.float32), block=BLOCK)

# In the order of Codec in csrc/core/operands.h. fusedopt/codecs.py says what each is.
CODECS = (*PLAIN, STOCHASTIC, SPLIT, MASTER_BF16, MASTER_FP16, Q8_SIGNED, Q8_UNSIGNED)

# What each role may be stored as, as a tensor of its name. An exact state keeps what float32 can hold.
LEGAL: dict[str, tuple[Codec, ...]] = {
    "param": PLAIN,
    "grad": PLAIN,
    "state": (*PLAIN, Q8_SIGNED),
    "exact state": (FP32, FP64),
}

AVERAGES = ("ema", "slow")  # states that are the engine's, not the rule's

# Complex numbers are pairs of real ones.
PARTS = {torch.complex64: torch.float32, torch.complex128: torch.float64, torch.complex32: torch.float16}

FLOATING = tuple(codec.dtypes[0] for codec in PLAIN)
COMPLEX = tuple(PARTS)

_BY_DTYPE = {codec.dtypes[0]: codec for codec in PLAIN}
_BY_NAME = {codec.name: codec for codec in CODECS}


def plain(dtype: torch.dtype) -> Codec | None:
    """The codec of a tensor that is an operand as it is; None if there is none."""
    return _BY_DTYPE.get(PARTS.get(dtype, dtype))


def named(name: str) -> Codec:
    """The codec of a name."""
    return _BY_NAME[name]


def illegal(role: str, dtype: torch.dtype) -> str | None:
    """Why an operand cannot be stored in a dtype, and what it may be; None if it can."""
    if PARTS.get(dtype, dtype) in (codec.dtypes[0] for codec in LEGAL[role]):
        return None
    return f"{dtype}; it may be {', '.join(str(c.dtypes[0]).removeprefix('torch.') for c in LEGAL[role])}"


@dataclass(frozen=True, slots=True)
class Operand:
    """An operand of a parameter's row, on this rank.

    Attributes:
        name: "param", "grad", or that of the state or average.
        codec: How it is stored.
        tensors: As many as the codec has addresses.
    """

    name: str
    codec: Codec
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Signature:
    """What kernels are specialised to.

    Attributes:
        is_strided: Whether some operand is not dense in the parameter's order.
        operands: (name, codec) of the parameter, the gradient, the states that the row has, and its average.
        draws: Whether its gradients get noise.
        is_padded: Whether its slices are no multiples of blocks, see fusedopt/layout.py; it is strided then.
    """

    is_strided: bool
    operands: tuple[tuple[str, Codec], ...]
    draws: bool = False
    is_padded: bool = False

    @classmethod
    def of(
        cls, is_strided: bool, operands: Iterable[Operand], draws: bool = False, is_padded: bool = False
    ) -> Signature:
        """That of a row's operands, which have passed the checks."""
        return cls(is_strided, tuple((operand.name, operand.codec) for operand in operands), draws, is_padded)

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the rule's states."""
        return tuple(name for name, _ in self.operands[2:] if name not in AVERAGES)

    @property
    def average(self) -> str:
        """The name of the average; empty if there is none."""
        return next((name for name, _ in self.operands if name in AVERAGES), "")

    @property
    def codecs(self) -> tuple[str, ...]:
        """The names of the codecs."""
        return tuple(codec.name for _, codec in self.operands)

    def __str__(self) -> str:
        operands = " ".join(f"{name}={codec.name}" for name, codec in self.operands)
        shape = "padded" if self.is_padded else "strided" if self.is_strided else "dense"
        return f"{shape}{'+noise' if self.draws else ''} {operands}"
