#include "cpu/codec.h"

#include <bit>
#include <cstddef>
#include <type_traits>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/layout.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fusedopt::cpu {
namespace {

struct bf16 {
  std::uint16_t bits;
};
using f16 = _Float16;

template <class T>
inline T value_of(bf16 x) {
  return static_cast<T>(std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16));
}
template <class T, class S>
inline T value_of(S x) {
  return static_cast<T>(x);
}

// Round to nearest even; a NaN stays a NaN.
inline bf16 to_bf16(float x) {
  const std::uint32_t u = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const std::uint32_t quiet = (u >> 16) | 0x40u;
  return {static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded)};
}

// double -> bf16 rounds once: round to odd in float first, so that the second rounding sees the lost bits.
inline bf16 to_bf16(double x) {
  const float nearest = static_cast<float>(x);
  std::uint32_t u = std::bit_cast<std::uint32_t>(nearest);
  const double error = x - static_cast<double>(nearest);
  if (error != 0 && error == error && (u & 1u) == 0) {
    const bool away = (error > 0) == (x > 0);  // the true value lies farther from zero
    u = away ? u | 1u : u - 1u;
  }
  return to_bf16(std::bit_cast<float>(u));
}

template <class D, class T>
inline D stored(T x) {
  if constexpr (std::is_same_v<D, bf16>) {
    return to_bf16(x);
  } else {
    return static_cast<D>(x);
  }
}

template <class T, class S>
inline void decode_run(T* to, const S* from, std::int64_t n) {
  std::int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<S, f16>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(half));
    }
  }
#endif
  for (; i < n; ++i) to[i] = value_of<T>(from[i]);
}

template <class T, class D>
inline void encode_run(D* to, const T* from, std::int64_t n) {
  std::int64_t i = 0;
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, float> && std::is_same_v<D, f16>) {
    for (; i + 8 <= n; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), half);
    }
  }
#endif
  for (; i < n; ++i) to[i] = stored<D>(from[i]);
}

template <class Call>
inline void with_type(Codec codec, Call call) {
  switch (codec) {
    case Codec::f32:
      return call(float{});
    case Codec::f64:
      return call(double{});
    case Codec::bf16:
      return call(bf16{});
    case Codec::f16:
      return call(f16{});
  }
}

}  // namespace

template <class T>
void decode(T* values, const void* address, Codec codec, const Layout* layout, std::int64_t begin, std::int64_t count,
            std::int64_t last) {
  with_type(codec, [&](auto element) {
    using S = decltype(element);
    const S* source = static_cast<const S*>(address);
    if (!layout) {
      return each_block<1>(begin, begin + count, last, &source,
                           [&](std::int64_t at, int n) { decode_run(values + (at - begin), source + at, n); });
    }
    walk(*layout, begin, count, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) values[at + i] = value_of<T>(source[offset + i * stride]);
    });
  });
}

template <class T>
void encode(const T* values, void* address, Codec codec, const Layout* layout, std::int64_t begin, std::int64_t count) {
  with_type(codec, [&](auto element) {
    using D = decltype(element);
    D* target = static_cast<D*>(address);
    if (!layout) return encode_run(target + begin, values, count);
    walk(*layout, begin, count, [&](std::int64_t at, std::int64_t offset, std::int64_t stride, std::int64_t n) {
      for (std::int64_t i = 0; i < n; ++i) target[offset + i * stride] = stored<D>(values[at + i]);
    });
  });
}

void* scratch(std::size_t bytes) {
  thread_local std::vector<std::byte> memory;
  if (memory.size() < bytes) memory.resize(bytes);
  return memory.data();
}

template void decode<float>(float*, const void*, Codec, const Layout*, std::int64_t, std::int64_t, std::int64_t);
template void decode<double>(double*, const void*, Codec, const Layout*, std::int64_t, std::int64_t, std::int64_t);
template void encode<float>(const float*, void*, Codec, const Layout*, std::int64_t, std::int64_t);
template void encode<double>(const double*, void*, Codec, const Layout*, std::int64_t, std::int64_t);

}  // namespace fusedopt::cpu
