"""Counting a step: the scalars of rows after it, those of rows that no share has whole by the last program."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.adding import load_sums, told
from fusedopt.triton_kernels.cohort import cohort_of, counted, record_of
from fusedopt.triton_kernels.signatures import listed, n_listed, n_measures
from fusedopt.triton_kernels.walk import (
    COUNTER,
    FIRST_SEGMENT,
    GRADS,
    GROUP,
    SCOPE,
    SUMS_WIDTH,
    load_hyper,
    load_number,
    load_scalars,
    store_scalar,
    store_scalars,
)


@triton.jit
def count_cohort(rows, tiles, first, last, begin, end, scalars, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Counts the step in those of a cohort's rows [first, last] that are whole in the share of tiles [begin, end)."""
    tl.debug_barrier()  # all threads have read the scalars that told the cohort's rows from others
    lanes = tl.arange(0, 128)
    for at in range(first, last + 1, 128):
        row = at + lanes
        mask = row <= last
        low, high = tl.load(tiles + row, mask=mask, other=0), tl.load(tiles + row + 1, mask=mask, other=0)
        whole = (begin <= low) & (low < high) & (high <= end)
        store_scalars(rows, row, mask & whole, scalars, FIRST, WIDTH)


@triton.jit
def _own_steps(rows, row, mask, WIDTH: tl.constexpr):
    """Which of a block of rows the engine counts the steps of, and how many there were."""
    address = tl.load(rows + row.to(tl.int64) * WIDTH + COUNTER, mask=mask, other=0)
    mask = mask & (address != 0)
    return mask, load_number(address, mask)


@triton.jit
def count_steps(rows, tiles, first, last, begin, end, steps, WIDTH: tl.constexpr):
    """Counts what the engine counts in a cohort's rows that are whole in the share; see ``count_cohort``."""
    tl.debug_barrier()
    lanes = tl.arange(0, 128)
    for at in range(first, last + 1, 128):
        row = at + lanes
        mask = row <= last
        low, high = tl.load(tiles + row, mask=mask, other=0), tl.load(tiles + row + 1, mask=mask, other=0)
        has, _ = _own_steps(rows, row, mask & (begin <= low) & (low < high) & (high <= end), WIDTH)
        store_scalar(rows, row, has, tl.zeros_like(row).to(tl.float64) + steps + 1, COUNTER, WIDTH)


@triton.jit
def _finished_rows(c, scalars, sums, row, mask, stepped, FINISH: tl.constexpr, SUMS: tl.constexpr):
    """The scalars of a block of rows after ``finish``: of the first segment of those stepped, of zeros elsewhere."""
    if FINISH is None:
        return scalars
    else:
        row_sums, _, _, segments, _, _ = sums
        first = tl.load(row_sums + row * SUMS_WIDTH + FIRST_SEGMENT, mask=stepped, other=0)
        after = tl.load(row_sums + (row + 1) * SUMS_WIDTH + FIRST_SEGMENT, mask=stepped, other=0)
        own = load_sums(segments + first * n_measures(SUMS), first < after, n_measures(SUMS))
        own, whole, largest = told(sums, row, own, mask, SUMS)
        _, scalars = FINISH(c, scalars, own, whole, largest)
        return scalars


@triton.jit
def count_borders(
    rows, borders, step_table, records, n_borders, sums, PREPARE: tl.constexpr, FINISH: tl.constexpr,
    N_SCALARS: tl.constexpr, N_HYPER: tl.constexpr, OPTIONS: tl.constexpr, SUMS: tl.constexpr, FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Counts the step in the other rows; all programs are done with them."""
    lanes = tl.arange(0, 128)
    for at in range(0, n_borders, 128):
        mask = at + lanes < n_borders
        row = tl.load(borders + at + lanes, mask=mask, other=0)
        cohort = cohort_of(rows, step_table, row, mask, WIDTH)
        active = cohort >= 0
        scalars = counted(load_scalars(rows, row, active, FIRST, N_SCALARS, WIDTH))
        if (N_SCALARS > 1) | (FINISH is not None):  # more than `step`: the rule advances them
            record = record_of(records, cohort, N_HYPER, OPTIONS)
            c, scalars = PREPARE(load_hyper(record, active, 2, N_HYPER), scalars, (cohort & 1) != 0)
            scalars = _finished_rows(c, scalars, sums, row, active, active, FINISH, SUMS)
        store_scalars(rows, row, active, scalars, FIRST, WIDTH)
        if OPTIONS == "engine":
            has, steps = _own_steps(rows, row, active, WIDTH)
            store_scalar(rows, row, has, steps + 1, COUNTER, WIDTH)


@triton.jit
def share_scalars(
    rows, step_table, records, n_rows, sums, PREPARE: tl.constexpr, FINISH: tl.constexpr, N_SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr, OPTIONS: tl.constexpr, SUMS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Advances what scopes share in rows without a gradient, if anything of their scope is stepped."""
    row_sums, wholes = sums[0], sums[4]
    lanes = tl.arange(0, 128)
    for at in range(0, n_rows, 128):
        row = at + lanes
        mask = row < n_rows
        mask = mask & (tl.load(step_table + GRADS + row, mask=mask, other=1) == 0)
        mask = mask & (tl.load(rows + row * WIDTH + FIRST, mask=mask, other=0) != 0)
        scope = tl.load(row_sums + row * SUMS_WIDTH + SCOPE, mask=mask, other=0)
        stepped = wholes + scope * (n_measures(SUMS) + 1) + n_measures(SUMS)
        mask = mask & (tl.load(stepped, mask=mask, other=0.0) != 0)
        if tl.max(mask.to(tl.int32)) != 0:
            group = tl.load(rows + row * WIDTH + GROUP, mask=mask, other=0)
            record = record_of(records, 4 * group, N_HYPER, OPTIONS)
            scalars = load_scalars(rows, row, mask, FIRST, N_SCALARS, WIDTH)
            c, scalars = PREPARE(load_hyper(record, mask, 2, N_HYPER), scalars, row < 0)
            scalars = _finished_rows(c, scalars, sums, row, mask, row < 0, FINISH, SUMS)
            for k in tl.static_range(n_listed(SUMS, "shared")):
                value = scalars[listed(SUMS, "shared", k)]
                store_scalar(rows, row, mask, value, FIRST + listed(SUMS, "shared", k), WIDTH)
