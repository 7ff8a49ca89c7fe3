"""The norm kernel: the sum of the squares of all gradients of a device, the same bits every time."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.variants import compute, count, is_strided
from fusedopt.triton_kernels.walk import HEADER, KIND, NUMEL, aligned, is_last, place, read, share, word

# Tiles that are added up in single precision before they join the double precision sum.
RUN = tl.constexpr(16)


@triton.jit
def _squares(
    rows, row, layouts, gradient, t, numel, T: tl.constexpr, KINDS: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """The squares of the gradient's elements in tile t."""
    start = tl.cast(t, tl.int64) * TILE
    lanes = tl.arange(0, TILE)
    mask = start + lanes < numel
    if is_strided(KINDS, K):
        offsets = place(rows, row, layouts, start + lanes, KINDS, K, WIDTH)
        g = read(gradient, 0, offsets[1], mask, KINDS, K, 1, False)
    else:
        g = read(gradient, start, lanes, mask, KINDS, K, 1, FULL)
    g = g.to(T)
    return g * g


@triton.jit
def _sum(
    rows, row, layouts, gradient, begin, end, numel, T: tl.constexpr, KINDS: tl.constexpr, K: tl.constexpr,
    WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The sum of squares in tiles [begin, end) of a row."""
    total = tl.zeros((), tl.float64)
    full_end = begin
    if not is_strided(KINDS, K):
        if aligned((gradient,)):
            full_end = tl.maximum(tl.minimum(end, (numel // TILE).to(tl.int32)), begin)
    for run in range(begin, full_end, RUN):
        part = tl.zeros((TILE,), T)
        for t in range(run, tl.minimum(run + RUN, full_end)):
            part += _squares(rows, row, layouts, gradient, t, numel, T, KINDS, K, WIDTH, TILE, True)
        total += tl.sum(part).to(tl.float64)
    for t in range(full_end, end):
        part = _squares(rows, row, layouts, gradient, t, numel, T, KINDS, K, WIDTH, TILE, False)
        total += tl.sum(part).to(tl.float64)
    return total


@triton.jit
def _row(
    rows, row, layouts, gradient, begin, end, KINDS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    numel = tl.load(rows + row * WIDTH + NUMEL)
    T: tl.constexpr = compute(KINDS, K)
    total = _sum(rows, row, layouts, gradient, begin, end, numel, T, KINDS, K, WIDTH, TILE)
    if T != tl.float64:
        if not (total < float("inf")):  # the squares may have overflowed, not the gradients
            total = _sum(rows, row, layouts, gradient, begin, end, numel, tl.float64, KINDS, K, WIDTH, TILE)
    return total


@triton.jit(do_not_specialize=["n_rows"])
def norm(
    rows, tiles, shares, layouts, live, partials, verdict, counters, n_rows, KINDS: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Writes the sum of the squares of all gradients to ``verdict[0]``.

    Args:
        rows: See walk.py for these four.
        tiles: Tiles before each row.
        shares: Where each program begins.
        live: What changes from step to step.
        layouts: int64, shapes and strides of strided rows.
        partials: Doubles, one for each program.
        verdict: Doubles.
        counters: int32; the first is 0 between launches.
        n_rows: How many.
        KINDS: See variants.py.
        WIDTH: Of ``rows``.
        TILE: Elements of a tile, a power of two.
    """
    tile, end, row, _ = share(shares)
    total = tl.zeros((), tl.float64)
    while tile < end:
        first = word(tiles + row)
        stop = tl.minimum(word(tiles + row + 1), end)
        kind = word(rows + row * WIDTH + KIND)
        given = tl.load(live + HEADER + row)
        for k in tl.static_range(count(KINDS)):
            if (given != 0) & (kind == k):
                total += _row(rows, row, layouts, given & ~1, tile - first, stop - first, KINDS, k, WIDTH, TILE)
        tile = stop
        row += 1
    tl.store(partials + tl.program_id(0), total)
    if is_last(counters):
        lanes = tl.arange(0, 1024)
        total = tl.zeros((), tl.float64)
        for at in range(0, tl.num_programs(0), 1024):
            mask = at + lanes < tl.num_programs(0)
            total += tl.sum(tl.load(partials + at + lanes, mask=mask, other=0.0, cache_modifier=".cg"))
        tl.store(verdict, total)
