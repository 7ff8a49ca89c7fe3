// A lane's eight elements: read 16 bytes at a time, widened to the compute type, and rounded back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/tables.h"

namespace fusedopt::cuda {

constexpr int kLane = 8;

// The tables hold addresses of global memory; said so, they are accessed as such (LDG, not LD).
template <class T>
__device__ __forceinline__ T* global(std::int64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<std::size_t>(address)));
}

__device__ __forceinline__ int size_of(DType type) { return type == DType::f32 ? 4 : type == DType::f64 ? 8 : 2; }

// Elements of a tile that a lane has: in runs of 16 bytes of the narrowest type, so that each access of a warp is
// dense.
struct Spread {
  int first;   // of the lane
  int stride;  // from one half of its elements to the other
};
__device__ __forceinline__ Spread spread(int lane, bool halves) {
  return halves ? Spread{lane * kLane, kLane / 2} : Spread{lane * (kLane / 2), kTile / 2};
}

struct alignas(16) Raw {
  uint4 half[2];
};

// Issues the loads of eight elements from `element` on; nothing waits for them here.
__device__ __forceinline__ void fetch(Raw& raw, std::int64_t address, DType type, std::int64_t element, int stride) {
  if (type == DType::f32) {
    const float* p = global<const float>(address) + element;
    raw.half[0] = *reinterpret_cast<const uint4*>(p);
    raw.half[1] = *reinterpret_cast<const uint4*>(p + stride);
  } else {
    raw.half[0] = *reinterpret_cast<const uint4*>(global<const unsigned short>(address) + element);
  }
}

__device__ __forceinline__ void put(const Raw& raw, std::int64_t address, DType type, std::int64_t element,
                                    int stride) {
  if (type == DType::f32) {
    float* p = global<float>(address) + element;
    *reinterpret_cast<uint4*>(p) = raw.half[0];
    *reinterpret_cast<uint4*>(p + stride) = raw.half[1];
  } else {
    *reinterpret_cast<uint4*>(global<unsigned short>(address) + element) = raw.half[0];
  }
}

__device__ __forceinline__ float from_bits(unsigned short bits, DType type) {
  if (type == DType::bf16) return __uint_as_float(static_cast<unsigned>(bits) << 16);
  return __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ unsigned short to_bits(float value, DType type) {
  if (type == DType::bf16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

__device__ __forceinline__ unsigned word(const Raw& raw, int k) {
  const uint4& q = raw.half[k / 4];
  return k % 4 == 0 ? q.x : k % 4 == 1 ? q.y : k % 4 == 2 ? q.z : q.w;
}

__device__ __forceinline__ void widen(float* values, const Raw& raw, DType type) {
  if (type == DType::f32) {
#pragma unroll
    for (int k = 0; k < kLane; ++k) values[k] = __uint_as_float(word(raw, k));
  } else {
#pragma unroll
    for (int k = 0; k < kLane; ++k) {
      values[k] = from_bits(static_cast<unsigned short>(word(raw, k / 2) >> (k % 2 * 16)), type);
    }
  }
}

__device__ __forceinline__ void narrow(Raw& raw, const float* v, DType type) {
  if (type == DType::f32) {
    raw.half[0] = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3])};
    raw.half[1] = {__float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7])};
  } else {
    unsigned pair[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      pair[k] = to_bits(v[2 * k], type) | static_cast<unsigned>(to_bits(v[2 * k + 1], type)) << 16;
    }
    raw.half[0] = {pair[0], pair[1], pair[2], pair[3]};
  }
}

// One element.
template <class T>
__device__ __forceinline__ T load_one(std::int64_t address, DType type, std::int64_t element) {
  if (type == DType::f32) return static_cast<T>(global<const float>(address)[element]);
  if (type == DType::f64) return static_cast<T>(global<const double>(address)[element]);
  return static_cast<T>(from_bits(global<const unsigned short>(address)[element], type));
}

template <class T>
__device__ __forceinline__ void store_one(std::int64_t address, DType type, std::int64_t element, T value) {
  if (type == DType::f32) {
    global<float>(address)[element] = static_cast<float>(value);
  } else if (type == DType::f64) {
    global<double>(address)[element] = static_cast<double>(value);
  } else {
    global<unsigned short>(address)[element] = to_bits(static_cast<float>(value), type);
  }
}

// A number whose address says in bit 0 whether it is a double or a float.
__device__ __forceinline__ double load_number(std::int64_t address) {
  if (address & 1) return *global<const double>(address & ~std::int64_t{1});
  return *global<const float>(address);
}

__device__ __forceinline__ void store_number(std::int64_t address, double value) {
  if (address & 1) {
    *global<double>(address & ~std::int64_t{1}) = value;
  } else {
    *global<float>(address) = static_cast<float>(value);
  }
}

}  // namespace fusedopt::cuda
