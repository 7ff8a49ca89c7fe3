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

inline Floats magnitude(Floats x) { return reinterpret_cast<Floats>(reinterpret_cast<Ints>(x) & kMagnitude); }

template <bool Signed>
void dequantize_block(float* values, const std::uint8_t* codes, float root) {
  for (int i = 0; i < kWhole; i += kWords) {
    const Ints q = reinterpret_cast<Ints>(widen(codes + i)) - (Signed ? 128 : 0);
    const Floats u = __builtin_convertvector(q, Floats) * root;
    store(values + i, u * (Signed ? magnitude(u) : u));
  }
}

// The largest magnitude, as bits: NaN is above infinity.
std::int32_t largest(const float* values) {
  Ints most = {};
  for (int i = 0; i < kWhole; i += kWords) {
    const Ints bits = load<Ints>(values + i) & kMagnitude;
    most = bits > most ? bits : most;
  }
  std::int32_t all = 0;
  for (int k = 0; k < kWords; ++k) all = most[k] > all ? most[k] : all;
  return all;
}

#if defined(__AVX512BW__)
// To the last place or so: half the time of the processor's own.
inline Floats root_of(Floats x) {
  const auto y = reinterpret_cast<Floats>(_mm512_maskz_rsqrt14_ps(-1, reinterpret_cast<__m512>(x)));
  const Floats root = x * y;
  return x > 0 ? root + (x - root * root) * (0.5f * y) : x;
}
#else
inline Floats root_of(Floats x) { return square_root(x); }
#endif

template <bool Signed>
void quantize_block(std::uint8_t* codes, const float* values, float factor) {
  for (int i = 0; i < kWhole; i += kWords) {
    const Floats x = load<Floats>(values + i), q = root_of(magnitude(x)) * factor;
    if constexpr (Signed) {
      const Words sign = reinterpret_cast<Words>(x) & 0x80000000u;
      const Floats signed_q = reinterpret_cast<Floats>(reinterpret_cast<Words>(q) | sign);
      store_bytes(codes + i, reinterpret_cast<Words>(signed_q + kRounder) + 128u);
    } else {
      const Floats least = x != 0 ? Floats{} + (kRounder + 1) : Floats{} + kRounder, rounded = q + kRounder;
      store_bytes(codes + i, reinterpret_cast<Words>(rounded > least ? rounded : least));
    }
  }
}

}  // namespace

// Blocks that are shorter have zeros behind them.
void dequantize(float* values, const std::uint8_t* codes, float scale, Codec codec, int n) {
  const float root = std::sqrt(scale) / levels(codec);
  const auto run = codec == Codec::q8_signed ? dequantize_block<true> : dequantize_block<false>;
  if (n == kWhole) return run(values, codes, root);
  std::uint8_t padded[kWhole] = {};
  float found[kWhole];
  std::memcpy(padded, codes, static_cast<std::size_t>(n));
  run(found, padded, root);
  std::memcpy(values, found, sizeof(float) * static_cast<std::size_t>(n));
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
