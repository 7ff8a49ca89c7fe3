"""How kernels find their way: the tables, a program's share of the tiles, and the tiles of a row.

``rows``: int64, for every row NUMEL, KIND, LAYOUT (where its strides begin), GROUP, the parameter's address, those of
its states, and those of its scalars; bit 0 of a scalar's address is set when it is a double, not a float.
``tiles``: int64, for every row the number of tiles before it; at the end, of all.
``shares``: int64, for every program the first of its tiles, and the row that tile is in; at the end, the number of
tiles and the last row.
``live``: int64, what changes from step to step: MAX_NORM, MEASURED, SKIP; for every row the gradient's address, plus
one if the row's states are new, or 0 without a gradient (2 stands for no address); and for every group, as pairs of a
double and the address of a tensor that has it instead (0: none; bit 0: it is a double): lr, weight decay, the rule's
hyperparameters; then, without addresses, whether decay is decoupled, and the sign.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.variants import compute, element, n_states

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

NUMEL = tl.constexpr(0)
KIND = tl.constexpr(1)
LAYOUT = tl.constexpr(2)
GROUP = tl.constexpr(3)
ADDRESSES = tl.constexpr(4)

MAX_NORM = tl.constexpr(0)
MEASURED = tl.constexpr(1)
SKIP = tl.constexpr(2)
HEADER = tl.constexpr(3)


@triton.jit
def share(shares):
    """This program's tiles [begin, end), the row of the first, and a row not before the last."""
    mine = shares + 2 * tl.program_id(0)
    return word(mine), word(mine + 2), word(mine + 1), word(mine + 3)


@triton.jit
def word(pointer):
    """A row or tile number: there are fewer than 2^31 of either."""
    return tl.load(pointer).to(tl.int32)


@triton.jit
def cohort_of(rows, row, live, mask, WIDTH: tl.constexpr):
    """A number that rows share whose hyperparameters are the same: twice the group, plus one if states are new.

    It is -1 for rows without a gradient.
    """
    given = tl.load(live + HEADER + row, mask=mask, other=0)
    group = tl.load(rows + row * WIDTH + GROUP, mask=mask, other=0)
    return tl.where(given != 0, 2 * group + (given & 1), -1).to(tl.int32)


@triton.jit
def load_number(address, mask):
    """The number at an address, whose bit 0 says whether it is a double or a float."""
    wide = mask & ((address & 1) != 0)
    narrow = mask & ((address & 1) == 0)
    double = tl.load((address & ~1).to(tl.pointer_type(tl.float64)), mask=wide, other=0.0)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=narrow, other=0.0)
    return tl.where(wide, double, single.to(tl.float64))


