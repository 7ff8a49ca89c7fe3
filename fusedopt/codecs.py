"""What each codec of fusedopt/operands.py is, in plain torch: the readable truth of every engine's.

===============  ===================================================================================================
codec            what it holds
===============  ===================================================================================================
plain            the value, rounded to nearest, ties to even
``stochastic``   bfloat16, rounded up as often as the value is near the upper neighbour: the word of an element
                 (fusedopt/noise.py) decides, of which the upper 16 bits are added to the float32 before it is cut off
``split``        a bfloat16 parameter, and what is missing to its float32 master: the signed difference of their bits,
                 in ``param_low``, which is a bfloat16 tensor because collectives refuse 16-bit integers
``master_*``     a bfloat16 or float16 parameter, and its float32 ``master``
``q8_signed``    ``s q |q| / 127**2``, of q from -127 to 127, stored as q + 128
``q8_unsigned``  ``s (q / 255)**2``, of q from 0 to 255; what is not 0 never becomes 0
===============  ===================================================================================================

Masters are rounded to bfloat16 half away from zero, for to the nearest even the difference would not fit in 16 bits.
A parameter that another program has written since is no rounded master; it is taken as it is.

A scale s is that of a block, the largest magnitude in it: 256 elements in logical order, inside of a slice of dimension
0, of which the last block may be shorter; tensors of fewer than two dimensions are one slice. Scales are float32, of
shape (slices, blocks of a slice), of one slice (blocks). A block with infinities or NaN has the scale NaN, and so is
all NaN. Codes are those of ``sqrt(|x|) (127 / sqrt(s))``, or 255, rounded to the nearest; values are those of
``u = q (sqrt(s) / 127)``, ``u |u|``. So neither division nor underflow takes part, also where s is subnormal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedopt.operands import (
    BLOCK,
    MASTER_BF16,
    MASTER_FP16,
    Q8_SIGNED,
    Q8_UNSIGNED,
    SPLIT,
    STOCHASTIC,
    Codec,
    Operand,
)

_NAN = 0x7F80  # the least magnitude above which bits of bfloat16 are no number
_QUIET = 0x40


def decode(operand: Operand, compute: torch.dtype) -> Tensor:
    """An operand's values, of complex tensors their parts, in a tensor of the compute type."""
    codec, (t, *more) = operand.codec, operand.tensors
    if codec == SPLIT:
        return joined(t, more[0]).to(compute)
    if codec in (MASTER_BF16, MASTER_FP16):
        return current_master(t, more[0]).to(compute)
    if codec in (Q8_SIGNED, Q8_UNSIGNED):
        return dequantized(t, more[0], codec).to(compute)
    return real(t).to(compute)


@torch.no_grad()
def encode(operand: Operand, values: Tensor, words: Tensor | None = None) -> None:
    """Put values of the compute type into an operand.

    Args:
        operand: To be written.
        values: Of its shape, or that of the parts of a complex one.
        words: What rounds them, where the codec draws; int64 of the same shape.
    """
    codec, (t, *more) = operand.codec, operand.tensors
    if codec == SPLIT:
        visible, low = split(values.float())
        t.copy_(visible)
        more[0].copy_(low)
    elif codec in (MASTER_BF16, MASTER_FP16):
        t.copy_(visible_of(values.float(), t.dtype))
        more[0].copy_(values)
    elif codec in (Q8_SIGNED, Q8_UNSIGNED):
        codes, scales = quantized(values.float(), codec)
        t.copy_(codes)
        more[0].copy_(scales)
    elif codec == STOCHASTIC:
        assert words is not None
        t.copy_(rounded_by(values.float(), words))
    else:
        write(t, values)


def write(t: Tensor, values: Tensor) -> None:
    """Round values, or a complex tensor's parts, into it."""
    if t.is_conj() or t.is_neg():  # converted first: torch copies float32 into negated halves with the wrong sign
        t.copy_((torch.view_as_complex(values) if t.is_complex() else values).to(t.dtype))
    else:
        (torch.view_as_real(t) if t.is_complex() else t).copy_(values)


def real(t: Tensor) -> Tensor:
    """A tensor, or the parts of a complex one."""
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


# ------------------------------------------------------------------------------------------------------------ masters


