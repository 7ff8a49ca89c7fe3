"""The unit of work: a block of a row's elements, fetched in the compute type, and put back."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.codecs import (
    BLOCK,
    current_master,
    dequantized,
    joined,
    missing,
    quantized,
    rounded,
    rounded_by,
    visible,
    words_of,
)
from fusedopt.triton_kernels.signatures import (
    codec,
    compute,
    element,
    has_partner,
    is_padded,
    is_strided,
    itemsize,
    n_offsets,
    n_operands,
    partner,
    partner_offset,
    partner_size,
)
from fusedopt.triton_kernels.walk import ADDRESSES, LAYOUT, NUMEL, OPERAND_ADDRESSES, SEGMENT_LENGTH, SLICE, SUMS_WIDTH

# What is not a full, aligned tile goes in parts: fewer registers, and small tensors fill a part better.
PARTS = tl.constexpr(4)


@triton.jit
def locate(words, layouts, origin, start, numel, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """Where SIZE elements are, from ``start`` on of the ``numel`` that follow a row's first ``origin``.

    Returns a base; their offsets from it in each operand, in partners of its shape, and of strided ones in the logical
    index where anything is drawn; a mask; and the first place. The addresses of dense operands are where the ``numel``
    begin.
    """
    lanes = tl.arange(0, SIZE)
    N: tl.constexpr = n_offsets(SIGNATURES, K)
    offsets = ()
    mask = inside(words, start, numel, origin, SIGNATURES, K, SIZE)
    if is_strided(SIGNATURES, K):
        layout = layouts + tl.load(words + LAYOUT)
        rest = origin + start + lanes
        if is_padded(SIGNATURES, K):
            length = tl.load(words + SLICE)
            places = tl.cdiv(length, BLOCK) * BLOCK
            rest = rest // places * length + tl.minimum(rest % places, length - 1)
        for _ in tl.static_range(N):
            offsets = offsets + (tl.zeros_like(rest),)
        n_dims, width = tl.load(layout), tl.load(layout + 1)
        for d in range(n_dims):
            dim = layout + 2 + d * width
            size = tl.load(dim)
            offsets = _moved(offsets, dim, rest % size)
            rest = rest // size
        return start * 0, offsets, mask, origin + start
    else:
        for _ in tl.static_range(N):
            offsets = offsets + (lanes,)
        return start, offsets, mask, origin + start


@triton.jit
def inside(words, start, numel, origin, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """Which of SIZE places from ``start`` on have an element."""
    place = start + tl.arange(0, SIZE)
    mask = place < numel
    if is_padded(SIGNATURES, K):
        length = tl.load(words + SLICE)
        mask = mask & ((origin + place) % (tl.cdiv(length, BLOCK) * BLOCK) < length)
    return mask


@triton.jit
def _moved(offsets, dim, here):
    out = ()
    for k in tl.static_range(len(offsets)):
        out = out + (offsets[k] + here * tl.load(dim + 1 + k),)
    return out


@triton.jit
def load(address, base, offsets, mask, T: tl.constexpr, FULL: tl.constexpr):
    """A block of elements. A full block is aligned and needs no mask."""
    pointer = address.to(tl.pointer_type(T))
    if FULL:
        return tl.load(tl.multiple_of(pointer, 16) + base + offsets)
    else:
        return tl.load(pointer + base + offsets, mask=mask, other=0.0)


@triton.jit
def store(address, base, offsets, mask, value, FULL: tl.constexpr):
    """Puts a block of elements where it was loaded from."""
    pointer = address.to(tl.pointer_type(value.dtype))
    if FULL:
        tl.store(tl.multiple_of(pointer, 16) + base + offsets, value)
    else:
        tl.store(pointer + base + offsets, value, mask=mask)


@triton.jit
def _scales(address, at, SIZE: tl.constexpr):
    """Where the scales of SIZE places are, and which of them have elements."""
    blocks = tl.arange(0, SIZE // BLOCK)
    return address.to(tl.pointer_type(tl.float32)) + at[3] // BLOCK + blocks, tl.reshape(at[2], (SIZE // BLOCK, BLOCK))


@triton.jit
def fetch(
    addresses, at, SIGNATURES: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr, SIZE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """A block of an operand, in the compute type."""
    T: tl.constexpr = element(SIGNATURES, K, OPERAND)
    CODEC: tl.constexpr = codec(SIGNATURES, K, OPERAND)
    value = load(addresses[OPERAND], at[0], at[1][OPERAND], at[2], T, FULL)
    if has_partner(SIGNATURES, K, OPERAND):
        address = addresses[partner(SIGNATURES, K, OPERAND)]
        if CODEC == "q8_signed" or CODEC == "q8_unsigned":
            pointer, mask = _scales(address, at, SIZE)
            scales = tl.load(pointer, mask=tl.max(mask.to(tl.int32), axis=1) != 0, other=0.0)
            return dequantized(value, scales, CODEC, SIZE)
        else:
            offsets = at[1][partner_offset(SIGNATURES, K, OPERAND)]
            if CODEC == "split":
                return joined(value, load(address, at[0], offsets, at[2], tl.bfloat16, FULL))
            else:
                return current_master(value, load(address, at[0], offsets, at[2], tl.float32, FULL), T)
    else:
        return value.to(compute(SIGNATURES, K))


@triton.jit
def put(
    addresses, at, value, drawn, SIGNATURES: tl.constexpr, K: tl.constexpr, OPERAND: tl.constexpr, SIZE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Rounds a block into an operand, by words that are ``drawn`` where the codec asks for them."""
    T: tl.constexpr = element(SIGNATURES, K, OPERAND)
    CODEC: tl.constexpr = codec(SIGNATURES, K, OPERAND)
    address = addresses[OPERAND]
    if has_partner(SIGNATURES, K, OPERAND):
        other = addresses[partner(SIGNATURES, K, OPERAND)]
        if CODEC == "q8_signed" or CODEC == "q8_unsigned":
            codes, scales = quantized(value, at[2], CODEC, SIZE, FULL)
            store(address, at[0], at[1][OPERAND], at[2], codes, FULL)
            pointer, mask = _scales(other, at, SIZE)
            tl.store(pointer, scales, mask=tl.max(mask.to(tl.int32), axis=1) != 0)
        else:
            offsets = at[1][partner_offset(SIGNATURES, K, OPERAND)]
            store(address, at[0], at[1][OPERAND], at[2], visible(value, T), FULL)
            if CODEC == "split":
                store(other, at[0], offsets, at[2], missing(value), FULL)
            else:
                store(other, at[0], offsets, at[2], value, FULL)
    elif CODEC == "stochastic":
        words = words_of(drawn, OPERAND, at, SIGNATURES, K, SIZE)
        store(address, at[0], at[1][OPERAND], at[2], rounded_by(value, words), FULL)
    else:
        store(address, at[0], at[1][OPERAND], at[2], rounded(value, T), FULL)


