"""How blocks of elements are decoded and encoded; fusedopt/codecs.py says what each codec is.

A block of SIZE elements begins with whole blocks of codes, and has whole ones.
"""

import triton
import triton.language as tl

from fusedopt.operands import BLOCK as _BLOCK
from fusedopt.operands import Q8_SIGNED, Q8_UNSIGNED
from fusedopt.triton_kernels.noise import random_words

BLOCK = tl.constexpr(_BLOCK)
SIGNED, UNSIGNED = tl.constexpr(Q8_SIGNED.name), tl.constexpr(Q8_UNSIGNED.name)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: a float plus this has the nearest integer in its lowest bits
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(value, T: tl.constexpr):
    """The value in type T, rounded to the nearest, ties to even."""
    if INTERPRETED and T == tl.bfloat16:  # the interpreter cuts it off
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        up = bits + 0x7FFF + ((bits >> 16) & 1)
        return _upper(up, value)
    else:
        return value.to(T)


@triton.jit
def _upper(bits, value):
    """bfloat16 of the upper halves of bits; NaN where the value is."""
    quiet = value.to(tl.float32).to(tl.int32, bitcast=True) | 0x400000
    bits = tl.where(value == value, bits, quiet)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _bits(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def _as_upper(half):
    """The bits of a bfloat16 as the upper ones of a float."""
    return half.to(tl.int16, bitcast=True).to(tl.int32) << 16


@triton.jit
def visible(master, T: tl.constexpr):
    """A master as its parameter: bfloat16 half away from zero, float16 to the nearest even."""
    if T == tl.bfloat16:
        return _upper(_bits(master) + 0x8000, master)
    else:
        return master.to(T)


@triton.jit
def joined(half, low):
    """The master of a bfloat16 parameter and what is missing to it."""
    own = _as_upper(half)
    master = (own + low.to(tl.int16, bitcast=True).to(tl.int32)).to(tl.float32, bitcast=True)
    return tl.where(master == master, master, own.to(tl.float32, bitcast=True))


@triton.jit
def missing(master):
    """What is missing to a master from its parameter."""
    low = tl.where(master == master, _bits(master), 0)
    return low.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def current_master(half, master, T: tl.constexpr):
    """The master, but the parameter where that is not the rounded master."""
    is_its = visible(master, T).to(tl.int16, bitcast=True) == half.to(tl.int16, bitcast=True)
    return tl.where(is_its, master, half.to(tl.float32))


@triton.jit
def rounded_by(value, words):
    """bfloat16 of a value, by random words."""
    return _upper(_bits(value) + (words >> 16).to(tl.int32), value)


@triton.jit
def dequantized(codes, scales, CODEC: tl.constexpr, SIZE: tl.constexpr):
    """The values of codes, whose blocks have these scales."""
    N: tl.constexpr = SIZE // BLOCK
    LEVELS: tl.constexpr = 127.0 if CODEC == SIGNED else 255.0
    root = tl.sqrt_rn(scales) / LEVELS
    q = tl.reshape(codes.to(tl.int32), (N, BLOCK))
    if CODEC == SIGNED:
        u = (q - 128).to(tl.float32) * tl.expand_dims(root, 1)
        return tl.reshape(u * tl.abs(u), (SIZE,))
    else:
        u = q.to(tl.float32) * tl.expand_dims(root, 1)
        return tl.reshape(u * u, (SIZE,))


@triton.jit
def quantized(value, mask, CODEC: tl.constexpr, SIZE: tl.constexpr, FULL: tl.constexpr):
    """Codes of values, and the scales of their blocks; what is not there is 0."""
    N: tl.constexpr = SIZE // BLOCK
    LEVELS: tl.constexpr = 127.0 if CODEC == SIGNED else 255.0
    if not FULL:
        value = tl.where(mask, value, 0.0)
    x = tl.reshape(value, (N, BLOCK))
    most = tl.max(_bits(x) & 0x7FFFFFFF, axis=1)  # NaN is above infinity
    scales = most.to(tl.float32, bitcast=True)
    is_finite = most < 0x7F800000
    factor = tl.where(is_finite & (most > 0), LEVELS / tl.sqrt_rn(tl.where(most > 0, scales, 1.0)), 0.0)
    root = tl.sqrt(tl.abs(x))
    q = tl.where(root < float("inf"), root, 0.0) * tl.expand_dims(factor, 1)
    if CODEC == SIGNED:
        codes = _bits(tl.where(x < 0, -q, q) + ROUNDER) + 128
    else:
        codes = _bits(q + ROUNDER) & 0xFF
        codes = tl.where(x != 0, tl.maximum(codes, 1), codes)
    codes = tl.where(tl.expand_dims(is_finite, 1), codes, 0xFF)
    return tl.reshape(codes.to(tl.uint8), (SIZE,)), tl.where(is_finite, scales, float("nan"))


@triton.jit
def words_of(drawn, OPERAND: tl.constexpr, at, SIGNATURES: tl.constexpr, K: tl.constexpr, SIZE: tl.constexpr):
    """The words that round an operand's elements; ``drawn`` are a row's words, and the step in halves."""
    return random_words(drawn, 1 if OPERAND == 0 else OPERAND, at, SIGNATURES, K, SIZE)
