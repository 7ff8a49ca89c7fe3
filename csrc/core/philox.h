// Random numbers that do not depend on who draws them. fusedopt/noise.py says which words an element has.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "core/rule.h"

namespace fusedopt {

// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, SC 2011).
constexpr int kPhiloxRounds = 10;
constexpr std::uint32_t kMultiplier0 = 0xD2511F53, kMultiplier1 = 0xCD9E8D57, kWeyl0 = 0x9E3779B9, kWeyl1 = 0xBB67AE85;

FUSEDOPT_HD void philox(std::uint32_t (&counter)[4], std::uint32_t key0, std::uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const std::uint64_t a = std::uint64_t{kMultiplier0} * counter[0], b = std::uint64_t{kMultiplier1} * counter[2];
    const auto high = static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key0;
    const auto other_high = static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key1;
    counter[0] = high;
    counter[1] = static_cast<std::uint32_t>(b);
    counter[2] = other_high;
    counter[3] = static_cast<std::uint32_t>(a);
    key0 += kWeyl0;
    key1 += kWeyl1;
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

// The types that a formula is for: numbers, or several of them in vectors.
struct Single {
  using Float = float;
  using Int = std::int32_t;
  using Word = std::uint32_t;
  FUSEDOPT_HD static float number(std::int32_t x) { return static_cast<float>(x); }
  FUSEDOPT_HD static float root(float x) { return std::sqrt(x); }
};

// Box and Muller's two standard normal numbers of two words, as fusedopt/noise.py makes them, are the coordinates of a
// point. How far it is from the origin is told by the first word: sqrt(-2 ln u), to 1e-7 of it. With u = 2**k (1 + f),
// where 1 + f is the nearest to 1, the root is of -2 ln(2) k - 2 f + f**2 + f**3 q(f). The polynomial is ours, a
// minimax fit with an error of 3.2e-8 of the whole; as sums of pairs, less of it waits for the rest.
template <class N = Single>
FUSEDOPT_HD typename N::Float radius(typename N::Word word) {
  using Int = typename N::Int;
  using Float = typename N::Float;
  constexpr std::int32_t kRootHalf = 0x3f3504f3;  // sqrt(1/2), as bits
  const Int bits = std::bit_cast<Int>(N::number(std::bit_cast<Int>(word >> 8) + 1));
  const Int power = (bits - kRootHalf) & ~0x7fffff;  // of two, as bits: k + 24
  const Float f = std::bit_cast<Float>(bits - power) - 1.0f, squared = f * f;
  const Float first = -0.3992612659931183f * f + 0.5000267624855042f;
  const Float second = -0.29829534888267517f * f + 0.3315517008304596f;
  const Float third = -0.17400874197483063f * f + 0.28534969687461853f;
  const Float q = ((third * squared + second) * squared + first) * f - 0.6666781902313232f;
  const Float minus_log = N::number(power - (24 << 23)) * (-1.38629436f * 0x1p-23f);
  return N::root(minus_log + ((q * f * squared + squared) - 2.0f * f));
}

// In which direction it is, by the second word.
template <class N = Single>
FUSEDOPT_HD void direction(typename N::Word word, typename N::Float& cosine, typename N::Float& sine) {
  using Word = typename N::Word;
  using Float = typename N::Float;
  // An angle of at most a quarter turn, to which half a turn is added where the word's first two bits differ.
  const Word turn = word & 0xffffff00u, twice = turn << 1;
  const Float y = N::number(std::bit_cast<typename N::Int>(twice)) * (6.28318531f * 0x1p-33f);
  const Float z = y * y, squared = z * z;
  // Minimax fits with errors of 1.1e-8 and 4.4e-10.
  const Float s = (2.6051661734527443e-06f * z - 0.000198099558474496f) * squared +
                  (0.008333084173500538f * z - 0.16666661202907562f);
  const Float c = (-2.6051077384181553e-07f * z + 2.4760893211350776e-05f) * squared +
                  (-0.001388839795254171f * z + 0.04166664183139801f);
  const Word sign = (turn ^ twice) & 0x80000000u;
  cosine = std::bit_cast<Float>(std::bit_cast<Word>(c * squared + (1.0f - 0.5f * z)) ^ sign);
  sine = std::bit_cast<Float>(std::bit_cast<Word>(s * (y * z) + y) ^ sign);
}

FUSEDOPT_HD void normal(std::uint32_t a, std::uint32_t b, float& even, float& odd) {
  float cosine, sine;
  direction(b, cosine, sine);
  const float r = radius(a);
  even = r * cosine;
  odd = r * sine;
}

FUSEDOPT_HD void normal(std::uint32_t a, std::uint32_t b, double& even, double& odd) {
  const double r = std::sqrt(-2 * std::log(static_cast<double>((a >> 8) + 1) * 0x1p-24));
  double sine, cosine;
#if defined(__CUDA_ARCH__)
  sincospi(static_cast<double>(b >> 8) * 0x1p-23, &sine, &cosine);  // sin and cos take local memory
#else
  const double angle = static_cast<double>(b >> 8) * (6.283185307179586 * 0x1p-24);
  sine = std::sin(angle);
  cosine = std::cos(angle);
#endif
  even = r * cosine;
  odd = r * sine;
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
