"""What the rules have in common whose memory is chosen anew in every step."""

import triton
import triton.language as tl


@triton.jit
def memory_of(a, b, high):
    """``a / b`` between 0 and ``high``; 0 where it is no number, or b is 0."""
    ratio = tl.where(b > 0, a / tl.where(b > 0, b, 1.0), 0.0)
    return tl.where(ratio > 0, tl.where(ratio < high, ratio, high), 0.0)
