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

// A square root that need not be the nearest. Host threads have another.
#if !defined(FUSEDOPT_SQRT)
__device__ __forceinline__ float fast_sqrt(float x) {
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
}
#define FUSEDOPT_SQRT(x) fast_sqrt(x)
#endif

// Eight elements for each lane, in runs of 16 bytes of the narrowest type, so that each access of a warp is dense.
struct Whole {
  static constexpr int kCount = 8;
  static constexpr bool kTakesBlocks = true;
  static constexpr int kFours = kCount / 4;
  struct alignas(16) Raw {
    uint4 part[kFours];
  };
  std::int64_t first;  // of the lane
  int stride;          // from four of its elements to the next four

  // together: a lane's elements are neighbours.
  __device__ __forceinline__ Whole(std::int64_t start, bool together) {
    together &= !kHalvesInTwo;
    first = start + lane_id() * (together ? kCount : 4);
    stride = together ? 4 : kTile / kFours;
  }

  __device__ __forceinline__ bool is_active(int) const { return true; }
  // The place of the k-th, which is a multiple of 4: the next three come behind it.
  __device__ __forceinline__ std::int64_t of_four(int k) const { return first + k / 4 * stride; }
  // Where the tile begins, if a lane's elements are together, and which block it is.
  __device__ __forceinline__ std::int64_t tile() const { return first - lane_id() * kCount; }
  __device__ __forceinline__ std::int64_t block(int) const { return first / kBlockElements; }

  // Issues the loads; nothing waits for them here.
  __device__ __forceinline__ void fetch(Raw& raw, std::int64_t address, Codec codec, int) const {
    const int size = size_of(codec);
    if (size == 4) {
#pragma unroll
      for (int k = 0; k < kFours; ++k) raw.part[k] = *at<const uint4>(address, size, k * stride);
    } else if constexpr (kHalvesInTwo) {
      const uint2 a = *at<const uint2>(address, size, 0), b = *at<const uint2>(address, size, stride);
      raw.part[0] = {a.x, a.y, b.x, b.y};
    } else {
      raw.part[0] = *at<const uint4>(address, size, 0);
    }
  }
  __device__ __forceinline__ void put(const Raw& raw, std::int64_t address, Codec codec, int) const {
    const int size = size_of(codec);
    if (size == 4) {
#pragma unroll
      for (int k = 0; k < kFours; ++k) store(at<uint4>(address, size, k * stride), raw.part[k]);
    } else if constexpr (kHalvesInTwo) {
      store(at<uint2>(address, size, 0), uint2{raw.part[0].x, raw.part[0].y});
      store(at<uint2>(address, size, stride), uint2{raw.part[0].z, raw.part[0].w});
    } else {
      store(at<uint4>(address, size, 0), raw.part[0]);
    }
  }
  // Of what stands beside the parameter, whichever column its strides would be in.
  __device__ __forceinline__ void fetch_behind(Raw& raw, std::int64_t address, Codec codec, int column) const {
    fetch(raw, address, codec, column);
  }
  __device__ __forceinline__ void put_behind(const Raw& raw, std::int64_t address, Codec codec, int column) const {
    put(raw, address, codec, column);
  }

  template <class Words>
  __device__ __forceinline__ Words* at(std::int64_t address, int size, int element) const {
    return reinterpret_cast<Words*>(global<char>(address + (first + element) * size));
  }
  template <class Words>
  static __device__ __forceinline__ void store(Words* address, Words words) {
    if constexpr (kStreamingStores) {
      __stcs(address, words);
    } else {
      *address = words;
    }
  }

