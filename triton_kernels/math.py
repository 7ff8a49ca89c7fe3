"""Small numeric helpers for rules, on values of any floating type and shape. All propagate NaN."""

import triton
import triton.language as tl


@triton.jit
def sqrt(x):
    """The root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def div(a, b):
    """The quotient, correctly rounded."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def lerp(a, b, w):
    """``a + w (b - a)``, from the nearer end, so that w = 0 and w = 1 are exact."""
    return tl.where(w < 0.5, a + w * (b - a), b - (1 - w) * (b - a))


@triton.jit
def sign(x):
    """The sign; that of 0 is 0, and NaN stays."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x)).to(x.dtype)


@triton.jit
def maximum(a, b):
    """The larger; a NaN in either survives."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, low, high):
    """The nearest value between low and high; NaN stays."""
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def bias_correction(beta, t):
    """``1 - beta**t`` in double precision, without the cancellation of the plain form.

    For x = t log(beta) near 0, ``-expm1(x) = (1 - e^x) x / log(e^x)``: what the rounding of e^x takes
    from one factor it takes from the other (Kahan).
    """
    x = t * tl.log(beta)
    power = tl.exp(x)
    plain = 1 - power
    near = (power > 0.5) & (power < 1)
    return tl.where(power == 1, -x, tl.where(near, plain * (x / tl.log(tl.where(near, power, 0.5))), plain))


@triton.jit
def power(base, exponent):
    """``base**exponent`` of a positive base, in double precision."""
    return tl.exp(exponent * tl.log(base))
