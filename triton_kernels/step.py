"""The step kernel: the whole step of all tensors of a device, whatever the optimizer."""

import triton
import triton.language as tl

from fusedopt.layout import GroupFlag, StatusNumber
from fusedopt.triton_kernels.signatures import compute, count, n_states, states, widest
from fusedopt.triton_kernels.tile import PARTS, fetch, locate, put, whole_tiles
from fusedopt.triton_kernels.walk import (
    ADDRESSES,
    GRADS,
    GROUP,
    MAX_NORM,
    MEASURED,
    NEW_STATE,
    NUMEL,
    OPERAND_ADDRESSES,
    SHARES_UPDATED,
    SKIP_NONFINITE,
    SKIPPED,
    SKIPPED_STEPS,
    claim,
    is_last,
    load_hyper,
    load_scalars,
    row_of,
    segment,
    share_of,
    store_scalars,
    to_type,
)

DECOUPLED, SIGN = (tl.constexpr(int(flag)) for flag in GroupFlag)
N_FLAGS = tl.constexpr(len(GroupFlag))
SQUARED_NORM, NORM = (tl.constexpr(int(number)) for number in StatusNumber)


@triton.jit
def _decide(step_table, numbers, grad_scale, found_inf):
    """What becomes of a step: the gradients' factor, 1 / loss scale * clip; whether it is skipped; and the norm."""
    inverse = 1 / tl.load(grad_scale).to(tl.float64)
    measured = tl.load(step_table + MEASURED) != 0
    max_norm = tl.load(step_table + MAX_NORM).to(tl.float64, bitcast=True)
    norm = tl.where(measured, tl.sqrt(tl.load(numbers + SQUARED_NORM)) * inverse, 0.0)
    finite = norm < float("inf")
    skipped = (tl.load(found_inf) != 0) | ((tl.load(step_table + SKIP_NONFINITE) != 0) & (finite == 0))
    clip = max_norm / (norm + 1e-6)
    clip = tl.where((clip > 1) | (max_norm == float("inf")), 1.0, clip)
    return inverse * clip, skipped, norm


@triton.jit
def _engine_scalars(record, factor, mask, STEP_SCALE: tl.constexpr, N_HYPER: tl.constexpr):
    """What the engine, not the rule, needs of a group: gradient factor, coupled decay, decay factor and step scale."""
    lr, weight_decay = load_hyper(record, mask, 0, 2)
    flags = record + 2 * (2 + N_HYPER)
    decoupled = tl.load(flags + DECOUPLED) != 0
    gradient_factor = factor * tl.load(flags + SIGN).to(tl.float64)
    coupled_decay = tl.where(decoupled, 0.0, weight_decay)
    decay_factor = tl.where(decoupled, 1 - lr * weight_decay, 1.0)
    step_scale = lr if STEP_SCALE == "lr" else tl.full([], 1.0, tl.float64)
    return gradient_factor, coupled_decay, decay_factor, step_scale


