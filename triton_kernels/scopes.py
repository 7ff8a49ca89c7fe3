"""The kernels between the others: sums over segments of several shares, over scopes, and of what a step concluded.

See adding.py for ``tables``, and fusedopt/layout.py and signatures.py for the other arguments.
"""

import triton
import triton.language as tl

from fusedopt.passes import Pass
from fusedopt.triton_kernels.adding import SLOTS, load_sums, plus, store_sums, zeros
from fusedopt.triton_kernels.cohort import cohort_of, counted, first_scalar, record_of
from fusedopt.triton_kernels.signatures import in_channels, listed, n_listed, n_measures, spans_rows
from fusedopt.triton_kernels.walk import (
    FIRST_SEGMENT,
    FIRST_SHARE,
    GRADS,
    LAST_SHARE,
    SCOPE,
    SEGMENT_LENGTH,
    SKIPPED,
    SUMS_WIDTH,
    load_hyper,
    load_i32,
    load_scalars,
    share_of,
    store_scalar,
    to_type,
)

UPDATE, EPILOGUE = tl.constexpr(int(Pass.UPDATE)), tl.constexpr(int(Pass.EPILOGUE))
# Rows, segments or slots that are looked at at once. Untested.
LANES = tl.constexpr(512)


@triton.jit(do_not_specialize=["n_shares"])
def fold(
    tiles, shares, step_table, sums, n_shares, SUMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds up the slots of segments that have tiles in several shares, into ``segments``.

    Of each such segment whoever looks at the first share that begins inside of it does. kernels.py says what is what.
    """
    row_sums, slots, epilogue_slots, segments, wholes, largest = sums
    N: tl.constexpr = n_measures(SUMS)
    lanes = tl.arange(0, SLOTS)
    for later in range(1 + tl.program_id(0), n_shares, tl.num_programs(0)):
        share = tl.cast(later, tl.int32)
        begin, end, row, last_row = share_of(shares, share)
        first = load_i32(tiles + row)
        each = load_i32(tiles + row + 1) - first
        if in_channels(SUMS):
            each = tl.cdiv(tl.load(row_sums + row * SUMS_WIDTH + SEGMENT_LENGTH), TILE).to(tl.int32)
        number = (begin - first) // each
        low, high = first + number * each, first + (number + 1) * each
        is_first = (low < begin) & (load_i32(shares + 2 * (share - 1)) <= low)
        if is_first & (tl.load(step_table + GRADS + row) != 0):
            segment = load_i32(row_sums + row * SUMS_WIDTH + FIRST_SEGMENT) + number
            totals = zeros(N)
            at = share - 1
            while (at < n_shares) & (load_i32(shares + 2 * at) < high):
                mask = at + lanes < n_shares
                mask = mask & (tl.load(shares + 2 * (at + lanes), mask=mask, other=0) < high)
                totals = plus(totals, load_sums(slots + (at + lanes + segment) * N, mask, N), mask)
                at = tl.minimum(at + SLOTS, n_shares)
            store_sums(segments + segment * N, totals)


@triton.jit
def _prepared(
    rows, step_table, records, row, mask, PREPARE: tl.constexpr, N_STATES: tl.constexpr, N_SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr, OPTIONS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The coefficients of a row, or of each of a block of rows, before ``finish``."""
    FIRST: tl.constexpr = first_scalar(N_STATES)
    cohort = cohort_of(rows, step_table, row, mask, WIDTH)
    scalars = counted(load_scalars(rows, row, mask, FIRST, N_SCALARS, WIDTH))
    hyper = load_hyper(record_of(records, cohort, N_HYPER, OPTIONS), mask, 2, N_HYPER)
    c, _ = PREPARE(hyper, scalars, (cohort & 1) != 0)
    return to_type(c, tl.float64)


@triton.jit
def _best(largest, c, own, mask, SCORE: tl.constexpr):
    """The largest score, of those before and of a block of segments. It is not NaN, as Python's ``max`` has it."""
    if SCORE is None:
        return largest
    else:
        scores = SCORE(c, own).to(tl.float64)
        return tl.maximum(largest, tl.max(tl.where(mask & (scores == scores), scores, float("-inf"))))


@triton.jit(do_not_specialize=["n_rows", "n_scopes"])
def scopes(
    rows, step_table, sums, n_rows, n_scopes, SCORE: tl.constexpr, PREPARE: tl.constexpr, N_STATES: tl.constexpr,
    N_SCALARS: tl.constexpr, N_HYPER: tl.constexpr, OPTIONS: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds segments up over scopes of active rows, and finds their largest scores. kernels.py says what is what."""
    row_sums, slots, epilogue_slots, segments, wholes, highest = sums
    N: tl.constexpr = n_measures(SUMS)
    records = step_table + GRADS + n_rows
    lanes = tl.arange(0, LANES)
    for number in range(tl.program_id(0), n_scopes, tl.num_programs(0)):
        scope = tl.cast(number, tl.int32)
        totals, largest = zeros(N), tl.full((), float("-inf"), tl.float64)
        active = tl.zeros((), tl.int32)
        if in_channels(SUMS):  # a scope is a row
            here = row_sums + scope * SUMS_WIDTH + FIRST_SEGMENT
            first, after = load_i32(here), load_i32(here + SUMS_WIDTH)
            if tl.load(step_table + GRADS + scope) != 0:
                active += 1
                c = ()
                if SCORE is not None:
                    c = _prepared(
                        rows, step_table, records, scope, scope >= 0, PREPARE, N_STATES, N_SCALARS, N_HYPER, OPTIONS,
                        WIDTH,
                    )  # fmt: skip
                for at in range(first, after, LANES):
                    mask = at + lanes < after
                    own = load_sums(segments + (at + lanes) * N, mask, N)
                    totals = plus(totals, own, mask)
                    largest = _best(largest, c, own, mask, SCORE)
        else:
            for at in range(0, n_rows, LANES):
                row = at + lanes
                mask = row < n_rows
                mask = mask & (tl.load(row_sums + row * SUMS_WIDTH + SCOPE, mask=mask, other=-1) == scope)
                mask = mask & (tl.load(step_table + GRADS + row, mask=mask, other=0) != 0)
                active += tl.sum(mask.to(tl.int32))
                segment = tl.load(row_sums + row * SUMS_WIDTH + FIRST_SEGMENT, mask=mask, other=0)
                own = load_sums(segments + segment * N, mask, N)
                totals = plus(totals, own, mask)
                if SCORE is not None:
                    c = _prepared(
                        rows, step_table, records, row, mask, PREPARE, N_STATES, N_SCALARS, N_HYPER, OPTIONS,
                        WIDTH,
                    )  # fmt: skip
                    largest = _best(largest, c, own, mask, SCORE)
        store_sums(wholes + scope * (N + 1), totals)
        tl.store(wholes + scope * (N + 1) + N, tl.cast(active, tl.float64))
        tl.store(highest + scope, largest)


@triton.jit
def _concluded(row_sums, slots, scope, n_rows, SUMS: tl.constexpr):
    """The sums over a scope of the slots of its rows, which are neighbours; between them are none of others."""
    N: tl.constexpr = n_listed(SUMS, "epilogue")
    first, last = scope, scope
    lanes = tl.arange(0, LANES)
    if spans_rows(SUMS):
        first, last = n_rows, -1 + 0 * scope
        for at in range(0, n_rows, LANES):
            row = at + lanes
            own = tl.load(row_sums + row * SUMS_WIDTH + SCOPE, mask=row < n_rows, other=-1) == scope
            first = tl.minimum(first, tl.min(tl.where(own, row, n_rows)))
            last = tl.maximum(last, tl.max(tl.where(own, row, -1)))
    totals = zeros(N)
    if first <= last:
        low = load_i32(row_sums + first * SUMS_WIDTH + FIRST_SHARE) + first
        high = load_i32(row_sums + last * SUMS_WIDTH + LAST_SHARE) + last
        for at in range(low, high + 1, LANES):
            mask = at + lanes <= high
            totals = plus(totals, load_sums(slots + (at + lanes) * N, mask, N), mask)
    return totals


@triton.jit
def _put(rows, row, mask, totals, FIRST: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr):
    for k in tl.static_range(n_listed(SUMS, "epilogue")):
        store_scalar(rows, row, mask, totals[k], FIRST + listed(SUMS, "epilogue", k), WIDTH)


@triton.jit(do_not_specialize=["n_rows", "n_scopes", "passes"])
def epilogue(
    rows, step_table, counts, sums, concluded, n_rows, n_scopes, passes, N_STATES: tl.constexpr,
    SUMS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Adds up over scopes what a step concluded, and puts it into scalars of all rows of which anything is stepped.

    kernels.py says what is what.
    """
    row_sums, slots, epilogue_slots, segments, wholes, highest = sums
    N: tl.constexpr = n_listed(SUMS, "epilogue")
    FIRST: tl.constexpr = first_scalar(N_STATES)
    if tl.load(counts + SKIPPED) == 0:
        lanes = tl.arange(0, LANES)
        for number in range(tl.program_id(0), n_scopes, tl.num_programs(0)):
            scope = tl.cast(number, tl.int32)
            totals = load_sums(concluded + scope * N, scope >= 0, N)
            if (passes & UPDATE) != 0:
                totals = _concluded(row_sums, epilogue_slots, scope, n_rows, SUMS)
                store_sums(concluded + scope * N, totals)
            if (passes & EPILOGUE) != 0:
                if spans_rows(SUMS):
                    if tl.load(wholes + scope * (n_measures(SUMS) + 1) + n_measures(SUMS)) != 0:
                        for at in range(0, n_rows, LANES):
                            row = at + lanes
                            mask = row < n_rows
                            here = tl.load(row_sums + row * SUMS_WIDTH + SCOPE, mask=mask, other=-1) == scope
                            mask = here & (tl.load(rows + row * WIDTH + FIRST, mask=here, other=0) != 0)
                            _put(rows, row, mask, totals, FIRST, SUMS, WIDTH)
                else:
                    _put(rows, scope, tl.load(step_table + GRADS + scope) != 0, totals, FIRST, SUMS, WIDTH)
