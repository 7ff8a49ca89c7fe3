// A lane's elements of a tile: fetched as they are stored, decoded to the compute type, encoded, and put back.
//
// There are two ways to fetch, which differ in the elements that a lane has, and how their bits lie in its registers:
// whole tiles 16 bytes at a time, and any range of elements one by one, masked and perhaps by strides.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda/tables.h"

namespace fusedopt::cuda {

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }

// The tables hold addresses of global memory; said so, they are accessed as such (LDG, not LD).
template <class T>
__device__ __forceinline__ T* global(std::int64_t address) {
  return static_cast<T*>(__cvta_global_to_generic(static_cast<std::size_t>(address)));
}

// Asks for the line of 128 bytes that has an address, in L2. Host threads read there instead.
#if !defined(FUSEDOPT_PREFETCH_LINE)
#define FUSEDOPT_PREFETCH_LINE(pointer) asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer))
#endif
__device__ __forceinline__ void prefetch(std::int64_t address) { FUSEDOPT_PREFETCH_LINE(address); }

// Eight elements for each lane, in runs of 16 bytes of the narrowest type, so that each access of a warp is dense.
struct Whole {
  static constexpr int kCount = 8;
  struct alignas(16) Raw {
    uint4 half[2];
  };
  std::int64_t first;  // of the lane
  int stride;          // from one half of its elements to the other

  __device__ __forceinline__ Whole(std::int64_t start, bool halves) {
    const bool together = halves && !kHalvesInTwo;
    first = start + lane_id() * (together ? kCount : kCount / 2);
    stride = together ? kCount / 2 : kTile / 2;
  }

  __device__ __forceinline__ bool is_active(int) const { return true; }

  // Issues the loads; nothing waits for them here.
  __device__ __forceinline__ void fetch(Raw& raw, std::int64_t address, Codec codec, int) const {
    if (codec == Codec::f32) {
      const float* p = global<const float>(address) + first;
      raw.half[0] = *reinterpret_cast<const uint4*>(p);
      raw.half[1] = *reinterpret_cast<const uint4*>(p + stride);
    } else if constexpr (kHalvesInTwo) {
      const unsigned short* p = global<const unsigned short>(address) + first;
      const uint2 a = *reinterpret_cast<const uint2*>(p), b = *reinterpret_cast<const uint2*>(p + stride);
      raw.half[0] = {a.x, a.y, b.x, b.y};
    } else {
      raw.half[0] = *reinterpret_cast<const uint4*>(global<const unsigned short>(address) + first);
    }
  }
  __device__ __forceinline__ void put(const Raw& raw, std::int64_t address, Codec codec, int) const {
    if (codec == Codec::f32) {
      float* p = global<float>(address) + first;
      store(p, raw.half[0]);
      store(p + stride, raw.half[1]);
    } else if constexpr (kHalvesInTwo) {
      unsigned short* p = global<unsigned short>(address) + first;
      store(p, uint2{raw.half[0].x, raw.half[0].y});
      store(p + stride, uint2{raw.half[0].z, raw.half[0].w});
    } else {
      store(global<unsigned short>(address) + first, raw.half[0]);
    }
  }

  template <class Words>
  static __device__ __forceinline__ void store(void* address, Words words) {
    if constexpr (kStreamingStores) {
      __stcs(static_cast<Words*>(address), words);
    } else {
      *static_cast<Words*>(address) = words;
    }
  }

  static __device__ __forceinline__ unsigned& word(Raw& raw, int k) {
    uint4& q = raw.half[k / 4];
    return k % 4 == 0 ? q.x : k % 4 == 1 ? q.y : k % 4 == 2 ? q.z : q.w;
  }
  static __device__ __forceinline__ unsigned half(Raw& raw, int k) {
    return word(raw, k / 2) >> (k % 2 * 16) & 0xffffu;
  }
  static __device__ __forceinline__ void set_half(Raw& raw, int k, unsigned bits) {
    unsigned& pair = word(raw, k / 2);
    pair = k % 2 ? pair | bits << 16 : bits;
  }
};

// element / size, for elements below 2^52: an integer division of 64 bits would be a call.
__device__ __forceinline__ std::int64_t quotient(std::int64_t element, std::int64_t size) {
  std::int64_t q = static_cast<std::int64_t>(static_cast<double>(element) * __drcp_rn(static_cast<double>(size)));
  const std::int64_t rest = element - q * size;
  return rest < 0 ? q - 1 : rest >= size ? q + 1 : q;
}

// Elements 32 apart of N operands from First on: kMaskedElements of dense ones without doubles, whose loads are all
// under way before the first value is needed, or one of any operands, for whose offsets there would not be registers.
template <int First, int N, bool Any>
struct Masked {
  static constexpr int kCount = Any ? 1 : kMaskedElements;
  static constexpr int kAll = 32 * kCount;  // of a warp
  struct Raw {
    std::conditional_t<Any, unsigned long long, unsigned> element[kCount];  // or narrower
  };
  std::int64_t first, end;
  std::int64_t offset[N];  // of the first in each of any operands

