"""The sums kernel: what a rule measures of all tensors of a device, before any is stepped."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.adding import add_up, store_sums
from fusedopt.triton_kernels.cohort import (
    cohort_of,
    count_of,
    counted,
    decide,
    engine_scalars,
    first_scalar,
    record_of,
)
from fusedopt.triton_kernels.operands import operands
from fusedopt.triton_kernels.signatures import compute, count, in_channels, n_measures, states, widest
from fusedopt.triton_kernels.tile import (
    addresses_of,
    segment_of,
    segments_of,
    tiles_of,
    whole_row,
)
from fusedopt.triton_kernels.walk import (
    FIRST_SEGMENT,
    GRADS,
    SHARES_SUMMED,
    SUMS_WIDTH,
    claim,
    is_last,
    load_hyper,
    load_i32,
    load_scalars,
    row_of,
    segment,
    share_of,
    to_type,
)


@triton.jit
def measured(
    segment, start, engine, c, MEASURE: tl.constexpr, _, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """What the rule measures of SIZE elements, as their step will see them."""
    _, p, g, state = operands(segment, start, engine, SIGNATURES, K, SIZE, FULL)
    return MEASURE(p, g, state, c, states(SIGNATURES, K))


@triton.jit
def _segment(
    segment, low, high, n_tiles, at, slot, engine, c, MEASURE: tl.constexpr, SUMS: tl.constexpr,
    SIGNATURES: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds up tiles [low, high) of a segment; all of it goes to ``at``, a part to ``slot``."""
    N: tl.constexpr = n_measures(SUMS)
    T: tl.constexpr = compute(SIGNATURES, K)
    engine, c = to_type(engine, T), to_type(c, T)
    totals = add_up(
        segment, low, high, engine, c, measured, MEASURE, None, N, True, True, T, SIGNATURES, K, TILE, STAGES
    )
    if T != tl.float64:
        finite = low >= 0
        for k in tl.static_range(N):
            finite = finite & (tl.abs(totals[k]) < float("inf"))
        if finite == 0:  # a sum of single precision may have overflowed, not what was added up
            totals = add_up(
                segment, low, high, engine, c, measured, MEASURE, None, N, True, False, tl.float64, SIGNATURES, K, TILE,
                STAGES,
            )  # fmt: skip
    if high - low == n_tiles:
        store_sums(at, totals)
    else:
        store_sums(slot, totals)


@triton.jit
def _row(
    words, layouts, grad, row, share, low, high, n_tiles, engine, c, sums, MEASURE: tl.constexpr, SUMS: tl.constexpr,
    SIGNATURES: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds up tiles [low, high) of a row."""
    row_sums, slots, epilogue_slots, segments, wholes, largest = sums
    N: tl.constexpr = n_measures(SUMS)
    first = load_i32(row_sums + row * SUMS_WIDTH + FIRST_SEGMENT)
    if in_channels(SUMS):
        addresses = addresses_of(words, grad, SIGNATURES, K)
        number, stop, each, length = segments_of(row_sums, row, low, high, TILE)
        for k in range(number, stop):
            begin, end = tiles_of(k, each, low, high)
            here = segment_of(words, layouts, addresses, k, length, SIGNATURES, K)
            at, slot = segments + (first + k) * N, slots + (share + first + k) * N
            _segment(here, begin, end, each, at, slot, engine, c, MEASURE, SUMS, SIGNATURES, K, TILE, STAGES)
    else:
        here = whole_row(words, layouts, grad, SIGNATURES, K)
        at, slot = segments + first * N, slots + (share + first) * N
        _segment(here, low, high, n_tiles, at, slot, engine, c, MEASURE, SUMS, SIGNATURES, K, TILE, STAGES)


@triton.jit(do_not_specialize=["n_rows", "n_shares"], do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def sums(
    rows, tiles, shares, layouts, step_table, numbers, counts, grad_scale, found_inf, sums, n_rows, n_shares,
    MEASURE: tl.constexpr, PREPARE: tl.constexpr, N_STATES: tl.constexpr, N_SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr, OPTIONS: tl.constexpr, SUMS: tl.constexpr, SIGNATURES: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Adds up what the rule measures of every row that has a gradient, unless the step is skipped.

    Args:
        rows: See fusedopt/layout.py for these seven.
        tiles: Tiles before each row.
        shares: Where each begins.
        layouts: Of strided rows.
        step_table: What changes from step to step.
        numbers: What is told of the step; the squared norm, if it was measured.
        counts: The same.
        grad_scale: One float, the loss scale.
        found_inf: One float; not 0 to skip the step.
        sums: See adding.py; ``segments`` and ``slots`` are written.
        n_rows: How many.
        n_shares: How many.
        MEASURE: The rule's, see rules/.
        PREPARE: The rule's.
        N_STATES: How many states rows have at most, averages among them.
        N_SCALARS: How many scalars the rule has.
        N_HYPER: How many hyperparameters.
        OPTIONS: See signatures.py.
        SUMS: See signatures.py.
        SIGNATURES: See signatures.py.
        WIDTH: Of ``rows``.
        TILE: Elements of a tile, a power of two.
        STAGES: Rounds of the loops over full tiles under way at once; None to leave that to Triton.
    """
    records = step_table + GRADS + n_rows
    factor, skipped, norm = decide(step_table, numbers, grad_scale, found_inf)
    FIRST: tl.constexpr = first_scalar(N_STATES)
    if skipped == 0:
        share = tl.program_id(0)
        while share < n_shares:
            following = claim(n_shares, counts + SHARES_SUMMED)
            begin, end, row, last_row = share_of(shares, share)
            left = end - begin
            while left > 0:  # rows of one cohort after another, as in step.py
                cohort = cohort_of(rows, step_table, row, row >= 0, WIDTH)
                active = cohort >= 0
                record = record_of(records, cohort, N_HYPER, OPTIONS)
                scalars = load_scalars(rows, row, active, FIRST, N_SCALARS, WIDTH)
                c, after = PREPARE(load_hyper(record, active, 2, N_HYPER), counted(scalars), (cohort & 1) != 0)
                c = to_type(c, widest(SIGNATURES))
                steps = count_of(rows + row * WIDTH, scalars, active, OPTIONS)
                engine = engine_scalars(record, factor, active, cohort, steps, "lr", N_HYPER, OPTIONS)
                engine = to_type(engine, widest(SIGNATURES))
                same = left > 0
                while same:
                    low, high = segment(tiles, row, begin, end)
                    n_tiles = load_i32(tiles + row + 1) - load_i32(tiles + row)
                    words, grad, signature = row_of(rows, step_table, row, WIDTH)
                    for k in tl.static_range(count(SIGNATURES)):
                        if active & (signature == k):
                            _row(
                                words, layouts, grad, row, share, low, high, n_tiles, engine, c, sums, MEASURE, SUMS,
                                SIGNATURES, k, TILE, STAGES,
                            )  # fmt: skip
                    left -= high - low
                    row += 1
                    same = left > 0
                    same = same & (cohort_of(rows, step_table, row, same, WIDTH) == cohort)
                    ahead = load_scalars(rows, row, same & active, FIRST, N_SCALARS, WIDTH)
                    for k in tl.static_range(N_SCALARS):
                        same = same & (ahead[k] == scalars[k])
                    if OPTIONS == "engine":
                        same = same & (count_of(rows + row * WIDTH, ahead, same & active, OPTIONS) == steps)
            share = following
    is_last(counts)
