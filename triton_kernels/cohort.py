"""What programs know before they look at elements: what becomes of a step, and what rows have in common."""

import triton
import triton.language as tl

from fusedopt.layout import GroupFlag, StatusNumber
from fusedopt.triton_kernels.walk import (
    ADDRESSES,
    GRADS,
    GROUP,
    MAX_NORM,
    MEASURED,
    NEW_STATE,
    OPERAND_ADDRESSES,
    SKIP_NONFINITE,
    load_hyper,
)

DECOUPLED, SIGN = (tl.constexpr(int(flag)) for flag in GroupFlag)
N_FLAGS = tl.constexpr(len(GroupFlag))
SQUARED_NORM, NORM = (tl.constexpr(int(number)) for number in StatusNumber)


@triton.constexpr_function
def first_scalar(n_states):
    """Which of a row's words has the address of its first scalar."""
    return OPERAND_ADDRESSES.value + ADDRESSES.value * (1 + n_states)


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
def engine_scalars(record, factor, mask, STEP_SCALE: tl.constexpr, N_HYPER: tl.constexpr):
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
def record_of(records, cohort, N_HYPER: tl.constexpr):
    """The record of a cohort's group."""
    return records + tl.maximum(cohort >> 1, 0) * (2 * (2 + N_HYPER) + N_FLAGS)


@triton.jit
def cohort_of(rows, step_table, row, mask, WIDTH: tl.constexpr):
    """A number that rows share whose hyperparameters are the same: twice the group, plus one if states are new.

    It is -1 for rows without a gradient.
    """
    grad = tl.load(step_table + GRADS + row, mask=mask, other=0)
    group = tl.load(rows + row * WIDTH + GROUP, mask=mask, other=0)
    return tl.where(grad != 0, 2 * group + (grad & NEW_STATE), -1).to(tl.int32)


@triton.jit
def counted(scalars):
    """The scalars with ``step``, which is first, one further."""
    out = ()
    for k in tl.static_range(len(scalars)):
        out = out + ((scalars[k] + 1 if k == 0 else scalars[k]),)
    return out
