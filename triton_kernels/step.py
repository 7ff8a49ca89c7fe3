"""The step kernel: the whole step of all tensors of a device, whatever the optimizer."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.variants import compute, count, is_strided, n_states, states, widest
from fusedopt.triton_kernels.walk import (
    ADDRESSES,
    HEADER,
    KIND,
    MAX_NORM,
    MEASURED,
    NUMEL,
    SKIP,
    advance,
    aligned,
    cohort_of,
    is_last,
    load_hyper,
    load_scalars,
    operands,
    place,
    read,
    share,
    store_scalars,
    to_type,
    word,
    write,
)

# What is not a full, aligned tile goes in parts: fewer registers, and small tensors fill a part better.
PARTS = tl.constexpr(4)
# Words of a group's record beyond its pairs.
FLAGS = tl.constexpr(2)


@triton.jit
def _decide(live, verdict, grad_scale, found_inf):
    """What the gradients are multiplied with: 1 / loss scale * clip; and whether the step is skipped, and the norm."""
    inverse = 1 / tl.load(grad_scale).to(tl.float64)
    measured = tl.load(live + MEASURED) != 0
    max_norm = tl.load(live + MAX_NORM).to(tl.float64, bitcast=True)
    norm = tl.where(measured, tl.sqrt(tl.load(verdict)) * inverse, 0.0)
    finite = norm < float("inf")
    skipped = (tl.load(found_inf) != 0) | ((tl.load(live + SKIP) != 0) & (finite == 0))
    clip = max_norm / (norm + 1e-6)
    clip = tl.where((clip > 1) | (max_norm == float("inf")), 1.0, clip)
    return inverse * clip, skipped, norm


@triton.jit
def _block(
    rows, row, layouts, addresses, start, numel, common, c, DIRECTION: tl.constexpr, KINDS: tl.constexpr,
    K: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """SIZE elements' step: unscale, clip and maximize (one factor), coupled L2, rule, decoupled decay, write."""
    factor, coupled_decay, keep, lr = common
    lanes = tl.arange(0, SIZE)
    mask = start + lanes < numel
    places = ()
    if is_strided(KINDS, K):
        places = place(rows, row, layouts, start + lanes, KINDS, K, WIDTH)
        start = start * 0
    else:
        for _ in tl.static_range(2 + n_states(KINDS, K)):
            places = places + (lanes,)
    p = read(addresses[0], start, places[0], mask, KINDS, K, 0, FULL)
    g = read(addresses[1], start, places[1], mask, KINDS, K, 1, FULL) * factor
    state = ()
    for k in tl.static_range(n_states(KINDS, K)):
        state = state + (read(addresses[2 + k], start, places[2 + k], mask, KINDS, K, 2 + k, FULL),)
    g = tl.where(coupled_decay != 0, g + coupled_decay * p, g)
    d, state = DIRECTION(p, g, state, c, states(KINDS, K))
    write(addresses[0], start, places[0], mask, keep * p - lr * d, KINDS, K, 0, FULL)
    for k in tl.static_range(n_states(KINDS, K)):
        write(addresses[2 + k], start, places[2 + k], mask, state[k], KINDS, K, 2 + k, FULL)


