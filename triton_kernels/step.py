"""The step kernel: the whole step of all tensors of a device, whatever the optimizer."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.adding import add_up, store_sums, tell, zeros
from fusedopt.triton_kernels.cohort import (
    NARROW_NORM,
    NORM,
    decide,
    first_scalar,
    is_of_cohort,
    prepare_cohort,
)
from fusedopt.triton_kernels.counting import count_borders, count_cohort, count_steps, share_scalars
from fusedopt.triton_kernels.operands import averaged, decayed, operands
from fusedopt.triton_kernels.signatures import (
    compute,
    count,
    in_channels,
    n_listed,
    n_states,
    replaces,
    spans_rows,
    states,
    widest,
)
from fusedopt.triton_kernels.tile import (
    PARTS,
    addresses_of,
    put,
    segment_of,
    segments_of,
    tiles_of,
    whole_row,
    whole_tiles,
)
from fusedopt.triton_kernels.walk import (
    GRADS,
    MEASURED,
    SHARES_UPDATED,
    SKIPPED,
    SKIPPED_STEPS,
    claim,
    is_last,
    load_i32,
    row_of,
    segment,
    share_of,
    store_scalars,
    to_type,
)


@triton.jit
def _step(
    segment, start, engine, c, DIRECTION: tl.constexpr, CONCLUDE: tl.constexpr, SIGNATURES: tl.constexpr,
    K: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """SIZE elements' step, in the order of every engine; returns what the rule concludes.

    Unscale, clip and maximize (one factor); noise; coupled decay; direction; decoupled decay; average; write.
    """
    addresses = segment[4]
    at, p, g, state = operands(segment, start, engine, SIGNATURES, K, SIZE, FULL)
    d, state = DIRECTION(p, g, state, c, states(SIGNATURES, K))
    if replaces(SIGNATURES, K):
        stepped = d
    else:
        stepped = decayed(p, d, engine) - engine[3] * d
    drawn = (segment[0],) + engine[11:]
    value = averaged(addresses, at, stepped, engine, SIGNATURES, K, SIZE, FULL)
    put(addresses, at, value, drawn, SIGNATURES, K, 0, SIZE, FULL)
    for k in tl.static_range(n_states(SIGNATURES, K)):
        put(addresses, at, state[k], drawn, SIGNATURES, K, 2 + k, SIZE, FULL)
    if CONCLUDE is None:
        return ()
    else:
        return CONCLUDE(stepped, g, d, state, c, states(SIGNATURES, K))


@triton.jit
def _tiles(
    segment, begin, end, engine, c, DIRECTION: tl.constexpr, CONCLUDE: tl.constexpr, SUMS: tl.constexpr,
    SIGNATURES: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of a segment, the last first: the kernel before has just read the last."""
    T: tl.constexpr = compute(SIGNATURES, K)
    engine = to_type(engine, T)
    c = to_type(c, T)
    if CONCLUDE is None:
        full_end = whole_tiles(segment[4], begin, end, segment[3], SIGNATURES, K, TILE)
        PART: tl.constexpr = TILE // PARTS
        for at in range(full_end.to(tl.int64) * TILE, tl.minimum(end.to(tl.int64) * TILE, segment[3]), PART):
            _step(segment, at, engine, c, DIRECTION, CONCLUDE, SIGNATURES, K, PART, False)
        for back in tl.range(begin, full_end, num_stages=STAGES):
            at = (begin + full_end - 1 - back).to(tl.int64) * TILE
            _step(segment, at, engine, c, DIRECTION, CONCLUDE, SIGNATURES, K, TILE, True)
        return ()
    else:
        N: tl.constexpr = n_listed(SUMS, "epilogue")
        return add_up(
            segment, begin, end, engine, c, _step, DIRECTION, CONCLUDE, N, False, True, T, SIGNATURES, K, TILE, STAGES,
        )  # fmt: skip


