// GCC 12 warns of its own header: PR 105593.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "cpu/quantize.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "cpu/vectors.h"

namespace fusedopt::cpu {
namespace {

constexpr int kWhole = static_cast<int>(kBlockElements);
constexpr std::int32_t kInfinite = 0x7f800000, kMagnitude = 0x7fffffff;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: a float plus this has the nearest integer in its lowest bits

inline Ints larger(Ints a, Ints b) { return a > b ? a : b; }

// The largest magnitude, as bits: NaN is above infinity.
std::int32_t largest(const float* values) {
  Ints most[4] = {};
  for (int i = 0; i < kWhole; i += 4 * kWords) {
    for (int k = 0; k < 4; ++k) most[k] = larger(most[k], load<Ints>(values + i + k * kWords) & kMagnitude);
  }
  Ints all = larger(larger(most[0], most[1]), larger(most[2], most[3]));
#if defined(__AVX512BW__)
  return _mm512_reduce_max_epi32(reinterpret_cast<__m512i>(all));
#else
  std::int32_t one = 0;
  for (int k = 0; k < kWords; ++k) one = all[k] > one ? all[k] : one;
  return one;
#endif
}

// Two vectors' roots: one by the processor's divider, the other, to the last place or so, while that is at it.
inline Two<Floats> roots(const Two<Floats>& x) {
#if defined(__AVX512BW__)
  const auto y = reinterpret_cast<Floats>(_mm512_maskz_rsqrt14_ps(-1, reinterpret_cast<__m512>(x.b)));
  const Floats root = x.b * y, nearer = root + (x.b - root * root) * (0.5f * y);
  return {square_root(x.a), x.b > 0 ? nearer : x.b};
#else
  return {square_root(x.a), square_root(x.b)};
#endif
}

template <bool Signed>
inline Words code(Floats x, Floats root, float factor) {
  const Floats q = root * factor;
  if constexpr (Signed) {
    return words(floats(words(q) | (words(x) & 0x80000000u)) + (kRounder + 128));
  } else {
    const Floats rounded = q + kRounder, least = x != 0 ? Floats{} + (kRounder + 1) : Floats{} + kRounder;
    return words(rounded > least ? rounded : least);
  }
}

template <bool Signed>
void quantize_block(std::uint8_t* codes, const float* values, float factor) {
  for (int i = 0; i < kWhole; i += kPair) {
    const auto x = load_two<Floats>(values + i), root = roots({magnitude(x.a), magnitude(x.b)});
    store_bytes(codes + i, code<Signed>(x.a, root.a, factor));
    store_bytes(codes + i + kWords, code<Signed>(x.b, root.b, factor));
  }
}

}  // namespace

// Blocks that are shorter have zeros behind them.
void dequantize(float* values, const std::uint8_t* codes, float scale, Codec codec, int n) {
  std::uint8_t padded[kWhole] = {};
  float found[kWhole];
  const bool is_whole = n == kWhole;
  if (!is_whole) std::memcpy(padded, codes, static_cast<std::size_t>(n));
  const Dequantize block(scale, codec);
  for (int i = 0; i < kWhole; i += kWords)
    store((is_whole ? values : found) + i, block((is_whole ? codes : padded) + i));
  if (!is_whole) std::memcpy(values, found, sizeof(float) * static_cast<std::size_t>(n));
}

float quantize(std::uint8_t* codes, const float* values, Codec codec, int n) {
  if (n < kWhole) {
    float padded[kWhole] = {};
    std::uint8_t found[kWhole];
    std::memcpy(padded, values, sizeof(float) * static_cast<std::size_t>(n));
    const float scale = quantize(found, padded, codec, kWhole);
    std::memcpy(codes, found, static_cast<std::size_t>(n));
    return scale;
  }
  const std::int32_t most = largest(values);
  if (most >= kInfinite) {
    std::memset(codes, 255, kWhole);
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float scale = std::bit_cast<float>(most), factor = most ? levels(codec) / std::sqrt(scale) : 0;
  (codec == Codec::q8_signed ? quantize_block<true> : quantize_block<false>)(codes, values, factor);
  return scale;
}

}  // namespace fusedopt::cpu