def _upper(bits: Tensor, values: Tensor) -> Tensor:
    """bfloat16 of the upper halves of int32 bits; NaN where the values are."""
    quiet = (values.view(torch.int32) >> 16) | _QUIET
    return torch.where(values.isnan(), quiet, bits >> 16).to(torch.int16).view(torch.bfloat16)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 master's visible part, and what is missing to it, both bfloat16."""
    bits = master.contiguous().view(torch.int32)
    visible = _upper(bits + 0x8000, master.contiguous())
    low = bits - (visible.view(torch.int16).int() << 16)
    return visible, torch.where(master.isnan(), 0, low).to(torch.int16).view(torch.bfloat16)


def joined(visible: Tensor, low: Tensor) -> Tensor:
    """The float32 master of both parts; of a zero or infinity that is none's, itself."""
    bits, missing = (t.contiguous().view(torch.int16).int() for t in (visible, low))
    magnitude = bits & 0x7FFF
    stale = ((magnitude == 0) & (missing < 0)) | ((magnitude >= _NAN) & (missing > 0))
    return ((bits << 16) + torch.where(stale, 0, missing)).view(torch.float32)


def visible_of(master: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 master as its parameter: bfloat16 half away from zero, float16 to the nearest even."""
    return split(master)[0] if dtype == torch.bfloat16 else master.to(dtype)


def current_master(visible: Tensor, master: Tensor) -> Tensor:
    """The master, but the parameter where that is not the rounded master."""
    is_its = visible_of(master, visible.dtype).view(torch.int16) == visible.contiguous().view(torch.int16)
    return torch.where(is_its, master, visible.float())


def rounded_by(values: Tensor, words: Tensor) -> Tensor:
    """bfloat16 of float32 values, by random words."""
    bits = values.contiguous().view(torch.int32)
    return _upper(bits + (words >> 16).int(), values.contiguous())


# ------------------------------------------------------------------------------------------------------- quantisation


def slices_of(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """How many slices of dimension 0 blocks lie inside of, and of how many elements."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def scales_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """That of the scales of a tensor's blocks."""
    slices, length = slices_of(shape)
    blocks = -(-length // BLOCK)
    return (slices, blocks) if len(shape) > 1 else (blocks,)


def levels(codec: Codec) -> int:
    """The largest magnitude of a code."""
    return 127 if codec == Q8_SIGNED else 255


def _blocks(t: Tensor) -> Tensor:
    """A tensor's blocks: (slices, blocks, BLOCK), with zeros behind what is shorter."""
    slices, length = slices_of(t.shape)
    blocks = -(-length // BLOCK)
    flat = torch.nn.functional.pad(t.reshape(slices, length), (0, blocks * BLOCK - length))
    return flat.reshape(slices, blocks, BLOCK)


def _elements(blocks: Tensor, shape: torch.Size) -> Tensor:
    """The tensor of a shape whose blocks they are."""
    slices, length = slices_of(shape)
    return blocks.reshape(slices, -1)[:, :length].reshape(shape)


def quantized(values: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 values."""
    magnitude = _blocks(values.abs())
    scales = magnitude.amax(-1) if magnitude.numel() else magnitude.new_zeros(magnitude.shape[:-1])
    scales = torch.where(scales < math.inf, scales, math.nan)
    factor = torch.where(scales > 0, levels(codec) / scales.sqrt(), 0.0)
    q = (magnitude.sqrt() * factor[..., None]).round()
    if codec == Q8_UNSIGNED:
        codes = torch.where(magnitude > 0, q.clamp_min(1), q)
    else:
        codes = torch.copysign(q, _blocks(values)) + 128
    codes = torch.where(scales.isnan()[..., None], 255.0, codes).to(torch.uint8)
    return _elements(codes, values.shape), scales.reshape(scales_shape(values.shape))


def dequantized(codes: Tensor, scales: Tensor, codec: Codec) -> Tensor:
    """The float32 values of codes."""
    q = _blocks(codes).float()
    root = scales.reshape(q.shape[:-1]).sqrt() / levels(codec)
    if codec == Q8_UNSIGNED:
        u = q * root[..., None]
        return _elements(u * u, codes.shape)
    u = (q - 128) * root[..., None]
    return _elements(u * u.abs(), codes.shape)


def constant(value: float, codec: Codec) -> int:
    """The code of a value that is also the scale."""
    return (128 if codec == Q8_SIGNED else 0) + (levels(codec) if value > 0 else 0)
