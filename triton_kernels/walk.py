"""How programs find their way: the shares that a program works on, their rows, and what the tables say of them.

The tables are described in fusedopt/layout.py.
"""

import triton
import triton.language as tl

from fusedopt.layout import ADDRESSES as _ADDRESSES
from fusedopt.layout import NEW_AVERAGE as _NEW_AVERAGE
from fusedopt.layout import NEW_STATE as _NEW_STATE
from fusedopt.layout import RowWord, StatusCount, StepWord, SumsWord

ADDRESSES = tl.constexpr(_ADDRESSES)
NEW_STATE = tl.constexpr(_NEW_STATE)
NEW_AVERAGE = tl.constexpr(_NEW_AVERAGE)
NUMEL, SIGNATURE, LAYOUT, GROUP, COUNTER, DRAW, FIRST_ELEMENT, SLICE, OPERAND_ADDRESSES = (
    tl.constexpr(int(word)) for word in RowWord
)
MAX_NORM, MEASURED, SKIP_NONFINITE, GRADS = (tl.constexpr(int(word)) for word in StepWord)
DONE, SKIPPED_STEPS, SKIPPED, SHARES_MEASURED, SHARES_UPDATED, SHARES_SUMMED = (
    tl.constexpr(int(word)) for word in StatusCount
)


FIRST_SEGMENT, SEGMENT_LENGTH, SCOPE, FIRST_SHARE, LAST_SHARE = (tl.constexpr(int(word)) for word in SumsWord)
SUMS_WIDTH = tl.constexpr(len(SumsWord))


@triton.jit
def load_i32(pointer):
    """A row or tile number: there are fewer than 2^31 of either."""
    return tl.load(pointer).to(tl.int32)


@triton.jit
def claim(n_shares, claims):
    """The number of a share that no program has claimed, after each has had one."""
    programs = tl.num_programs(0)
    claimed = programs
    if n_shares > programs:
        claimed = programs + tl.atomic_add(claims, 1)
    return claimed


@triton.jit
def share_of(shares, number):
    """A share's tiles [begin, end), the row of the first, and a row not before the last."""
    words = shares + 2 * number
    return load_i32(words), load_i32(words + 2), load_i32(words + 1), load_i32(words + 3)


@triton.jit
def segment(tiles, row, begin, end):
    """Those of a row's tiles that are among [begin, end), counted from its first: [low, high), or none."""
    first = load_i32(tiles + row)
    low = tl.maximum(first, begin)
    return low - first, tl.maximum(tl.minimum(load_i32(tiles + row + 1), end), low) - first


@triton.jit
def row_of(rows, step_table, row, WIDTH: tl.constexpr):
    """A row's words, the address of its gradient (0: none), and its signature."""
    words = rows + row * WIDTH
    return words, tl.load(step_table + GRADS + row) & ~(NEW_STATE | NEW_AVERAGE), load_i32(words + SIGNATURE)


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
def store_scalar(rows, row, mask, value, PLACE: tl.constexpr, WIDTH: tl.constexpr):
    """Puts a scalar, whose address is word PLACE, back into a row, or into each of a block of rows."""
    address = tl.load(rows + row.to(tl.int64) * WIDTH + PLACE, mask=mask, other=0)
    wide = mask & ((address & 1) != 0)
    narrow = mask & ((address & 1) == 0)
    tl.store((address & ~1).to(tl.pointer_type(tl.float64)), value, mask=wide)
    tl.store(address.to(tl.pointer_type(tl.float32)), value.to(tl.float32), mask=narrow)


@triton.jit
def store_scalars(rows, row, mask, scalars, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Puts all of them back."""
    for k in tl.static_range(len(scalars)):
        store_scalar(rows, row, mask, scalars[k], FIRST + k, WIDTH)


@triton.jit
def load_hyper(record, mask, FIRST: tl.constexpr, N: tl.constexpr):
    """N hyperparameters of a group from number FIRST on; ``record`` points to its record, or is a block of them."""
    out = ()
    for k in tl.static_range(N):
        value = tl.load(record + 2 * (FIRST + k), mask=mask, other=0).to(tl.float64, bitcast=True)
        source = tl.load(record + 2 * (FIRST + k) + 1, mask=mask, other=0)
        is_given = mask & (source != 0)
        out = out + (tl.where(is_given, load_number(source, is_given), value),)
    return out


@triton.jit
def to_type(values, T: tl.constexpr):
    """A tuple with every value converted."""
    out = ()
    for k in tl.static_range(len(values)):
        out = out + (values[k].to(T),)
    return out


@triton.jit
def is_last(counts):
    """Whether all other programs of this launch are done; every program asks once. Resets what counts progress."""
    tl.debug_barrier()  # all threads of this program have read what the last program is going to change
    last = tl.atomic_add(counts + DONE, 1) == tl.num_programs(0) - 1
    if last:
        tl.store(counts + DONE, 0)
        tl.store(counts + SHARES_MEASURED, 0)
        tl.store(counts + SHARES_UPDATED, 0)
        tl.store(counts + SHARES_SUMMED, 0)
    return last
