"""What a kernel is specialised to: the signatures of a plan's rows.

Signatures are written as fusedopt.operands.Signature writes them, such as ``dense param=bf16 grad=bf16 exp_avg=fp32``,
and joined by semicolons; none is an empty string. One kernel serves all of them; a plan of one has no branch.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def count(signatures):
    """How many signatures there are."""
    return len(signatures.split(";")) if signatures else 0


@triton.constexpr_function
def is_strided(signatures, k):
    """Whether the operands of signature k are walked by strides."""
    return signatures.split(";")[k].split(" ")[0] == "strided"


@triton.constexpr_function
def element(signatures, k, operand):
    """The element type of an operand of signature k: 0 the parameter, 1 the gradient, then the states."""
    return tl.dtype(signatures.split(";")[k].split(" ")[1 + operand].split("=")[1])


@triton.constexpr_function
def compute(signatures, k):
    """The type that signature k computes in."""
    return tl.float64 if " param=fp64 " in signatures.split(";")[k] + " " else tl.float32


@triton.constexpr_function
def widest(signatures):
    """The widest type that any signature computes in."""
    return tl.float64 if " param=fp64 " in signatures else tl.float32


@triton.constexpr_function
def states(signatures, k):
    """The names of the states of signature k, joined by commas."""
    return ",".join(operand.split("=")[0] for operand in signatures.split(";")[k].split(" ")[3:])


@triton.constexpr_function
def n_states(signatures, k):
    """How many states signature k has."""
    return len(signatures.split(";")[k].split(" ")) - 3


@triton.constexpr_function
def has(names, name):
    """Whether a state is among the names."""
    return name in names.split(",")


@triton.constexpr_function
def index(names, name):
    """Where a state stands among the names."""
    return names.split(",").index(name)
