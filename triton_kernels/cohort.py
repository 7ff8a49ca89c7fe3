"""What programs know before they look at elements: what becomes of a step, and what rows have in common."""

import triton
import triton.language as tl

from fusedopt.layout import GroupFlag, OptionNumber, StatusNumber
from fusedopt.triton_kernels.walk import (
    ADDRESSES,
    COUNTER,
    GRADS,
    GROUP,
    MAX_NORM,
    MEASURED,
    NEW_AVERAGE,
    NEW_STATE,
    OPERAND_ADDRESSES,
    SKIP_NONFINITE,
    load_hyper,
    load_number,
    load_scalars,
    to_type,
)

DECOUPLED, SIGN, CAUTIOUS = (tl.constexpr(int(flag)) for flag in GroupFlag)
N_FLAGS = tl.constexpr(len(GroupFlag))
NUMBERS = tl.constexpr(len(OptionNumber))
SQUARED_NORM, NORM, NARROW_NORM = (tl.constexpr(int(number)) for number in StatusNumber)


@triton.constexpr_function
def first_scalar(n_states):
    """Which of a row's words has the address of its first scalar; an average is one more state."""
    return OPERAND_ADDRESSES.value + ADDRESSES.value * (1 + n_states)


@triton.constexpr_function
def n_numbers(n_hyper, options):
    """How many numbers a group's record has behind lr and weight decay."""
    return n_hyper + (NUMBERS.value if options else 0)


@triton.jit
def decide(step_table, numbers, grad_scale, found_inf):
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
def engine_scalars(
    record, factor, mask, cohort, count, STEP_SCALE: tl.constexpr, N_HYPER: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """What the engine, not the rule, needs of a cohort: gradient factor, coupled decay, decay factor and step scale.

    With options also the decay factor where direction and parameter have opposite signs; the weight of the parameter in
    an EMA, and in slow weights, and whether these are due; the noise's deviation; and the seed and the number of steps
    before, each in halves of 16 bits, which every type holds.
    """
    lr, weight_decay = load_hyper(record, mask, 0, 2)
    flags = record + 2 * (2 + n_numbers(N_HYPER, OPTIONS))
    decoupled = tl.load(flags + DECOUPLED) != 0
    gradient_factor = factor * tl.load(flags + SIGN).to(tl.float64)
    coupled_decay = tl.where(decoupled, 0.0, weight_decay)
    decay_factor = tl.where(decoupled, 1 - lr * weight_decay, 1.0)
    step_scale = lr if STEP_SCALE == "lr" else tl.full([], 1.0, tl.float64)
    if OPTIONS == "":
        return gradient_factor, coupled_decay, decay_factor, step_scale
    else:
        opposed_factor = tl.where(tl.load(flags + CAUTIOUS) != 0, 1.0, decay_factor)
        # An average's are an EMA's decay and 0, or a period and alpha.
        first, alpha, eta, gamma, seed = load_hyper(record, mask, 2 + N_HYPER, NUMBERS)
        step, period = tl.maximum(count + 1, 1.0), tl.maximum(first, 1.0)
        ema_weight = tl.where((cohort & 2) != 0, 1.0, 1 - first)
        is_due = (step - tl.floor(step / period) * period == 0).to(tl.float64)
        deviation = tl.sqrt(eta * tl.exp(-gamma * tl.log(step)))
        seed_high, before_high = tl.floor(seed / 65536.0), tl.floor((step - 1) / 65536.0)
        halves = seed_high, seed - seed_high * 65536.0, before_high, step - 1 - before_high * 65536.0
        own = gradient_factor, coupled_decay, decay_factor, step_scale, opposed_factor, ema_weight, alpha, is_due
        return own + (deviation,) + halves


@triton.jit
def count_of(words, scalars, mask, OPTIONS: tl.constexpr):
    """How many steps were counted of a row, whose words are at ``words``, or of each of a block of rows."""
    if OPTIONS == "rule":
        return scalars[0]
    else:
        address = tl.load(words + COUNTER, mask=mask, other=0)
        return load_number(address, mask & (address != 0))


@triton.jit
def record_of(records, cohort, N_HYPER: tl.constexpr, OPTIONS: tl.constexpr):
    """The record of a cohort's group."""
    return records + tl.maximum(cohort >> 2, 0) * (2 * (2 + n_numbers(N_HYPER, OPTIONS)) + N_FLAGS)


@triton.jit
def cohort_of(rows, step_table, row, mask, WIDTH: tl.constexpr):
    """A number that rows share whose hyperparameters are the same.

    It is four times the group, plus one if states are new, plus two if averages are; -1 for rows without a gradient.
    """
    grad = tl.load(step_table + GRADS + row, mask=mask, other=0)
    group = tl.load(rows + row * WIDTH + GROUP, mask=mask, other=0)
    return tl.where(grad != 0, 4 * group + ((grad & NEW_AVERAGE) >> 61) + (grad & NEW_STATE), -1).to(tl.int32)


@triton.jit
def counted(scalars):
    """The scalars with ``step``, which is first, one further."""
    out = ()
    for k in tl.static_range(len(scalars)):
        out = out + ((scalars[k] + 1 if k == 0 else scalars[k]),)
    return out


@triton.jit
def prepare_cohort(
    rows, step_table, records, row, factor, PREPARE: tl.constexpr, STEP_SCALE: tl.constexpr, N_SCALARS: tl.constexpr,
    N_HYPER: tl.constexpr, OPTIONS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """What the rows of a row's cohort have in common.

    Returns:
        The cohort; its scalars before and after the step; how many steps were counted; the rule's coefficients, of type
        C; and the engine's scalars, of type T.
    """
    cohort = cohort_of(rows, step_table, row, row >= 0, WIDTH)
    active = cohort >= 0
    record = record_of(records, cohort, N_HYPER, OPTIONS)
    scalars = load_scalars(rows, row, active, FIRST, N_SCALARS, WIDTH)
    c, after = PREPARE(load_hyper(record, active, 2, N_HYPER), counted(scalars), (cohort & 1) != 0)
    steps = count_of(rows + row * WIDTH, scalars, active, OPTIONS)
    engine = engine_scalars(record, factor, active, cohort, steps, STEP_SCALE, N_HYPER, OPTIONS)
    return cohort, scalars, after, steps, to_type(c, C), to_type(engine, T)


@triton.jit
def is_of_cohort(
    rows, step_table, row, more, cohort, scalars, steps, N_SCALARS: tl.constexpr, OPTIONS: tl.constexpr,
    FIRST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Whether a row is of a cohort with these scalars and steps, if there is more to do at all."""
    same = more & (cohort_of(rows, step_table, row, more, WIDTH) == cohort)
    active = same & (cohort >= 0)
    own = load_scalars(rows, row, active, FIRST, N_SCALARS, WIDTH)
    for k in tl.static_range(N_SCALARS):
        same = same & (own[k] == scalars[k])
    if OPTIONS == "engine":
        same = same & (count_of(rows + row * WIDTH, own, active, OPTIONS) == steps)
    return same