  // Elements from `start` on, as far as they are before `end`. A row's layout is null where all operands are dense.
  __device__ __forceinline__ Masked(std::int64_t start, std::int64_t end, const std::int64_t* layout)
      : first(start + lane_id()), end(end) {
    if constexpr (!Any) return;
#pragma unroll
    for (int k = 0; k < N; ++k) offset[k] = layout ? 0 : first;
    if (!layout) return;
    std::int64_t rest = first;
#pragma unroll 1
    for (std::int64_t d = 0, n = layout[0], words = layout[1]; d < n; ++d) {
      const std::int64_t* dim = layout + 2 + d * words;
      const std::int64_t outer = quotient(rest, dim[0]), here = rest - outer * dim[0];
      rest = outer;
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (1 + First + k < words) offset[k] += here * dim[1 + First + k];  // of operands that the row has
      }
    }
  }

  __device__ __forceinline__ bool is_active(int i) const { return first + 32 * i < end; }
  __device__ __forceinline__ std::int64_t at(int i, int k) const { return Any ? offset[k - First] : first + 32 * i; }

  template <class U>
  __device__ __forceinline__ void fetch_as(Raw& raw, std::int64_t address, int k) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw.element[i] = is_active(i) ? global<const U>(address)[at(i, k)] : 0;
  }
  template <class U>
  __device__ __forceinline__ void put_as(const Raw& raw, std::int64_t address, int k) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (is_active(i)) global<U>(address)[at(i, k)] = static_cast<U>(raw.element[i]);
    }
  }
  __device__ __forceinline__ void fetch(Raw& raw, std::int64_t address, Codec codec, int k) const {
    if (codec == Codec::f32) return fetch_as<unsigned>(raw, address, k);
    if constexpr (Any) {
      if (codec == Codec::f64) return fetch_as<unsigned long long>(raw, address, k);
    }
    fetch_as<unsigned short>(raw, address, k);
  }
  __device__ __forceinline__ void put(const Raw& raw, std::int64_t address, Codec codec, int k) const {
    if (codec == Codec::f32) return put_as<unsigned>(raw, address, k);
    if constexpr (Any) {
      if (codec == Codec::f64) return put_as<unsigned long long>(raw, address, k);
    }
    put_as<unsigned short>(raw, address, k);
  }

  static __device__ __forceinline__ auto& word(Raw& raw, int i) { return raw.element[i]; }
  static __device__ __forceinline__ unsigned half(Raw& raw, int k) { return static_cast<unsigned>(raw.element[k]); }
  static __device__ __forceinline__ void set_half(Raw& raw, int k, unsigned bits) { raw.element[k] = bits; }
};

__device__ __forceinline__ float from_half(unsigned bits, Codec codec) {
  if (codec == Codec::bf16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ unsigned to_half(float value, Codec codec) {
  if (codec == Codec::bf16) return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  return __half_as_ushort(__float2half_rn(value));
}

// The values of a lane's elements, fetched by Fetch.
template <class Fetch, class T>
__device__ __forceinline__ void decode(T* values, typename Fetch::Raw& raw, Codec codec) {
  if (codec == Codec::f32) {
#pragma unroll
    for (int i = 0; i < Fetch::kCount; ++i) values[i] = __uint_as_float(static_cast<unsigned>(Fetch::word(raw, i)));
    return;
  }
  if constexpr (sizeof(Fetch::word(raw, 0)) == 8) {
    if (codec == Codec::f64) {
#pragma unroll
      for (int i = 0; i < Fetch::kCount; ++i) {
        values[i] = static_cast<T>(__longlong_as_double(static_cast<long long>(Fetch::word(raw, i))));
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < Fetch::kCount; ++i) values[i] = from_half(Fetch::half(raw, i), codec);
}

template <class Fetch, class T>
__device__ __forceinline__ void encode(typename Fetch::Raw& raw, const T* values, Codec codec) {
  if (codec == Codec::f32) {
#pragma unroll
    for (int i = 0; i < Fetch::kCount; ++i) Fetch::word(raw, i) = __float_as_uint(static_cast<float>(values[i]));
    return;
  }
  if constexpr (sizeof(Fetch::word(raw, 0)) == 8) {
    if (codec == Codec::f64) {
#pragma unroll
      for (int i = 0; i < Fetch::kCount; ++i) {
        Fetch::word(raw, i) = static_cast<unsigned long long>(__double_as_longlong(values[i]));
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < Fetch::kCount; ++i) Fetch::set_half(raw, i, to_half(static_cast<float>(values[i]), codec));
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
