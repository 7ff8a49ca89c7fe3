"""What a kernel is specialised to: for every kind of row that a plan has, the types of its operands.

A kind is a string such as ``dense param=bf16 grad=bf16 exp_avg=fp32 exp_avg_sq=fp32``; kinds are joined by
semicolons; none is an empty string. One kernel serves all of them; a plan of one kind has no branch.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def count(kinds):
    """How many kinds there are."""
    return len(kinds.split(";")) if kinds else 0


@triton.constexpr_function
def is_strided(kinds, k):
    """Whether the operands of kind k are walked by strides."""
    return kinds.split(";")[k].split(" ")[0] == "strided"


@triton.constexpr_function
def element(kinds, k, operand):
    """The element type of an operand of kind k: 0 the parameter, 1 the gradient, then the states."""
    return tl.dtype(kinds.split(";")[k].split(" ")[1 + operand].split("=")[1])


@triton.constexpr_function
def compute(kinds, k):
    """The type that kind k computes in."""
    return tl.float64 if " param=fp64 " in kinds.split(";")[k] + " " else tl.float32


@triton.constexpr_function
def widest(kinds):
    """The widest type that any kind computes in."""
    return tl.float64 if " param=fp64 " in kinds else tl.float32


@triton.constexpr_function
def states(kinds, k):
    """The names of the states of kind k, joined by commas."""
    return ",".join(operand.split("=")[0] for operand in kinds.split(";")[k].split(" ")[3:])


@triton.constexpr_function
def n_states(kinds, k):
    """How many states kind k has."""
    return len(kinds.split(";")[k].split(" ")) - 3


@triton.constexpr_function
def has(names, name):
    """Whether a state is among the names."""
    return name in names.split(",")


@triton.constexpr_function
def index(names, name):
    """Where a state stands among the names."""
    return names.split(",").index(name)
