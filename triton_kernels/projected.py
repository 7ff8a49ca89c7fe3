"""What AdamP and SGDP share: a step d is projected, ``d <- d - p <d, p> / (|p| + eps)^2``.

It is where the gradient is nearly orthogonal to the parameter: in each channel, or else in the whole tensor.
"""

import triton
import triton.language as tl

measures = ("grad", "param", "grad_param", "step_param", "count")


@triton.jit
def sums(p, g, d):
    """Of a step along d."""
    return (g * g, p * p, g * p, d * p, tl.where(p == p, 1.0, 1.0).to(p.dtype))


@triton.jit
def score_of(eps, m):
    """The cosine of gradient and parameter, times the root of how many elements they have."""
    grad, param = tl.sqrt(m[0]), tl.sqrt(m[1])
    lengths = tl.where(grad < eps, eps, grad) * tl.where(param < eps, eps, param)
    cosine = tl.abs(m[2]) / tl.where(lengths > 0, lengths, 1.0)
    return tl.where(lengths > 0, cosine * tl.sqrt(m[4]), 0.0)


@triton.jit
def project(eps, delta, wd_ratio, pull, n_dims, m, whole, largest):
    """How much of the parameter is taken out of the step, and what it and the decay add of it."""
    in_channels = largest < delta
    projects = (n_dims >= 2) & (in_channels | (score_of(eps, whole) < delta))
    length = tl.sqrt(tl.where(in_channels, m[1], whole[1])) + eps
    step_param = tl.where(in_channels, m[3], whole[3])
    along = tl.where(length > 0, step_param / tl.where(length > 0, length * length, 1.0), 0.0)
    return tl.where(projects, along, 0.0), tl.where(projects, pull * wd_ratio - along, pull)