@triton.jit
def _finished(
    rows, row, number, is_whole, is_first, c, scalars, sums, FINISH: tl.constexpr, SUMS: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The coefficients of a segment. Counts the step in a row that is whole in the share, by its first segment."""
    if FINISH is None:
        return c
    else:
        own, whole, largest = tell(sums, row, number, is_first, SUMS)
        c, scalars = FINISH(c, scalars, own, whole, largest)
        if len(scalars) > 0:
            if is_whole & (number == 0):
                tl.debug_barrier()  # all threads have read the scalars that told the row from those before it
                store_scalars(rows, row, row >= 0, scalars, FIRST, WIDTH)
        return c


@triton.jit
def _row(
    rows, words, layouts, grad, row, low, high, n_tiles, engine, c, scalars, sums, slot, DIRECTION: tl.constexpr,
    FINISH: tl.constexpr, CONCLUDE: tl.constexpr, SUMS: tl.constexpr, SIGNATURES: tl.constexpr, K: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [low, high) of a row. What the rule concludes goes to ``slot``."""
    is_whole = (low < high) & (high - low == n_tiles)  # rows without tiles are borders
    if in_channels(SUMS):
        totals = zeros(n_listed(SUMS, "epilogue"))
        addresses = addresses_of(words, grad, SIGNATURES, K)
        number, stop, each, length = segments_of(sums[0], row, low, high, TILE)
        for k in range(number, stop):
            begin, end = tiles_of(k, each, low, high)
            here = segment_of(words, layouts, addresses, k, length, SIGNATURES, K)
            own = _finished(rows, row, k, is_whole, begin == 0, c, scalars, sums, FINISH, SUMS, FIRST, WIDTH)
            found = _tiles(here, begin, end, engine, own, DIRECTION, CONCLUDE, SUMS, SIGNATURES, K, TILE, STAGES)
            totals = _both(totals, found)
        store_sums(slot, totals)
    else:
        here = whole_row(words, layouts, grad, SIGNATURES, K)
        own = _finished(rows, row, 0, is_whole, low == 0, c, scalars, sums, FINISH, SUMS, FIRST, WIDTH)
        found = _tiles(here, low, high, engine, own, DIRECTION, CONCLUDE, SUMS, SIGNATURES, K, TILE, STAGES)
        store_sums(slot, found)


@triton.jit
def _both(totals, found):
    out = ()
    for k in tl.static_range(len(totals)):
        out = out + (totals[k] + found[k],)
    return out


@triton.jit
def _cohort(
    rows, tiles, layouts, step_table, share, begin, end, row, left, cohort, scalars, after, steps, c, engine, sums,
    DIRECTION: tl.constexpr, FINISH: tl.constexpr, CONCLUDE: tl.constexpr, N_SCALARS: tl.constexpr,
    OPTIONS: tl.constexpr, SUMS: tl.constexpr, SIGNATURES: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Steps the rows of a cohort that the tiles [begin, end) of a share have, from one on back.

    Returns:
        The row before them, and how many tiles are left.
    """
    active = cohort >= 0
    same = left > 0
    while same:
        low, high = segment(tiles, row, begin, end)
        words, grad, signature = row_of(rows, step_table, row, WIDTH)
        n_tiles, slot = high, None
        if FINISH is not None:
            n_tiles = load_i32(tiles + row + 1) - load_i32(tiles + row)
        if CONCLUDE is not None:
            slot = sums[2] + (share + row) * n_listed(SUMS, "epilogue")
            if active == 0:
                store_sums(slot, zeros(n_listed(SUMS, "epilogue")))
        for k in tl.static_range(count(SIGNATURES)):
            if active & (signature == k):
                _row(
                    rows, words, layouts, grad, row, low, high, n_tiles, engine, c, after, sums, slot, DIRECTION,
                    FINISH, CONCLUDE, SUMS, SIGNATURES, k, FIRST, WIDTH, TILE, STAGES,
                )  # fmt: skip
        left -= high - low
        row -= 1
        same = is_of_cohort(rows, step_table, row, left > 0, cohort, scalars, steps, N_SCALARS, OPTIONS, FIRST, WIDTH)
    return row, left


@triton.jit
def _tell(step_table, numbers, counts, norm, skipped):
    """What becomes of the step."""
    measured = tl.load(step_table + MEASURED) != 0
    tl.store(numbers + NORM, norm, mask=measured)
    tl.store((numbers + NARROW_NORM).to(tl.pointer_type(tl.float32)), norm.to(tl.float32), mask=measured)
    tl.store(counts + SKIPPED_STEPS, tl.load(counts + SKIPPED_STEPS) + skipped.to(tl.int32))
    tl.store(counts + SKIPPED, skipped.to(tl.int32))


@triton.jit(
    do_not_specialize=["n_rows", "n_shares", "n_borders"], do_not_specialize_on_alignment=["grad_scale", "found_inf"]
)
def step(
    rows, tiles, shares, borders, layouts, step_table, numbers, counts, grad_scale, found_inf, sums, n_rows, n_shares,
    n_borders, DIRECTION: tl.constexpr, PREPARE: tl.constexpr, FINISH: tl.constexpr, CONCLUDE: tl.constexpr,
    STEP_SCALE: tl.constexpr, N_STATES: tl.constexpr, N_SCALARS: tl.constexpr, N_HYPER: tl.constexpr,
    OPTIONS: tl.constexpr, SUMS: tl.constexpr, SIGNATURES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One step of every row that has a gradient, unless it is skipped. kernels.py says what is what."""
    records = step_table + GRADS + n_rows
    factor, skipped, norm = decide(step_table, numbers, grad_scale, found_inf)
    FIRST: tl.constexpr = first_scalar(N_STATES)
    T: tl.constexpr = widest(SIGNATURES)
    C: tl.constexpr = T if FINISH is None else tl.float64
    if skipped == 0:
        claimed = tl.program_id(0)
        while claimed < n_shares:
            following = claim(n_shares, counts + SHARES_UPDATED)
            share = n_shares - 1 - claimed
            begin, end, first_row, row = share_of(shares, share)
            left = end - begin
            while left > 0:  # rows of one cohort after another: `prepare` runs when the cohort changes
                last = row
                cohort, scalars, after, steps, c, engine = prepare_cohort(
                    rows, step_table, records, row, factor, PREPARE, STEP_SCALE, N_SCALARS, N_HYPER, OPTIONS, FIRST,
                    WIDTH, C, T,
                )  # fmt: skip
                row, left = _cohort(
                    rows, tiles, layouts, step_table, share, begin, end, row, left, cohort, scalars, after, steps, c,
                    engine, sums, DIRECTION, FINISH, CONCLUDE, N_SCALARS, OPTIONS, SUMS, SIGNATURES, FIRST, WIDTH,
                    TILE, STAGES,
                )  # fmt: skip
                if OPTIONS == "engine":
                    if cohort >= 0:
                        count_steps(rows, tiles, row + 1, last, begin, end, steps, WIDTH)
                if (N_SCALARS > 0) & (FINISH is None):
                    if cohort >= 0:
                        count_cohort(rows, tiles, row + 1, last, begin, end, after, FIRST, WIDTH)
            claimed = following
    if is_last(counts):
        _tell(step_table, numbers, counts, norm, skipped)
        if (skipped == 0) & ((N_SCALARS > 0) | (OPTIONS == "engine")):
            count_borders(
                rows, borders, step_table, records, n_borders, sums, PREPARE, FINISH, N_SCALARS, N_HYPER, OPTIONS, SUMS,
                FIRST, WIDTH,
            )  # fmt: skip
            if spans_rows(SUMS) & (n_listed(SUMS, "shared") > 0):
                share_scalars(
                    rows, step_table, records, n_rows, sums, PREPARE, FINISH, N_SCALARS, N_HYPER, OPTIONS, SUMS, FIRST,
                    WIDTH,
                )  # fmt: skip
