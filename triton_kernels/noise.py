"""Gaussian noise of Philox's words, which fusedopt/noise.py describes; csrc/core/philox.h has the same polynomials."""

import triton
import triton.language as tl

from fusedopt.triton_kernels.signatures import compute, is_strided, n_offsets
from fusedopt.triton_kernels.walk import DRAW, FIRST_ELEMENT

QUARTER = tl.constexpr(1 << 22)  # of a turn, in 2**-24 turns
RADIANS = tl.constexpr(3.7450703e-7)  # of such a turn


@triton.jit
def _words(group, words, seed, stream, step):
    """The four words of groups of four elements each."""
    draw = tl.load(words + DRAW)
    key = seed.to(tl.uint64) | (((draw >> 32) + stream).to(tl.uint64) << 32)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    return tl.philox(key, low, high, tl.zeros_like(low) + draw.to(tl.uint32), tl.zeros_like(low) + step)


@triton.jit
def _joined(high, low):
    """A number of two halves of 16 bits."""
    return high.to(tl.uint32) * 65536 + low.to(tl.uint32)


@triton.jit
def _in_groups(words, at, SIGNATURES: tl.constexpr, K: tl.constexpr):
    """Whether elements are neighbours from a multiple of 4 on, and the logical index of the first."""
    first = tl.load(words + FIRST_ELEMENT) + at[3]
    return (first & 3) == 0, first


@triton.jit
def _index(words, at, first, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """The logical indices of elements."""
    if is_strided(SIGNATURES, K):
        return tl.load(words + FIRST_ELEMENT) + at[1][n_offsets(SIGNATURES, K) - 1]
    else:
        return first + tl.arange(0, SIZE)


@triton.jit
def _word(index, words, stream, step):
    """Elements' own words, of which each draws all of its group's."""
    a, b, c, d = _words(index >> 2, words, tl.zeros((), tl.uint32), stream, step)
    is_odd = (index & 1) != 0
    return tl.where((index & 2) != 0, tl.where(is_odd, d, c), tl.where(is_odd, b, a))


@triton.jit
def random_words(drawn, stream, at, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """The words of SIZE elements of a row, by which they are rounded.

    Args:
        drawn: The row's words, and the number of steps before in halves.
        stream: To be added to the row's.
        at: Where they are, see ``tile.locate``.
        SIGNATURES: See signatures.py.
        K: The row's.
        SIZE: How many.
    """
    words, high, low = drawn
    step = _joined(high, low)
    aligned, first = _in_groups(words, at, SIGNATURES, K)
    if is_strided(SIGNATURES, K):
        return _word(_index(words, at, first, SIGNATURES, K, SIZE), words, stream, step)
    else:
        if aligned:
            group = (first >> 2) + tl.arange(0, SIZE // 4)
            a, b, c, d = _words(group, words, tl.zeros((), tl.uint32), stream, step)
            word = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (SIZE,))
        else:
            word = _word(_index(words, at, first, SIGNATURES, K, SIZE), words, stream, step)
        return word


@triton.jit
def _normals(a, b, T: tl.constexpr):
    """Two standard normal numbers of two words."""
    u = ((a >> 8) + 1).to(T) * (1.0 / 16777216.0)
    radius = tl.sqrt(-2.0 * tl.log(u))
    turn = (b >> 8).to(tl.int32)
    if T == tl.float64:
        angle = turn.to(T) * (6.283185307179586 / 16777216.0)
        return radius * tl.cos(angle), radius * tl.sin(angle)
    else:
        quadrant = (turn + QUARTER // 2) // QUARTER
        y = (turn - quadrant * QUARTER).to(T) * RADIANS
        z = y * y
        sine = y + y * z * (-0.16666655242443085 + z * (0.008332177996635437 - z * 0.0001951729936990887))
        cosine = 1.0 - 0.5 * z + z * z * (0.04166664555668831 + z * (-0.0013887316454201937 + z * 2.44331567955669e-05))
        swaps = (quadrant & 1) != 0
        c, s = tl.where(swaps, sine, cosine), tl.where(swaps, cosine, sine)
        return (
            tl.where(((quadrant + 1) & 2) != 0, -radius * c, radius * c),
            tl.where((quadrant & 2) != 0, -radius * s, radius * s),
        )


@triton.jit
def _each(index, words, seed, step, T: tl.constexpr):
    """The numbers of elements, of which each draws all of its group's words."""
    a, b, c, d = _words(index >> 2, words, seed, 0, step)
    upper = (index & 2) != 0
    even, odd = _normals(tl.where(upper, c, a), tl.where(upper, d, b), T)
    return tl.where((index & 1) != 0, odd, even)


@triton.jit
def _groups(first, words, seed, step, SIZE: tl.constexpr, T: tl.constexpr):
    """The numbers of SIZE elements from one on whose index is a multiple of 4."""
    a, b, c, d = _words((first >> 2) + tl.arange(0, SIZE // 4), words, seed, 0, step)
    zeroth, one = _normals(a, b, T)
    two, three = _normals(c, d, T)
    return tl.reshape(tl.join(tl.join(zeroth, two), tl.join(one, three)), (SIZE,))


@triton.jit
def noise(words, at, drawn, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """That of SIZE elements of a row, in its compute type.

    Args:
        words: The row's.
        at: Where they are, see ``tile.locate``.
        drawn: The deviation, and seed and step in halves.
        SIGNATURES: See signatures.py.
        K: The row's.
        SIZE: How many.
    """
    T: tl.constexpr = compute(SIGNATURES, K)
    deviation, seed_high, seed_low, step_high, step_low = drawn
    seed, step = _joined(seed_high, seed_low), _joined(step_high, step_low)
    aligned, first = _in_groups(words, at, SIGNATURES, K)
    if is_strided(SIGNATURES, K):
        normal = _each(_index(words, at, first, SIGNATURES, K, SIZE), words, seed, step, T)
    else:
        if aligned:
            normal = _groups(first, words, seed, step, SIZE, T)
        else:
            normal = _each(_index(words, at, first, SIGNATURES, K, SIZE), words, seed, step, T)
    return deviation * normal
