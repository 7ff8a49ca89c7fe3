"""The sums kernel: what a rule measures of all tensors of a device, before any is stepped."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.adding import add_up, store_sums
from fusedopt.triton_kernels.cohort import decide, first_scalar, is_of_cohort, prepare_cohort
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
    load_i32,
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

    kernels.py says what is what; ``segments`` and ``slots`` of the sums are written.
    """
    records = step_table + GRADS + n_rows
    factor, skipped, norm = decide(step_table, numbers, grad_scale, found_inf)
    FIRST: tl.constexpr = first_scalar(N_STATES)
    T: tl.constexpr = widest(SIGNATURES)
    if skipped == 0:
        share = tl.program_id(0)
        while share < n_shares:
            following = claim(n_shares, counts + SHARES_SUMMED)
            begin, end, row, last_row = share_of(shares, share)
            left = end - begin
            while left > 0:  # rows of one cohort after another, as in step.py
                cohort, scalars, after, steps, c, engine = prepare_cohort(
                    rows, step_table, records, row, factor, PREPARE, "lr", N_SCALARS, N_HYPER, OPTIONS, FIRST, WIDTH,
                    T, T,
                )  # fmt: skip
                same = left > 0
                while same:
                    low, high = segment(tiles, row, begin, end)
                    n_tiles = load_i32(tiles + row + 1) - load_i32(tiles + row)
                    words, grad, signature = row_of(rows, step_table, row, WIDTH)
                    for k in tl.static_range(count(SIGNATURES)):
                        if (cohort >= 0) & (signature == k):
                            _row(
                                words, layouts, grad, row, share, low, high, n_tiles, engine, c, sums, MEASURE, SUMS,
                                SIGNATURES, k, TILE, STAGES,
                            )  # fmt: skip
                    left -= high - low
                    row += 1
                    same = is_of_cohort(
                        rows, step_table, row, left > 0, cohort, scalars, steps, N_SCALARS, OPTIONS, FIRST, WIDTH
                    )
            share = following
    is_last(counts)