@triton.jit
def _row(
    rows, row, layouts, gradient, begin, end, common, c, DIRECTION: tl.constexpr, KINDS: tl.constexpr,
    K: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tiles [begin, end) of a row, the last first: the norm kernel has just read the last."""
    numel = tl.load(rows + row * WIDTH + NUMEL)
    addresses = operands(rows, row, gradient, KINDS, K, WIDTH)
    common = to_type(common, compute(KINDS, K))
    c = to_type(c, compute(KINDS, K))
    full_end = begin
    if not is_strided(KINDS, K):
        if aligned(addresses):
            full_end = tl.maximum(tl.minimum(end, (numel // TILE).to(tl.int32)), begin)
    PART: tl.constexpr = TILE // PARTS
    for at in range(full_end.to(tl.int64) * TILE, tl.minimum(end.to(tl.int64) * TILE, numel), PART):
        _block(rows, row, layouts, addresses, at, numel, common, c, DIRECTION, KINDS, K, WIDTH, PART, False)
    for back in range(begin, full_end):
        at = (begin + full_end - 1 - back).to(tl.int64) * TILE
        _block(rows, row, layouts, addresses, at, numel, common, c, DIRECTION, KINDS, K, WIDTH, TILE, True)


@triton.jit
def _common(group, factor, active, N_HYPER: tl.constexpr):
    """What the engine, not the rule, needs of a group: gradient factor, coupled decay, keep and lr."""
    lr, weight_decay = load_hyper(group, active, 0, 2)
    flags = group + 2 * (2 + N_HYPER)
    decoupled = tl.load(flags) != 0
    factor *= tl.load(flags + 1).to(tl.float64)
    coupled_decay = tl.where(decoupled, 0.0, weight_decay)
    keep = tl.where(decoupled, 1 - lr * weight_decay, 1.0)
    return factor, coupled_decay, keep, lr


@triton.jit
def _advance_scalars(
    rows, live, groups, n_rows, PREPARE: tl.constexpr, N_STATES: tl.constexpr, N_SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Counts the step in all rows that have a gradient."""
    lanes = tl.arange(0, 256)
    for base in range(0, n_rows, 256):
        row = base + lanes
        cohort = cohort_of(rows, row, live, row < n_rows, WIDTH)
        active = cohort >= 0
        group = groups + (cohort >> 1) * (2 * (2 + N_HYPER) + FLAGS)
        scalars = advance(load_scalars(rows, row, active, ADDRESSES + 1 + N_STATES, N_SCALARS, WIDTH))
        c, scalars = PREPARE(load_hyper(group, active, 2, N_HYPER), scalars, (cohort & 1) != 0)
        store_scalars(rows, row, active, scalars, ADDRESSES + 1 + N_STATES, WIDTH)


@triton.jit(do_not_specialize=["n_rows"])
def step(
    rows, tiles, shares, layouts, live, verdict, counters, grad_scale, found_inf, n_rows, DIRECTION: tl.constexpr,
    PREPARE: tl.constexpr, N_STATES: tl.constexpr, N_SCALARS: tl.constexpr, N_HYPER: tl.constexpr,
    KINDS: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One step of every row that has a gradient, unless it is skipped.

    Args:
        rows: See walk.py for these four.
        tiles: Tiles before each row.
        shares: Where each program begins.
        live: What changes from step to step.
        layouts: int64, shapes and strides of strided rows.
        verdict: Doubles: the squared norm, if it was measured; then, written here, the norm.
        counters: int32: 0 between launches; steps skipped; whether this one was.
        grad_scale: One float, the loss scale.
        found_inf: One float; not 0 to skip the step.
        n_rows: How many.
        DIRECTION: The rule's, see rules/.
        PREPARE: The rule's.
        N_STATES: How many states the rule has at most.
        N_SCALARS: How many scalars it has.
        N_HYPER: How many hyperparameters.
        KINDS: See variants.py.
        WIDTH: Of ``rows``.
        TILE: Elements of a tile, a power of two.
    """
    factor, skipped, norm = _decide(live, verdict, grad_scale, found_inf)
    groups = live + HEADER + n_rows
    if skipped == 0:
        begin, left, _, row = share(shares)
        while left > begin:  # rows of one cohort after another: `prepare` runs when the cohort changes
            cohort = cohort_of(rows, row, live, row >= 0, WIDTH)
            group = groups + tl.maximum(cohort >> 1, 0) * (2 * (2 + N_HYPER) + FLAGS)
            scalars = load_scalars(rows, row, cohort >= 0, ADDRESSES + 1 + N_STATES, N_SCALARS, WIDTH)
            h = load_hyper(group, cohort >= 0, 2, N_HYPER)
            c, after = PREPARE(h, advance(scalars), (cohort & 1) != 0)
            c = to_type(c, widest(KINDS))
            common = to_type(_common(group, factor, cohort >= 0, N_HYPER), widest(KINDS))
            same = left > begin
            while same:
                first = word(tiles + row)
                stop = tl.minimum(word(tiles + row + 1), left)
                kind = word(rows + row * WIDTH + KIND)
                gradient = tl.load(live + HEADER + row) & ~1
                left = tl.maximum(tl.minimum(first, left), begin)
                for k in tl.static_range(count(KINDS)):
                    if (cohort >= 0) & (kind == k):
                        _row(
                            rows, row, layouts, gradient, left - first, stop - first, common, c, DIRECTION, KINDS, k,
                            WIDTH, TILE,
                        )  # fmt: skip
                row -= 1
                same = left > begin
                same = same & (cohort_of(rows, row, live, same, WIDTH) == cohort)
                ahead = load_scalars(rows, row, same & (cohort >= 0), ADDRESSES + 1 + N_STATES, N_SCALARS, WIDTH)
                for k in tl.static_range(N_SCALARS):
                    same = same & (ahead[k] == scalars[k])
    if is_last(counters):
        tl.store(verdict + 1, norm)
        tl.store(counters + 1, tl.load(counters + 1) + skipped.to(tl.int32))
        tl.store(counters + 2, skipped.to(tl.int32))
        if (skipped == 0) & (N_SCALARS > 0):
            _advance_scalars(rows, live, groups, n_rows, PREPARE, N_STATES, N_SCALARS, N_HYPER, WIDTH)