  static __device__ __forceinline__ unsigned& word(Raw& raw, int k) {
    uint4& q = raw.part[k / 4];
    return k % 4 == 0 ? q.x : k % 4 == 1 ? q.y : k % 4 == 2 ? q.z : q.w;
  }
  static __device__ __forceinline__ unsigned half(Raw& raw, int k) {
    return word(raw, k / 2) >> (k % 2 * 16) & 0xffffu;
  }
  static __device__ __forceinline__ void set_half(Raw& raw, int k, unsigned bits) {
    unsigned& pair = word(raw, k / 2);
    pair = k % 2 ? pair | bits << 16 : bits;
  }
  static __device__ __forceinline__ unsigned byte(Raw& raw, int k) { return word(raw, k / 4) >> (k % 4 * 8) & 0xffu; }
  static __device__ __forceinline__ void set_byte(Raw& raw, int k, unsigned bits) {
    unsigned& four = word(raw, k / 4);
    four = k % 4 ? four | bits << (k % 4 * 8) : bits;
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
  static constexpr bool kTakesBlocks = Any;
  static constexpr int kAll = 32 * kCount;  // of a warp
  struct Raw {
    std::conditional_t<Any, unsigned long long, unsigned> element[kCount];  // or narrower
  };
  std::int64_t first, end;
  std::int64_t offset[N];  // of the first in each of any operands, and what is behind them
  bool has_element = true;

  // Places from `start` on, as far as they are before `end`. A row's layout is null where all operands are dense; slice
  // is not 0 where slices are padded.
  __device__ __forceinline__ Masked(std::int64_t start, std::int64_t end, const std::int64_t* layout,
                                    std::int64_t slice)
      : first(start + lane_id()), end(end) {
    if constexpr (!Any) return;
#pragma unroll
    for (int k = 0; k < N; ++k) offset[k] = layout ? 0 : first;
    if (!layout) return;
    std::int64_t rest = first;
    if (slice) {
      const std::int64_t places = (slice + kBlockElements - 1) / kBlockElements * kBlockElements;
      const std::int64_t outer = quotient(rest, places), inside = rest - outer * places;
      has_element = inside < slice;
      rest = outer * slice + min(inside, slice - 1);
    }
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

  __device__ __forceinline__ bool is_active(int i) const { return first + 32 * i < end && has_element; }
  __device__ __forceinline__ std::int64_t at(int i, int k) const { return Any ? offset[k - First] : first + 32 * i; }
  // The same of columns behind those of the rule's operands, of which there are three at most.
  __device__ __forceinline__ std::int64_t behind(int i, int column) const {
    if constexpr (!Any || N < 3) return first + 32 * i;
    return column == 0 ? offset[N - 3] : column == 1 ? offset[N - 2] : offset[N - 1];
  }
  __device__ __forceinline__ std::int64_t block(int i) const { return (first + 32 * i) / kBlockElements; }

  template <class U, class Offset>
  __device__ __forceinline__ void fetch_as(Raw& raw, std::int64_t address, Offset offset_of) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) raw.element[i] = is_active(i) ? global<const U>(address)[offset_of(i)] : 0;
  }
  template <class U, class Offset>
  __device__ __forceinline__ void put_as(const Raw& raw, std::int64_t address, Offset offset_of) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (is_active(i)) global<U>(address)[offset_of(i)] = static_cast<U>(raw.element[i]);
    }
  }
  template <class Offset>
  __device__ __forceinline__ void fetch_from(Raw& raw, std::int64_t address, Codec codec, Offset offset_of) const {
    const int size = size_of(codec);
    if (size == 4) return fetch_as<unsigned>(raw, address, offset_of);
    if constexpr (Any) {
      if (size == 8) return fetch_as<unsigned long long>(raw, address, offset_of);
      if (N >= 3 && size == 1) return fetch_as<unsigned char>(raw, address, offset_of);
    }
    fetch_as<unsigned short>(raw, address, offset_of);
  }
  template <class Offset>
  __device__ __forceinline__ void put_to(const Raw& raw, std::int64_t address, Codec codec, Offset offset_of) const {
    const int size = size_of(codec);
    if (size == 4) return put_as<unsigned>(raw, address, offset_of);
    if constexpr (Any) {
      if (size == 8) return put_as<unsigned long long>(raw, address, offset_of);
      if (N >= 3 && size == 1) return put_as<unsigned char>(raw, address, offset_of);
    }
    put_as<unsigned short>(raw, address, offset_of);
  }
  __device__ __forceinline__ void fetch(Raw& raw, std::int64_t address, Codec codec, int k) const {
    fetch_from(raw, address, codec, [&](int i) { return at(i, k); });
  }
  __device__ __forceinline__ void put(const Raw& raw, std::int64_t address, Codec codec, int k) const {
    put_to(raw, address, codec, [&](int i) { return at(i, k); });
  }
  __device__ __forceinline__ void fetch_behind(Raw& raw, std::int64_t address, Codec codec, int column) const {
    fetch_from(raw, address, codec, [&](int i) { return behind(i, column); });
  }
  __device__ __forceinline__ void put_behind(const Raw& raw, std::int64_t address, Codec codec, int column) const {
    put_to(raw, address, codec, [&](int i) { return behind(i, column); });
  }

  static __device__ __forceinline__ auto& word(Raw& raw, int i) { return raw.element[i]; }
  static __device__ __forceinline__ unsigned half(Raw& raw, int k) { return static_cast<unsigned>(raw.element[k]); }
  static __device__ __forceinline__ void set_half(Raw& raw, int k, unsigned bits) { raw.element[k] = bits; }
  static __device__ __forceinline__ unsigned byte(Raw& raw, int k) { return half(raw, k); }
  static __device__ __forceinline__ void set_byte(Raw& raw, int k, unsigned bits) { raw.element[k] = bits; }
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
