"""Sums in double precision over tiles, the same bits every time, and where those of segments are read and written.

``sums`` are a plan's tables: ``row_sums``, ``slots`` and ``epilogue_slots``, see fusedopt/layout.py, and ``segments``,
``wholes`` and ``largest``, see fusedopt/sums.py. A segment whose tiles are all in one share has its sums in
``segments`` at once; of others each share's part is in a slot, until ``tell`` or the kernel ``fold`` adds them up.
"""

import triton
import triton.language as tl

from fusedopt.triton_kernels.signatures import has_scopes, has_tables, n_measures
from fusedopt.triton_kernels.tile import PARTS, inside, whole_tiles
from fusedopt.triton_kernels.walk import FIRST_SEGMENT, FIRST_SHARE, LAST_SHARE, SCOPE, SUMS_WIDTH, load_i32, to_type

# Tiles that are added up in the type of their values before they join the double precision sum.
RUN = tl.constexpr(16)
# Slots that are read at once.
SLOTS = tl.constexpr(128)


@triton.jit
def zeros(N: tl.constexpr):
    """As many sums of nothing."""
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros((), tl.float64),)
    return out


@triton.jit
def _blocks(N: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr):
    out = ()
    for _ in tl.static_range(N):
        out = out + (tl.zeros((SIZE,), T),)
    return out


@triton.jit
def _of_fours(x):
    """The sums of four neighbours each, which a thread has: fewer registers than sums of every lane."""
    return tl.sum(tl.reshape(x, (x.shape[0] // 4, 4)), axis=1)


@triton.jit
def _plus_fours(blocks, values, T: tl.constexpr):
    out = ()
    for k in tl.static_range(len(blocks)):
        out = out + (blocks[k] + _of_fours(values[k].to(T)),)
    return out


@triton.jit
def plus(totals, blocks, mask):
    """Sums with those of blocks, as far as a mask lets."""
    out = ()
    for k in tl.static_range(len(totals)):
        out = out + (totals[k] + tl.sum(tl.where(mask, blocks[k], 0.0)).to(tl.float64),)
    return out


@triton.jit
def add_up(
    segment, begin, end, engine, c, BODY: tl.constexpr, FUNCTION: tl.constexpr, MORE: tl.constexpr, N: tl.constexpr,
    UP: tl.constexpr, FAST: tl.constexpr, T: tl.constexpr, SIGNATURES: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """N sums of what BODY(segment, start, engine, c, FUNCTION, MORE, ...) does of tiles [begin, end) of a segment.

    Tiles go up or down; T is the type that a run of them is added up in. Unless FAST, what is rare, full tiles go as
    others do: no registers are spent on them.
    """
    words, _, origin, numel, addresses = segment
    full_end = begin
    if FAST:
        full_end = whole_tiles(addresses, begin, end, numel, SIGNATURES, K, TILE)
    totals = zeros(N)
    PART: tl.constexpr = TILE // PARTS
    for at in range(full_end.to(tl.int64) * TILE, tl.minimum(end.to(tl.int64) * TILE, numel), PART):
        found = BODY(segment, at, engine, c, FUNCTION, MORE, SIGNATURES, K, PART, False)
        totals = plus(totals, to_type(found, T), inside(words, at, numel, origin, SIGNATURES, K, PART))
    if FAST:
        for run in range(begin, full_end, RUN):
            parts = _blocks(N, TILE // 4, T)
            for t in tl.range(run, tl.minimum(run + RUN, full_end), num_stages=STAGES):
                tile = t
                if not UP:
                    tile = begin + full_end - 1 - t
                at = tl.cast(tile, tl.int64) * TILE
                found = BODY(segment, at, engine, c, FUNCTION, MORE, SIGNATURES, K, TILE, True)
                parts = _plus_fours(parts, found, T)
            totals = plus(totals, parts, tl.full((TILE // 4,), 1, tl.int1))
    return totals


@triton.jit
def load_sums(pointer, mask, N: tl.constexpr):
    """N sums at a pointer, or at each of a block of them; what other programs of this launch may have written."""
    out = ()
    for k in tl.static_range(N):
        out = out + (tl.load(pointer + k, mask=mask, other=0.0, cache_modifier=".cg"),)
    return out


@triton.jit
def store_sums(pointer, totals):
    """Puts sums where a pointer points."""
    for k in tl.static_range(len(totals)):
        tl.store(pointer + k, totals[k])


@triton.jit
def add_slots(slots, first, last, N: tl.constexpr):
    """The sums over slots [first, last], of N each."""
    lanes = tl.arange(0, SLOTS)
    totals = zeros(N)
    for at in range(first, last + 1, SLOTS):
        mask = at + lanes <= last
        totals = plus(totals, load_sums(slots + (at + lanes) * N, mask, N), mask)
    return totals


@triton.jit
def told(sums, row, own, mask, SUMS: tl.constexpr):
    """What ``finish`` is told of a segment, or of one of each of a block of rows: own sums, whole, largest score."""
    row_sums, _, _, _, wholes, largest = sums
    if has_scopes(SUMS):
        scope = tl.load(row_sums + row * SUMS_WIDTH + SCOPE, mask=mask, other=0)
        whole = load_sums(wholes + scope * (n_measures(SUMS) + 1), mask, n_measures(SUMS))
        return own, whole, tl.load(largest + scope, mask=mask, other=float("-inf"), cache_modifier=".cg")
    else:
        return own, own, tl.where(mask, float("-inf"), float("-inf")).to(tl.float64)


@triton.jit
def tell(sums, row, number, is_first, SUMS: tl.constexpr):
    """What ``finish`` is told of a row's segment.

    Where no kernel has added up the parts of several shares, this does, and whoever has the first share keeps it.
    """
    row_sums, slots, _, segments, _, _ = sums
    N: tl.constexpr = n_measures(SUMS)
    here = row_sums + row * SUMS_WIDTH
    segment = load_i32(here + FIRST_SEGMENT) + number
    at = segments + segment * N
    if has_tables(SUMS):
        own = load_sums(at, row >= 0, N)
    else:
        first, last = load_i32(here + FIRST_SHARE), load_i32(here + LAST_SHARE)
        own = load_sums(at, first == last, N)
        if first < last:
            own = add_slots(slots, first + segment, last + segment, N)
            if is_first:
                store_sums(at, own)
    return told(sums, row, own, row >= 0, SUMS)
