"""The norm kernel: the sum of the squares of all gradients of a device, the same bits every time."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.signatures import compute, count, element, in_channels, is_strided, itemsize
from fusedopt.triton_kernels.tile import PARTS, load, locate, segments_of, tiles_of, whole_tiles
from fusedopt.triton_kernels.walk import NUMEL, SHARES_MEASURED, claim, is_last, row_of, segment, share_of

# Tiles that are added up in single precision before they join the double precision sum.
RUN = tl.constexpr(16)


@triton.jit
def _squares(
    words, layouts, grad, origin, start, numel, T: tl.constexpr, SIGNATURES: tl.constexpr, K: tl.constexpr,
    SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The squares of SIZE of the gradient's elements."""
    at = locate(words, layouts, origin, start, numel, SIGNATURES, K, SIZE)
    g = load(grad, at[0], at[1][1], at[2], element(SIGNATURES, K, 1), FULL).to(T)
    return g * g


@triton.jit
def _sum(
    words, layouts, grad, begin, end, origin, numel, T: tl.constexpr, SIGNATURES: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of squares in tiles [begin, end) of a segment, whose gradients begin at ``grad``; see tile.py."""
    total = tl.zeros((), tl.float64)
    full_end = whole_tiles((grad,), begin, end, numel, SIGNATURES, K, TILE)
    for run in range(begin, full_end, RUN):
        part = tl.zeros((TILE,), T)
        for t in tl.range(run, tl.minimum(run + RUN, full_end), num_stages=STAGES):
            at = tl.cast(t, tl.int64) * TILE
            part += _squares(words, layouts, grad, origin, at, numel, T, SIGNATURES, K, TILE, True)
        total += tl.sum(part).to(tl.float64)
    PART: tl.constexpr = TILE // PARTS
    for at in range(full_end.to(tl.int64) * TILE, tl.minimum(end.to(tl.int64) * TILE, numel), PART):
        part = _squares(words, layouts, grad, origin, at, numel, T, SIGNATURES, K, PART, False)
        total += tl.sum(part).to(tl.float64)
    return total


@triton.jit
def _segment(
    words, layouts, grad, begin, end, origin, numel, SIGNATURES: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    T: tl.constexpr = compute(SIGNATURES, K)
    total = _sum(words, layouts, grad, begin, end, origin, numel, T, SIGNATURES, K, TILE, STAGES)
    if T != tl.float64:
        if not (total < float("inf")):  # the squares may have overflowed, not the gradients
            total = _sum(words, layouts, grad, begin, end, origin, numel, tl.float64, SIGNATURES, K, TILE, STAGES)
    return total


@triton.jit
def _row(
    words, layouts, grad, row, low, high, row_sums, SUMS: tl.constexpr, SIGNATURES: tl.constexpr, K: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The sum of squares in tiles [low, high) of a row."""
    if in_channels(SUMS):
        total = tl.zeros((), tl.float64)
        number, stop, each, length = segments_of(row_sums, row, low, high, TILE)
        for k in range(number, stop):
            begin, end = tiles_of(k, each, low, high)
            origin = tl.cast(k, tl.int64) * length
            here = grad
            if not is_strided(SIGNATURES, K):
                here += origin * itemsize(SIGNATURES, K, 1)
            total += _segment(words, layouts, here, begin, end, origin, length, SIGNATURES, K, TILE, STAGES)
        return total
    else:
        return _segment(words, layouts, grad, low, high, 0, tl.load(words + NUMEL), SIGNATURES, K, TILE, STAGES)


@triton.jit(do_not_specialize=["n_shares"])
def norm(
    rows, tiles, shares, layouts, row_sums, step_table, partials, numbers, counts, n_shares, SUMS: tl.constexpr,
    SIGNATURES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Writes the sum of the squares of all gradients to the first of ``numbers``. kernels.py says what is what."""
    share = tl.program_id(0)
    while share < n_shares:
        following = claim(n_shares, counts + SHARES_MEASURED)
        begin, end, row, last_row = share_of(shares, share)
        left = end - begin
        total = tl.zeros((), tl.float64)
        while left > 0:
            low, high = segment(tiles, row, begin, end)
            words, grad, signature = row_of(rows, step_table, row, WIDTH)
            for k in tl.static_range(count(SIGNATURES)):
                if (grad != 0) & (signature == k):
                    total += _row(words, layouts, grad, row, low, high, row_sums, SUMS, SIGNATURES, k, TILE, STAGES)
            left -= high - low
            row += 1
        tl.store(partials + share, total)
        share = following
    if is_last(counts):
        lanes = tl.arange(0, 1024)
        total = tl.zeros((), tl.float64)
        for at in range(0, n_shares, 1024):
            mask = at + lanes < n_shares
            total += tl.sum(tl.load(partials + at + lanes, mask=mask, other=0.0, cache_modifier=".cg"))
        tl.store(numbers, total)