@triton.jit
def _step(
    words, layouts, addresses, start, numel, engine, c, DIRECTION: tl.constexpr, SIGNATURES: tl.constexpr,
    K: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """SIZE elements' step, in the order of every engine.

    Unscale, clip and maximize (one factor); coupled decay; direction; decoupled decay and write.
    """
    gradient_factor, coupled_decay, decay_factor, step_scale = engine
    at = locate(words, layouts, start, numel, SIGNATURES, K, SIZE)
    p = fetch(addresses[0], at, SIGNATURES, K, 0, FULL)
    g = fetch(addresses[1], at, SIGNATURES, K, 1, FULL) * gradient_factor
    state = ()
    for k in tl.static_range(n_states(SIGNATURES, K)):
        state = state + (fetch(addresses[2 + k], at, SIGNATURES, K, 2 + k, FULL),)
    g = tl.where(coupled_decay != 0, g + coupled_decay * p, g)
    d, state = DIRECTION(p, g, state, c, states(SIGNATURES, K))
    put(addresses[0], at, decay_factor * p - step_scale * d, SIGNATURES, K, 0, FULL)
    for k in tl.static_range(n_states(SIGNATURES, K)):
        put(addresses[2 + k], at, state[k], SIGNATURES, K, 2 + k, FULL)


@triton.jit
def _cohort(rows, step_table, row, mask, WIDTH: tl.constexpr):
    """A number that rows share whose hyperparameters are the same: twice the group, plus one if states are new.

    It is -1 for rows without a gradient.
    """
    grad = tl.load(step_table + GRADS + row, mask=mask, other=0)
    group = tl.load(rows + row * WIDTH + GROUP, mask=mask, other=0)
    return tl.where(grad != 0, 2 * group + (grad & NEW_STATE), -1).to(tl.int32)


@triton.jit
def _counted(scalars):
    """The scalars with ``step``, which is first, one further."""
    out = ()
    for k in tl.static_range(len(scalars)):
        out = out + ((scalars[k] + 1 if k == 0 else scalars[k]),)
    return out


@triton.jit
def _row(
    words, layouts, grad, begin, end, engine, c, DIRECTION: tl.constexpr, SIGNATURES: tl.constexpr,
    K: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of a row, the last first: the norm kernel has just read the last."""
    numel = tl.load(words + NUMEL)
    addresses = (tl.load(words + OPERAND_ADDRESSES), grad)
    for k in tl.static_range(n_states(SIGNATURES, K)):
        addresses = addresses + (tl.load(words + OPERAND_ADDRESSES + ADDRESSES * (1 + k)),)
    engine = to_type(engine, compute(SIGNATURES, K))
    c = to_type(c, compute(SIGNATURES, K))
    full_end = whole_tiles(addresses, begin, end, numel, SIGNATURES, K, TILE)
    PART: tl.constexpr = TILE // PARTS
    for at in range(full_end.to(tl.int64) * TILE, tl.minimum(end.to(tl.int64) * TILE, numel), PART):
        _step(words, layouts, addresses, at, numel, engine, c, DIRECTION, SIGNATURES, K, PART, False)
    for back in tl.range(begin, full_end, num_stages=STAGES):
        at = (begin + full_end - 1 - back).to(tl.int64) * TILE
        _step(words, layouts, addresses, at, numel, engine, c, DIRECTION, SIGNATURES, K, TILE, True)


@triton.jit
def _count_cohort(rows, tiles, first, last, begin, end, scalars, FIRST: tl.constexpr, WIDTH: tl.constexpr):
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
def _count_borders(
    rows, borders, step_table, records, n_borders, PREPARE: tl.constexpr, N_SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Counts the step in the other rows; all programs are done with them."""
    lanes = tl.arange(0, 128)
    for at in range(0, n_borders, 128):
        mask = at + lanes < n_borders
        row = tl.load(borders + at + lanes, mask=mask, other=0)
        cohort = _cohort(rows, step_table, row, mask, WIDTH)
        active = cohort >= 0
        scalars = _counted(load_scalars(rows, row, active, FIRST, N_SCALARS, WIDTH))
        if N_SCALARS > 1:  # more than `step`: the rule advances them
            record = records + tl.maximum(cohort >> 1, 0) * (2 * (2 + N_HYPER) + N_FLAGS)
            _, scalars = PREPARE(load_hyper(record, active, 2, N_HYPER), scalars, (cohort & 1) != 0)
        store_scalars(rows, row, active, scalars, FIRST, WIDTH)


@triton.jit(
    do_not_specialize=["n_rows", "n_shares", "n_borders"], do_not_specialize_on_alignment=["grad_scale", "found_inf"]
)
def step(
    rows, tiles, shares, borders, layouts, step_table, numbers, counts, grad_scale, found_inf, n_rows, n_shares,
    n_borders, DIRECTION: tl.constexpr, PREPARE: tl.constexpr, STEP_SCALE: tl.constexpr, N_STATES: tl.constexpr,
    N_SCALARS: tl.constexpr, N_HYPER: tl.constexpr, SIGNATURES: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One step of every row that has a gradient, unless it is skipped.

    Args:
        rows: See fusedopt/layout.py for these eight.
        tiles: Tiles before each row.
        shares: Where each begins.
        borders: Rows that no share has whole.
        layouts: Of strided rows.
        step_table: What changes from step to step.
        numbers: What is told of the step; the squared norm, if it was measured.
        counts: The same.
        grad_scale: One float, the loss scale.
        found_inf: One float; not 0 to skip the step.
        n_rows: How many.
        n_shares: How many.
        n_borders: How many.
        DIRECTION: The rule's, see rules/.
        PREPARE: The rule's.
        STEP_SCALE: The rule's.
        N_STATES: How many states the rule has at most.
        N_SCALARS: How many scalars it has.
        N_HYPER: How many hyperparameters.
        SIGNATURES: See signatures.py.
        WIDTH: Of ``rows``.
        TILE: Elements of a tile, a power of two.
        STAGES: Rounds of the loops over full tiles under way at once; None to leave that to Triton.
    """
    records = step_table + GRADS + n_rows
    factor, skipped, norm = _decide(step_table, numbers, grad_scale, found_inf)
    FIRST: tl.constexpr = OPERAND_ADDRESSES + ADDRESSES * (1 + N_STATES)  # of a row's scalars
    if skipped == 0:
        claimed = tl.program_id(0)
        while claimed < n_shares:
            following = claim(n_shares, counts + SHARES_UPDATED)
            begin, end, first_row, row = share_of(shares, n_shares - 1 - claimed)
            left = end - begin
            while left > 0:  # rows of one cohort after another: `prepare` runs when the cohort changes
                cohort = _cohort(rows, step_table, row, row >= 0, WIDTH)
                active = cohort >= 0
                record = records + tl.maximum(cohort >> 1, 0) * (2 * (2 + N_HYPER) + N_FLAGS)
                scalars = load_scalars(rows, row, active, FIRST, N_SCALARS, WIDTH)
                c, counted = PREPARE(load_hyper(record, active, 2, N_HYPER), _counted(scalars), (cohort & 1) != 0)
                c = to_type(c, widest(SIGNATURES))
                engine = to_type(_engine_scalars(record, factor, active, STEP_SCALE, N_HYPER), widest(SIGNATURES))
                last = row
                same = left > 0
                while same:
                    low, high = segment(tiles, row, begin, end)
                    words, grad, signature = row_of(rows, step_table, row, WIDTH)
                    for k in tl.static_range(count(SIGNATURES)):
                        if active & (signature == k):
                            _row(
                                words, layouts, grad, low, high, engine, c, DIRECTION, SIGNATURES, k, TILE, STAGES,
                            )  # fmt: skip
                    left -= high - low
                    row -= 1
                    same = left > 0
                    same = same & (_cohort(rows, step_table, row, same, WIDTH) == cohort)
                    ahead = load_scalars(rows, row, same & active, FIRST, N_SCALARS, WIDTH)
                    for k in tl.static_range(N_SCALARS):
                        same = same & (ahead[k] == scalars[k])
                if N_SCALARS > 0:
                    if active:
                        _count_cohort(rows, tiles, row + 1, last, begin, end, counted, FIRST, WIDTH)
            claimed = following
    if is_last(counts):
        tl.store(numbers + NORM, norm)
        tl.store(counts + SKIPPED_STEPS, tl.load(counts + SKIPPED_STEPS) + skipped.to(tl.int32))
        tl.store(counts + SKIPPED, skipped.to(tl.int32))
        if (skipped == 0) & (N_SCALARS > 0):
            _count_borders(
                rows, borders, step_table, records, n_borders, PREPARE, N_SCALARS, N_HYPER, FIRST, WIDTH,
            )  # fmt: skip
