// Stands in for CUDA's header in tests; see cuda_runtime.h beside it.
#pragma once

#include <bit>

struct __nv_bfloat16 {
  unsigned short bits;
};

inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

// To the nearest, ties to even; NaN is 0x7fff as on the GPU.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const unsigned bits = std::bit_cast<unsigned>(value);
  if (value != value) return {0x7fff};
  return {static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
