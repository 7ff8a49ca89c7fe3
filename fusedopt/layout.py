"""The tables that engines on a device read, word by word: what writes and what reads them takes its places from here.

=============  ==========================  =============================================================================
table          dtype, shape                what it holds
=============  ==========================  =============================================================================
``rows``       int64 (n_rows, width)       what stands as long as a plan, see ``RowWord``
``tiles``      int64 (n_rows + 1)          the number of tiles before each row; at the end, of all
``shares``     int64 (n_shares + 1, 2)     the first tile of each share, and its row; at the end, the number of tiles
                                           and the last row
``borders``    int64 (n_borders)           the numbers of rows that no share has whole: what updates a share counts the
                                           step of the others
``layouts``    int64                       of each strided row the number of dimensions, the words of each, and of each,
                                           innermost first, its size and the strides of every operand, of partners that
                                           have the row's shape, and, where anything is drawn, of the logical index
``step_table`` int64                       what changes from step to step: ``StepWord``, a gradient's word for each
                                           row, and a record for each group
``partials``   float64 (n_shares)          sums of the gradients' squares
``row_sums``   int64 (n_rows + 1, 5)       where a row's sums go, see ``SumsWord``; the last has only the
                                           number of segments
``slots``      float64 (n_slots, n_sums)   what each share adds up of each segment; see below
``numbers``    float64, `StatusNumber`     what a launch tells of the step
``counts``     int32, `StatusCount`        the same; what counts a launch's progress is 0 between launches
=============  ==========================  =============================================================================

A row may have several segments, over which its elements are added up (fusedopt/sums.py). Then each segment has tiles of
its own, the last of which may be short; else all of a row's elements are one. The sums of what one worker on a share, a
"run", finds in a segment are at slot ``run + segment``: along the tiles one of the two grows with every slot. Epilogues
have slots of their own, and rows for segments.

Where a row has blocks of codes and its slices of dimension 0 are no multiples of them, it is padded: each slice has
places for whole blocks, of which those after its elements are empty. Tiles are of places, and so of whole blocks.
Scales are found by blocks of places, in their order.

csrc/core/device_tables.h has the same places for C++, and a test compares the two.
"""

from __future__ import annotations

from enum import IntEnum

ADDRESSES = 2  # of an operand: how many its codec may have
NEW_STATE = 1  # added to a gradient's word: the row's states were made for this step
NEW_AVERAGE = 1 << 62  # the same of its average
NO_MEMORY = 2  # a gradient's word where the gradient has no elements; without a gradient it is 0


class RowWord(IntEnum):
    """Of a row of ``rows``.

    After the last come ADDRESSES of the parameter, of each of the rule's states, and of the average where the plan has
    any, then the address of each of the rule's scalars, whose bit 0 is set when it is a double, not a float.
    """

    NUMEL = 0  # of complex tensors, real numbers; of padded rows, places
    SIGNATURE = 1  # its number among the plan's
    LAYOUT = 2  # where in ``layouts`` it begins
    GROUP = 3
    COUNTER = 4  # the address of the step that the engine counts, like a scalar's; 0 if it does not
    DRAW = 5  # what is drawn by: the tensor's number, and 2**32 times the stream
    FIRST_ELEMENT = 6  # the logical index of its first element in the whole tensor
    SLICE = 7  # elements that blocks lie inside of, where the row is padded; see below
    OPERAND_ADDRESSES = 8


class StepWord(IntEnum):
    """Of ``step_table``.

    After the gradients' words come the groups' records: for lr, weight decay and each of the rule's hyperparameters the
    bits of a double and the address of a tensor that has it instead (0: none; bit 0: it is a double), the same of
    OptionNumber where any group asks for averages, noise or cautious decay, then GroupFlag.
    """

    MAX_NORM = 0  # the bits of a double
    MEASURED = 1  # whether the status has the squared norm
    SKIP_NONFINITE = 2
    GRADS = 3


class OptionNumber(IntEnum):
    """Behind the hyperparameters of a record, where any group asks for averages, noise or cautious decay."""

    DECAY_OR_PERIOD = 0
    ALPHA = 1
    ETA = 2
    GAMMA = 3
    SEED = 4


class GroupFlag(IntEnum):
    """At the end of a group's record."""

    DECOUPLED = 0
    SIGN = 1  # -1 to maximize
    CAUTIOUS = 2


class SumsWord(IntEnum):
    """Of a row of ``row_sums``."""

    FIRST_SEGMENT = 0
    SEGMENT_LENGTH = 1  # elements; of complex tensors, real numbers
    SCOPE = 2
    FIRST_SHARE = 3  # that has tiles of it
    LAST_SHARE = 4


class StatusNumber(IntEnum):
    """Of ``numbers``."""

    SQUARED_NORM = 0  # of the gradients as they are
    NORM = 1  # after unscaling
    NARROW_NORM = 2  # the same, a float32 in the first half


class StatusCount(IntEnum):
    """Of ``counts``."""

    DONE = 0  # programs
    SKIPPED_STEPS = 1
    SKIPPED = 2  # whether the last step was
    SHARES_MEASURED = 3  # claimed, in the pass over gradients
    SHARES_UPDATED = 4
    SHARES_SUMMED = 5


def row_width(n_states: int, n_scalars: int) -> int:
    """Words of a row; an average is one more state."""
    return RowWord.OPERAND_ADDRESSES + ADDRESSES * (1 + n_states) + n_scalars


def record_width(n_hyper: int) -> int:
    """Words of a group's record."""
    return 2 * (2 + n_hyper) + len(GroupFlag)
