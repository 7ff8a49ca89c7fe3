"""The unit of work: a block of a row's elements, fetched in the compute type, and put back."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.signatures import compute, draws, element, is_strided, itemsize, n_operands
from fusedopt.triton_kernels.walk import ADDRESSES, LAYOUT, NUMEL, OPERAND_ADDRESSES, SEGMENT_LENGTH, SUMS_WIDTH

# What is not a full, aligned tile goes in parts: fewer registers, and small tensors fill a part better.
PARTS = tl.constexpr(4)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def locate(words, layouts, origin, start, numel, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """Where SIZE elements are, from ``start`` on of the ``numel`` that follow a row's first ``origin``.

    Returns a base, their offsets from it in each operand, and of strided ones in the logical index where noise is
    drawn, and a mask. The addresses of dense operands are where the ``numel`` begin.
    """
    lanes = tl.arange(0, SIZE)
    mask = start + lanes < numel
    N: tl.constexpr = n_operands(SIGNATURES, K) + draws(SIGNATURES, K)
    offsets = ()
    if is_strided(SIGNATURES, K):
        layout = layouts + tl.load(words + LAYOUT)
        rest = origin + start + lanes
        for _ in tl.static_range(N):
            offsets = offsets + (tl.zeros_like(rest),)
        n_dims, width = tl.load(layout), tl.load(layout + 1)
        for d in range(n_dims):
            dim = layout + 2 + d * width
            size = tl.load(dim)
            offsets = _moved(offsets, dim, rest % size)
            rest = rest // size
        return start * 0, offsets, mask
    else:
        for _ in tl.static_range(N):
            offsets = offsets + (lanes,)
        return start, offsets, mask


@triton.jit
def _moved(offsets, dim, here):
    out = ()
    for k in tl.static_range(len(offsets)):
        out = out + (offsets[k] + here * tl.load(dim + 1 + k),)
    return out


@triton.jit
def fetch(
    address, at, SIGNATURES: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """A block of an operand, in the compute type. A full block is aligned and needs no mask."""
    start, offsets, mask = at
    pointer = address.to(tl.pointer_type(element(SIGNATURES, K, OPERAND)))
    if FULL:
        return tl.load(tl.multiple_of(pointer, 16) + start + offsets[OPERAND]).to(compute(SIGNATURES, K))
    else:
        return tl.load(pointer + start + offsets[OPERAND], mask=mask, other=0.0).to(compute(SIGNATURES, K))


@triton.jit
def put(
    address, at, value, SIGNATURES: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Rounds a block into an operand."""
    start, offsets, mask = at
    pointer = address.to(tl.pointer_type(element(SIGNATURES, K, OPERAND)))
    value = rounded(value, element(SIGNATURES, K, OPERAND))
    if FULL:
        tl.store(tl.multiple_of(pointer, 16) + start + offsets[OPERAND], value)
    else:
        tl.store(pointer + start + offsets[OPERAND], value, mask=mask)


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
def whole_tiles(addresses, begin, end, numel, SIGNATURES: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """The end of those of a row's tiles [begin, end) that are full and aligned in all operands."""
    if is_strided(SIGNATURES, K):
        return begin
    else:
        bits = addresses[0]
        for k in tl.static_range(1, len(addresses)):
            bits = bits | addresses[k]
        full = tl.maximum(tl.minimum(end, (numel // TILE).to(tl.int32)), begin)
        return tl.where((bits & 15) == 0, full, begin)


@triton.jit
def addresses_of(words, grad, SIGNATURES: tl.constexpr, K: tl.constexpr):
    """Where a row's operands begin."""
    addresses = (tl.load(words + OPERAND_ADDRESSES), grad)
    for k in tl.static_range(n_operands(SIGNATURES, K) - 2):
        addresses = addresses + (tl.load(words + OPERAND_ADDRESSES + ADDRESSES * (1 + k)),)
    return addresses


@triton.jit
def moved(addresses, origin, SIGNATURES: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr):
    """The addresses of element ``origin`` of operands from number FIRST on; those of strided ones stay."""
    if is_strided(SIGNATURES, K):
        return addresses
    else:
        out = ()
        for k in tl.static_range(len(addresses)):
            out = out + (addresses[k] + origin * itemsize(SIGNATURES, K, FIRST + k),)
        return out


@triton.jit
def whole_row(words, layouts, grad, SIGNATURES: tl.constexpr, K: tl.constexpr):
    """A row as the one segment that it has; see :func:`segment_of`."""
    numel = tl.load(words + NUMEL)
    return words, layouts, 0, numel, addresses_of(words, grad, SIGNATURES, K)


@triton.jit
def segments_of(row_sums, row, begin, end, TILE: tl.constexpr):
    """Those of a row's segments that have tiles in [begin, end): [low, high); the tiles of each, and its elements."""
    length = tl.load(row_sums + row * SUMS_WIDTH + SEGMENT_LENGTH)
    each = tl.cdiv(length, TILE).to(tl.int32)
    return begin // each, tl.cdiv(end, each), each, length


@triton.jit
def segment_of(words, layouts, addresses, number, length, SIGNATURES: tl.constexpr, K: tl.constexpr):
    """One of a row's segments: words, layouts, elements before it in the row, its own, and where its operands begin."""
    origin = tl.cast(number, tl.int64) * length
    return words, layouts, origin, length, moved(addresses, origin, SIGNATURES, K, 0)


@triton.jit
def tiles_of(number, each, begin, end):
    """Those of a segment's tiles that are among a row's [begin, end), counted from its first."""
    first = number * each
    return tl.maximum(begin, first) - first, tl.minimum(end, first + each) - first
