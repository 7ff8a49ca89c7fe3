// How values are stored that are not plain; see fusedopt/codecs.py.
#pragma once

#include "cuda/tile.cuh"

namespace fusedopt::cuda {

constexpr unsigned kInfinite = 0x7f800000u, kMagnitude = 0x7fffffffu;

// The upper half of bits that were rounded; NaN where the value is.
__device__ __forceinline__ unsigned upper(unsigned bits, float value) {
  return (value == value ? bits : __float_as_uint(value) | 0x400000u) >> 16;
}

// A master as a bfloat16 parameter: half away from zero.
__device__ __forceinline__ unsigned visible(float master) { return upper(__float_as_uint(master) + 0x8000u, master); }

// What is missing to a master from its parameter.
__device__ __forceinline__ unsigned missing(float master) {
  return master == master ? __float_as_uint(master) & 0xffffu : 0;
}

__device__ __forceinline__ float joined(unsigned half, unsigned low) {
  const unsigned own = half << 16;
  const float master = __uint_as_float(own + static_cast<unsigned>(static_cast<int>(low << 16) >> 16));
  return master == master ? master : __uint_as_float(own);
}

__device__ __forceinline__ unsigned rounded_master(float master, Codec codec) {
  return codec == Codec::master_f16 ? to_half(master, Codec::f16) : visible(master);
}

// The master, but the parameter where that is not the rounded master.
__device__ __forceinline__ float current_master(unsigned half, float master, Codec codec) {
  const Codec own = codec == Codec::master_f16 ? Codec::f16 : Codec::bf16;
  return rounded_master(master, codec) == half ? master : from_half(half, own);
}

__device__ __forceinline__ unsigned rounded_by(float value, std::uint32_t word) {
  return upper(__float_as_uint(value) + (word >> 16), value);
}

// root: of the scale, divided by the levels.
__device__ __forceinline__ float dequantized(unsigned code, float root, Codec codec) {
  const bool is_signed = codec == Codec::q8_signed;
  const float u = static_cast<float>(static_cast<int>(code) - (is_signed ? 128 : 0)) * root;
  return is_signed ? u * fabsf(u) : u * u;
}

// factor: levels, divided by the root of the scale.
__device__ __forceinline__ unsigned quantized(float value, float factor, Codec codec) {
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a float plus this has the nearest integer in its lowest bits
  const float q = FUSEDOPT_SQRT(fabsf(value)) * factor;
  if (codec == Codec::q8_signed) return (__float_as_uint(copysignf(q, value) + kRounder) + 128) & 0xffu;
  const unsigned code = __float_as_uint(q + kRounder) & 0xffu;
  return code == 0 && value != 0 ? 1 : code;
}

// What codes of blocks need, by the largest magnitude in the block, as bits, of which NaN is above infinity.
struct Scale {
  float scale, factor;
  bool is_finite;

  __device__ __forceinline__ Scale(unsigned most, Codec codec) {
    is_finite = most < kInfinite;
    scale = __uint_as_float(is_finite ? most : 0x7fc00000u);
    factor = is_finite && most ? levels(codec) / sqrtf(scale) : 0;
  }
  __device__ __forceinline__ unsigned code(float value, Codec codec) const {
    return is_finite ? quantized(value, factor, codec) : 0xffu;
  }
};

// The largest of a warp's numbers.
__device__ __forceinline__ unsigned largest_of(unsigned value) {
  for (int offset = 16; offset > 0; offset /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

}  // namespace fusedopt::cuda
