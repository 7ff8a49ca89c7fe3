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
constexpr int kPair = 2 * kWords;   // of two, and halves of one

using Floats [[gnu::vector_size(kBytes)]] = float;
using Ints [[gnu::vector_size(kBytes)]] = std::int32_t;
using Words [[gnu::vector_size(kBytes)]] = std::uint32_t;
using Halves [[gnu::vector_size(kBytes)]] = std::uint16_t;
using Codes [[gnu::vector_size(kBytes / 4)]] = std::uint8_t;

// Two vectors, one after the other.
template <class Vector>
struct Two {
  Vector a, b;
};

inline Words words(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats floats(Words x) { return reinterpret_cast<Floats>(x); }

template <class Vector, class T>
inline Vector load(const T* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <class Vector, class T>
inline Two<Vector> load_two(const T* from) {
  return {load<Vector>(from), load<Vector>(from + kWords)};
}

template <class Vector, class T>
inline void store(T* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof(Vector));
}

template <class Vector, class T>
inline void store(T* to, const Two<Vector>& two) {
  store(to, two.a);
  store(to + kWords, two.b);
}

inline Floats magnitude(Floats x) { return floats(words(x) & 0x7fffffffu); }

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

inline bool has_nan(const Two<Floats>& x) {
#if defined(__AVX512BW__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x.a), reinterpret_cast<__m512>(x.b), _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  const auto unordered = _mm256_cmp_ps(reinterpret_cast<__m256>(x.a), reinterpret_cast<__m256>(x.b), _CMP_UNORD_Q);
  return _mm256_movemask_ps(unordered) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpunord_ps(reinterpret_cast<__m128>(x.a), reinterpret_cast<__m128>(x.b))) != 0;
#else
  for (int k = 0; k < kWords; ++k) {
    if (x.a[k] != x.a[k] || x.b[k] != x.b[k]) return true;
  }
  return false;
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

// Words of such halves.
inline Two<Words> interleave(Halves upper, Halves lower) {
  const auto from = [&]<int First, int... k>(std::integer_sequence<int, First>, std::integer_sequence<int, k...>) {
    return reinterpret_cast<Words>(__builtin_shufflevector(lower, upper, (First + k / 2 + k % 2 * kPair)...));
  };
  constexpr auto all = std::make_integer_sequence<int, kPair>();
  return {from(std::integer_sequence<int, 0>(), all), from(std::integer_sequence<int, kWords>(), all)};
}

// Words of which they are the upper halves.
inline Two<Words> widen(Halves upper) {
#if defined(__AVX512BW__)
  const auto from = [&]<int First, int... k>(std::integer_sequence<int, First>, std::integer_sequence<int, k...>) {
    constexpr Halves order = {(First + k / 2)...};
    const auto picked =
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, reinterpret_cast<__m512i>(order), reinterpret_cast<__m512i>(upper));
    return reinterpret_cast<Words>(picked);
  };
  constexpr auto all = std::make_integer_sequence<int, kPair>();
  return {from(std::integer_sequence<int, 0>(), all), from(std::integer_sequence<int, kWords>(), all)};
#else
  return interleave(upper, Halves{});
#endif
}

#if defined(__AVX512BW__) || !defined(__AVX2__)
template <int First>
inline Halves every_other(const Two<Words>& x) {
  const auto picked = [&]<int... k>(std::integer_sequence<int, k...>) {
    return __builtin_shufflevector(reinterpret_cast<Halves>(x.a), reinterpret_cast<Halves>(x.b), (2 * k + First)...);
  };
  return picked(std::make_integer_sequence<int, kPair>());
}
inline Halves upper_halves(const Two<Words>& x) { return every_other<1>(x); }
inline Halves lower_halves(const Two<Words>& x) { return every_other<0>(x); }
#else
inline Halves packed(__m256i a, __m256i b) {
  return reinterpret_cast<Halves>(_mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8));
}
inline Halves upper_halves(const Two<Words>& x) {
  return packed(reinterpret_cast<__m256i>(x.a >> 16), reinterpret_cast<__m256i>(x.b >> 16));
}
inline Halves lower_halves(const Two<Words>& x) {
  const __m256i zero = _mm256_setzero_si256();
  return packed(_mm256_blend_epi16(reinterpret_cast<__m256i>(x.a), zero, 0xaa),
                _mm256_blend_epi16(reinterpret_cast<__m256i>(x.b), zero, 0xaa));
}
#endif

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