@triton.jit
def load_scalars(rows, row, mask, FIRST: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """The scalars of a row, or of a block of rows."""
    out = ()
    for k in tl.static_range(N):
        address = tl.load(rows + row.to(tl.int64) * WIDTH + FIRST + k, mask=mask, other=0)
        out = out + (load_number(address, mask),)
    return out


@triton.jit
def store_scalars(rows, row, mask, scalars, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Puts them back."""
    for k in tl.static_range(len(scalars)):
        address = tl.load(rows + row.to(tl.int64) * WIDTH + FIRST + k, mask=mask, other=0)
        wide = mask & ((address & 1) != 0)
        narrow = mask & ((address & 1) == 0)
        tl.store((address & ~1).to(tl.pointer_type(tl.float64)), scalars[k], mask=wide)
        tl.store(address.to(tl.pointer_type(tl.float32)), scalars[k].to(tl.float32), mask=narrow)


@triton.jit
def load_hyper(group, mask, FIRST: tl.constexpr, N: tl.constexpr):
    """N hyperparameters of a group from number FIRST on; ``group`` points to its record, or is a block of them."""
    out = ()
    for k in tl.static_range(N):
        value = tl.load(group + 2 * (FIRST + k), mask=mask, other=0).to(tl.float64, bitcast=True)
        source = tl.load(group + 2 * (FIRST + k) + 1, mask=mask, other=0)
        given = mask & (source != 0)
        out = out + (tl.where(given, load_number(source, given), value),)
    return out


@triton.jit
def advance(scalars):
    """The scalars with ``step``, which is first, one further."""
    out = ()
    for k in tl.static_range(len(scalars)):
        out = out + ((scalars[k] + 1 if k == 0 else scalars[k]),)
    return out


@triton.jit
def to_type(values, T: tl.constexpr):
    """A tuple with every value converted."""
    out = ()
    for k in tl.static_range(len(values)):
        out = out + (values[k].to(T),)
    return out


@triton.jit
def operands(rows, row, gradient, KINDS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """The addresses of a row's operands."""
    out = (tl.load(rows + row * WIDTH + ADDRESSES), gradient)
    for k in tl.static_range(n_states(KINDS, K)):
        out = out + (tl.load(rows + row * WIDTH + ADDRESSES + 1 + k),)
    return out


@triton.jit
def aligned(addresses):
    """Whether all addresses are multiples of 16."""
    bits = addresses[0]
    for k in tl.static_range(1, len(addresses)):
        bits = bits | addresses[k]
    return (bits & 15) == 0


@triton.jit
def place(rows, row, layouts, index, KINDS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets of elements in each operand of a strided row: index, in the parameter's order, by shape and strides.

    A layout is the number of dimensions, and for each, innermost first, its size and every operand's stride.
    """
    base = layouts + tl.load(rows + row * WIDTH + LAYOUT)
    n_dims = tl.load(base)
    rest = index
    n_operands: tl.constexpr = 2 + n_states(KINDS, K)
    out = ()
    for _ in tl.static_range(n_operands):
        out = out + (tl.zeros_like(index),)
    for d in range(n_dims):
        dim = base + 1 + d * (1 + n_operands)
        size = tl.load(dim)
        here = rest % size
        rest = rest // size
        out = _moved(out, dim, here)
    return out


@triton.jit
def _moved(offsets, dim, here):
    out = ()
    for k in tl.static_range(len(offsets)):
        out = out + (offsets[k] + here * tl.load(dim + 1 + k),)
    return out


@triton.jit
def read(
    address, start, offsets, mask, KINDS: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr, FULL: tl.constexpr
):
    """A block of an operand, in the compute type. A full block is aligned and needs no mask."""
    pointer = address.to(tl.pointer_type(element(KINDS, K, OPERAND)))
    if FULL:
        return tl.load(tl.multiple_of(pointer, 16) + start + offsets).to(compute(KINDS, K))
    else:
        return tl.load(pointer + start + offsets, mask=mask, other=0.0).to(compute(KINDS, K))


@triton.jit
def rounded(value, T: tl.constexpr):
    """The value in type T, rounded to the nearest, ties to even."""
    if INTERPRETED and T == tl.bfloat16:  # the interpreter cuts it off
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        bits = tl.where(value == value, up, bits | 0x400000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(T)


@triton.jit
def write(
    address, start, offsets, mask, value, KINDS: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Rounds a block into an operand."""
    pointer = address.to(tl.pointer_type(element(KINDS, K, OPERAND)))
    if FULL:
        tl.store(tl.multiple_of(pointer, 16) + start + offsets, rounded(value, element(KINDS, K, OPERAND)))
    else:
        tl.store(pointer + start + offsets, rounded(value, element(KINDS, K, OPERAND)), mask=mask)


@triton.jit
def is_last(counter):
    """Whether all other programs of this launch are done; every program asks once. Resets the counter."""
    tl.debug_barrier()  # all threads of this program have read what the last program is going to change
    last = tl.atomic_add(counter, 1) == tl.num_programs(0) - 1
    if last:
        tl.store(counter, 0)
    return last
