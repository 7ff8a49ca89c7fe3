// Random numbers that do not depend on who draws them. fusedopt/noise.py says which words an element has.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/rule.h"

namespace fusedopt {

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011), in place.
FUSEDOPT_HD void philox(std::uint32_t (&counter)[4], std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{0xD2511F53} * counter[0], b = std::uint64_t{0xCD9E8D57} * counter[2];
    const auto high = static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0;
    const auto other_high = static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1;
    counter[0] = high;
    counter[1] = static_cast<std::uint32_t>(b);
    counter[2] = other_high;
    counter[3] = static_cast<std::uint32_t>(a);
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
}

// Which words a step draws for a tensor.
struct Draw {
  std::uint32_t seed, stream, tensor, step;

  // The words of four elements, from 4 * group on.
  FUSEDOPT_HD void words(std::int64_t group, std::uint32_t (&out)[4]) const {
    out[0] = static_cast<std::uint32_t>(group);
    out[1] = static_cast<std::uint32_t>(static_cast<std::uint64_t>(group) >> 32);
    out[2] = tensor;
    out[3] = step;
    philox(out, seed, stream);
  }
};

// The logarithm of u in (0, 1], to about one unit in the last place: the polynomial is ours, a minimax fit of
// (log(1 + f) - f + f^2 / 2) / f^3 with an error of 3.2e-8 of the logarithm.
FUSEDOPT_HD float fast_log(float u) {
  constexpr std::int32_t kRootHalf = 0x3f3504f3;  // sqrt(1/2), as bits
  const std::int32_t bits = std::bit_cast<std::int32_t>(u) - kRootHalf;
  const auto exponent = static_cast<float>(bits >> 23);
  const float f = std::bit_cast<float>((bits & 0x7fffff) + kRootHalf) - 1.0f;
  float q = 0.08700434863567352f;
  q = q * f - 0.14267486333847046f;
  q = q * f + 0.14914768934249878f;
  q = q * f - 0.1657758504152298f;
  q = q * f + 0.19963063299655914f;
  q = q * f - 0.2500133812427521f;
  q = q * f + 0.3333390951156616f;
  const float squared = f * f;
  const float rest = q * f * squared - 0.5f * squared;
  constexpr float kLog2 = 0.693359375f, kLog2Rest = -2.12194440e-4f;  // of which the first has few bits
  return exponent * kLog2 + (f + (rest + exponent * kLog2Rest));
}

// Two standard normal numbers of two words, as fusedopt/noise.py makes them.
FUSEDOPT_HD void normal(std::uint32_t a, std::uint32_t b, float& even, float& odd) {
  const auto u = static_cast<float>(static_cast<std::int32_t>((a >> 8) + 1)) * 0x1p-24f;
  const float radius = std::sqrt(-2.0f * fast_log(u));
  const auto turn = static_cast<std::int32_t>(b >> 8);                         // in 2**-24 turns
  const std::int32_t quadrant = (turn + (1 << 21)) >> 22;                      // the nearest of five
  const auto y = static_cast<float>(turn - (quadrant << 22)) * 3.7450703e-7f;  // 2 pi / 2**24, in [-pi / 4, pi / 4]
  const float z = y * y;
  // Minimax fits with errors of 3.6e-9 and 1.2e-10.
  const float sine = y + y * z * (-0.16666655242443085f + z * (0.008332177996635437f - z * 0.0001951729936990887f));
  const float cosine =
      1.0f - 0.5f * z + z * z * (0.04166664555668831f + z * (-0.0013887316454201937f + z * 2.44331567955669e-05f));
  const bool swaps = quadrant & 1;
  const float c = swaps ? sine : cosine, s = swaps ? cosine : sine;
  even = (quadrant + 1) & 2 ? -radius * c : radius * c;
  odd = quadrant & 2 ? -radius * s : radius * s;
}

FUSEDOPT_HD void normal(std::uint32_t a, std::uint32_t b, double& even, double& odd) {
  const double radius = std::sqrt(-2 * std::log(static_cast<double>((a >> 8) + 1) * 0x1p-24));
  double sine, cosine;
#if defined(__CUDA_ARCH__)
  sincospi(static_cast<double>(b >> 8) * 0x1p-23, &sine, &cosine);  // sin and cos take local memory
#else
  const double angle = static_cast<double>(b >> 8) * (6.283185307179586 * 0x1p-24);
  sine = std::sin(angle);
  cosine = std::cos(angle);
#endif
  even = radius * cosine;
  odd = radius * sine;
}

// That of one element.
template <class T>
FUSEDOPT_HD T normal(const Draw& draw, std::int64_t element) {
  std::uint32_t words[4];
  draw.words(element >> 2, words);
  const bool is_upper = element & 2;
  T even, odd;
  normal(is_upper ? words[2] : words[0], is_upper ? words[3] : words[1], even, odd);
  return element & 1 ? odd : even;
}

}  // namespace fusedopt