@triton.jit
def whole_tiles(addresses, begin, end, numel, SIGNATURES: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr):
    """The end of those of a row's tiles [begin, end) that are full and aligned in all operands."""
    if is_strided(SIGNATURES, K):
        return begin
    else:
        bits = addresses[0]  # scales among them, which costs nothing: allocators align more
        for k in tl.static_range(1, len(addresses)):
            bits = bits | addresses[k]
        full = tl.maximum(tl.minimum(end, (numel // TILE).to(tl.int32)), begin)
        return tl.where((bits & 15) == 0, full, begin)


@triton.jit
def addresses_of(words, grad, SIGNATURES: tl.constexpr, K: tl.constexpr):
    """Where a row's operands begin, and their partners."""
    N: tl.constexpr = n_operands(SIGNATURES, K)
    addresses = (tl.load(words + OPERAND_ADDRESSES), grad)
    for k in tl.static_range(N - 2):
        addresses = addresses + (tl.load(words + OPERAND_ADDRESSES + ADDRESSES * (1 + k)),)
    for k in tl.static_range(N):
        if has_partner(SIGNATURES, K, k):
            place = ADDRESSES * (k - 1 if k > 0 else 0) + 1
            addresses = addresses + (tl.load(words + OPERAND_ADDRESSES + place),)
    return addresses


@triton.jit
def moved(addresses, origin, SIGNATURES: tl.constexpr, K: tl.constexpr):
    """The addresses of element ``origin`` of all operands and partners; those of strided ones and of scales stay."""
    if is_strided(SIGNATURES, K):
        return addresses
    else:
        N: tl.constexpr = n_operands(SIGNATURES, K)
        out = ()
        for k in tl.static_range(N):
            out = out + (addresses[k] + origin * itemsize(SIGNATURES, K, k),)
        for k in tl.static_range(N):
            if has_partner(SIGNATURES, K, k):
                size: tl.constexpr = partner_size(SIGNATURES, K, k)
                out = out + (addresses[partner(SIGNATURES, K, k)] + origin * size,)
        return out


@triton.jit
def whole_row(words, layouts, grad, SIGNATURES: tl.constexpr, K: tl.constexpr):
    """A row as the one segment that it has; see ``segment_of``."""
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
    return words, layouts, origin, length, moved(addresses, origin, SIGNATURES, K)


@triton.jit
def tiles_of(number, each, begin, end):
    """Those of a segment's tiles that are among a row's [begin, end), counted from its first."""
    first = number * each
    return tl.maximum(begin, first) - first, tl.minimum(end, first + each) - first
