// Vectors of the ISA level, for what compilers do not find by themselves.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fusedopt::cpu {

#if defined(__AVX512BW__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kWords = kBytes / 4;  // of a vector

using Floats [[gnu::vector_size(kBytes)]] = float;
using Ints [[gnu::vector_size(kBytes)]] = std::int32_t;
using Words [[gnu::vector_size(kBytes)]] = std::uint32_t;
using Halves [[gnu::vector_size(kBytes / 2)]] = std::uint16_t;
using Codes [[gnu::vector_size(kBytes / 4)]] = std::uint8_t;

template <class Vector, class T>
inline Vector load(const T* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <class Vector, class T>
inline void store(T* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(Vector));
}

inline Floats square_root(Floats x) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Floats>(_mm512_maskz_sqrt_ps(-1, reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Floats>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  for (int k = 0; k < kWords; ++k) x[k] = std::sqrt(x[k]);
  return x;
#endif
}

inline Words widen(const std::uint16_t* from) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Words>(_mm512_maskz_cvtepu16_epi32(-1, load<__m256i>(from)));
#else
  return __builtin_convertvector(load<Halves>(from), Words);
#endif
}

inline Words widen(const std::uint8_t* from) {
#if defined(__AVX512BW__)
  return reinterpret_cast<Words>(_mm512_maskz_cvtepu8_epi32(-1, load<__m128i>(from)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__SSE4_1__)
  return reinterpret_cast<Words>(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(load<std::int32_t>(from))));
#else
  return __builtin_convertvector(load<Codes>(from), Words);
#endif
}

#if defined(__AVX512BW__)
template <int First>
inline void store_halves(std::uint16_t* to, Words a, Words b) {
  using Lanes [[gnu::vector_size(kBytes)]] = std::uint16_t;
  const auto lanes = [&]<int... k>(std::integer_sequence<int, k...>) {
    return __builtin_shufflevector(reinterpret_cast<Lanes>(a), reinterpret_cast<Lanes>(b), (2 * k + First)...);
  };
  store(to, lanes(std::make_integer_sequence<int, 2 * kWords>()));
}
#endif

// The upper halves of two vectors' words, one after another.
inline void store_upper(std::uint16_t* to, Words a, Words b) {
#if defined(__AVX512BW__)
  store_halves<1>(to, a, b);
#elif defined(__AVX2__)
  const auto packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(a >> 16), reinterpret_cast<__m256i>(b >> 16));
  store(to, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  store(to, __builtin_convertvector(a >> 16, Halves));
  store(to + kWords, __builtin_convertvector(b >> 16, Halves));
#endif
}

// The lower ones.
inline void store_lower(std::uint16_t* to, Words a, Words b) {
#if defined(__AVX512BW__)
  store_halves<0>(to, a, b);
#elif defined(__AVX2__)
  const __m256i zero = _mm256_setzero_si256();
  const auto packed = _mm256_packus_epi32(_mm256_blend_epi16(reinterpret_cast<__m256i>(a), zero, 0xaa),
                                          _mm256_blend_epi16(reinterpret_cast<__m256i>(b), zero, 0xaa));
  store(to, _mm256_permute4x64_epi64(packed, 0xd8));
#else
  store(to, __builtin_convertvector(a, Halves));
  store(to + kWords, __builtin_convertvector(b, Halves));
#endif
}

// The lowest bytes of a vector's words.
inline void store_bytes(std::uint8_t* to, Words x) {
#if defined(__AVX512BW__)
  store(to, _mm512_maskz_cvtepi32_epi8(-1, reinterpret_cast<__m512i>(x)));
#elif defined(__SSE4_1__)
  using Lanes [[gnu::vector_size(kBytes)]] = std::uint8_t;
  Lanes picked = {};
  for (int k = 0; k < kWords; ++k) picked[k / 4 * 16 + k % 4] = static_cast<std::uint8_t>(16 * (k / 4) + 4 * (k % 4));
  const Lanes bytes = __builtin_shuffle(reinterpret_cast<Lanes>(x), picked);
  for (int k = 0; k < kWords; k += 4) __builtin_memcpy(to + k, reinterpret_cast<const char*>(&bytes) + 4 * k, 4);
#else
  store(to, __builtin_convertvector(x, Codes));
#endif
}

}  // namespace fusedopt::cpu
