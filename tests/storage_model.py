"""A slow model of how parameters and states are stored, in double precision, element by element and block by block.

It is written from the tables of docs/storage.md, and shares no code with what it judges but Philox's words, which are
compared with others' elsewhere.
"""

import itertools
import math

import numpy as np
import torch

from fusedopt import noise

BLOCK = 256
STATE_DTYPES = (None, torch.bfloat16, "8bit")
MASTERS = (None, "fp32", "split", "stochastic")
LEGAL = {
    torch.float32: list(itertools.product(STATE_DTYPES, [None])),
    torch.bfloat16: list(itertools.product(STATE_DTYPES, MASTERS)),
    torch.float16: list(itertools.product(STATE_DTYPES, [None, "fp32"])),
}


def as_bits(x):
    return np.asarray(x, dtype=np.float32).view(np.uint32).astype(np.int64)


def from_bits(bits):
    return np.asarray(bits, dtype=np.int64).astype(np.uint32).view(np.float32)


def bf16(t):
    """Values of a bfloat16 tensor, and its bits."""
    bits = t.detach().contiguous().view(torch.int16).numpy().astype(np.int64) & 0xFFFF
    return from_bits(bits << 16), bits


def half_away(master):
    """The 16 bits of float32 numbers, rounded half away from zero."""
    bits = as_bits(master)
    return np.where(np.isnan(master), bits >> 16 | 0x40, bits + 0x8000 >> 16)


def nearest_even(x):
    bits = as_bits(x)
    below = bits & 0xFFFF
    up = (below > 0x8000) | ((below == 0x8000) & (bits >> 16 & 1 == 1))
    return np.where(np.isnan(x), bits >> 16 | 0x40, (bits >> 16) + up)


def by_words(x, words):
    bits = as_bits(x)
    return np.where(np.isnan(x), bits >> 16 | 0x40, bits + (words >> 16) >> 16)


def slices(shape):
    return (1, math.prod(shape)) if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def blocks_of(array):
    """(place among scales, values) of each block, in their order."""
    n, length = slices(array.shape)
    rows = array.reshape(n, length)
    each = -(-length // BLOCK)
    for i in range(n):
        for b in range(each):
            yield i * each + b, (i, slice(b * BLOCK, min((b + 1) * BLOCK, length))), rows


def dequantize(codes, scales, signed):
    """Values in double of uint8 codes and float32 scales."""
    codes, scales = codes.detach().contiguous().numpy().astype(np.float64), scales.detach().double().numpy().ravel()
    out = np.zeros(slices(codes.shape))
    for k, where, rows in blocks_of(codes):
        q = rows[where] - (128 if signed else 0)
        with np.errstate(invalid="ignore"):
            out[where] = scales[k] * q * np.abs(q) / 127**2 if signed else scales[k] * (q / 255) ** 2
    return out.reshape(codes.shape)


def scales_of(values):
    """Those of blocks of values; NaN where not all are finite."""
    found = []
    for _, where, rows in blocks_of(values):
        x = np.abs(rows[where].astype(np.float64))
        found.append(np.max(x, initial=0) if np.isfinite(x).all() else math.nan)
    return np.array(found)


def quantize(values, scales, signed):
    """Codes before they are rounded to whole ones."""
    codes = np.zeros(slices(values.shape))
    for k, where, rows in blocks_of(values):
        x, s = rows[where].astype(np.float64), scales[k]
        root = np.sqrt(np.minimum(np.abs(x) / s, 1)) if s else np.zeros_like(x)
        codes[where] = 128 + np.copysign(127 * root, x) if signed else np.where(x > 0, np.maximum(255 * root, 1), 0)
        codes[where] = np.where(np.isnan(s), 255, codes[where])
    return codes.reshape(values.shape)


def words(optimizer, i, p, name, step):
    """The words that round an operand in a step, from 0 on."""
    names = [spec.name for spec in optimizer.rule.active_states(optimizer.param_groups[0])]
    stream = 1 if name == "param" else 2 + names.index(name)
    index = torch.arange(p.numel()).view(p.shape)
    four = noise.words(index, i, step, (0, stream))
    return torch.stack(four, -1).gather(-1, (index & 3)[..., None])[..., 0].numpy()


def read(tensor, state, name, signed):
    """A stored operand's values in double: the parameter or a state."""
    if tensor.dtype == torch.uint8:
        return dequantize(tensor, state[f"{name}_scale"], signed)
    return tensor.detach().double().numpy()


def read_param(p, state, master):
    if master == "split":
        _, upper = bf16(p)
        low = state["param_low"].contiguous().view(torch.int16).numpy().astype(np.int64)
        joined = from_bits((upper << 16) + low & 0xFFFFFFFF)
        return np.where(np.isnan(joined), from_bits(upper << 16), joined).astype(np.float64)
    own = p.detach().float()
    if master == "fp32":  # unless something else has written the parameter since
        kept = state["master"]
        if p.dtype == torch.float16:
            is_its = kept.half() == p.detach()
        else:
            is_its = torch.from_numpy(half_away(kept.numpy()) == bf16(p)[1])
        own = torch.where(is_its, kept, own)
    return own.double().numpy()


def parameters(dtype):
    """Of one slice and of many, also such as are no multiples of blocks; strided; with gaps; too small for 8 bits."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = [
        randn(4097),  # a tail of one element
        randn(16, 512),
        randn(5, 911),
        randn(12, 30, 4, 4).to(memory_format=torch.channels_last),
        randn(300, 16).t(),
        randn(70, 140)[:, ::2],
        randn(64, 65),
        randn(31),
        randn(4095),
        randn(0, 5),
    ]
    return [torch.nn.Parameter(t) for t in tensors]


def give_gradients(params, seed, dtype=None):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        tails = torch.randn(p.shape, generator=generator) * torch.randn(p.shape, generator=generator).exp()
        p.grad = torch.empty_like(p).copy_(tails) if dtype is None else tails.to(dtype)
