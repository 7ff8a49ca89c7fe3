// Sums in a fixed order, so that the same values have the same bits.
#pragma once

#include <array>
#include <bit>

#include "cpu/blocks.h"

namespace fusedopt::cpu {

constexpr std::int64_t kRun = 512;  // elements whose sums stay in the compute type

template <int N>
double sum(const double* lanes) {
  if constexpr (N == 1) {
    return lanes[0];
  } else {
    double halves[N / 2];
    for (int k = 0; k < N / 2; ++k) halves[k] = lanes[k] + lanes[k + N / 2];
    return sum<N / 2>(halves);
  }
}

using Doubles [[gnu::vector_size(32)]] = double;  // wider ones are slower without AVX-512, and no faster with it
constexpr int kDoubles = 4;

inline void widen(Doubles& to, const double* x) { __builtin_memcpy(&to, x, sizeof(to)); }

inline void widen(Doubles& to, const float* x) {
  using Floats [[gnu::vector_size(16)]] = float;
  Floats narrow;
  __builtin_memcpy(&narrow, x, sizeof(narrow));
  to = __builtin_convertvector(narrow, Doubles);
}

// Of squares, which are exact products where T is float.
template <class T>
double sum_squares(const T* x, std::int64_t n) {
  constexpr int kVectors = kBlock<T> / kDoubles;
  Doubles lanes[kVectors] = {};
  double rest = 0;
  each_block<1>(0, n, n, &x, [&](std::int64_t begin, int count) {
    for (int i = 0; count < kBlock<T> && i < count; ++i) rest += static_cast<double>(x[begin + i]) * x[begin + i];
    for (int k = 0; count == kBlock<T> && k < kVectors; ++k) {
      Doubles wide;
      widen(wide, x + begin + k * kDoubles);
      lanes[k] += wide * wide;
    }
  });
  double all[kBlock<T>];
  __builtin_memcpy(all, lanes, sizeof(all));
  return sum<kBlock<T>>(all) + rest;
}

// N values of each of a block's elements.
template <int N, class T>
struct Found {
  template <class Fields>
  void put(int lane, const Fields& fields) {
    const auto all = std::bit_cast<std::array<T, N>>(fields);
    for (int k = 0; k < N; ++k) values[k][lane] = all[k];
  }

  alignas(kLine) T values[N][kBlock<T>] = {};
};

// Adds up N values of each of n elements of some streams, which end at `last`. Calls find(found, begin, count) for
// blocks.
template <int N, int Streams, class T, class Find>
inline void add_up(std::int64_t n, std::int64_t last, T* const* streams, double* sums, Find find) {
  using Lanes [[gnu::vector_size(kLine)]] = T;  // a vector, or they would not stay in registers
  double wide[N][kBlock<T>] = {};
  for (std::int64_t begin = 0; begin < n; begin += kRun) {
    Lanes lanes[N] = {};
    each_block<Streams>(begin, n - begin < kRun ? n : begin + kRun, last, streams, [&](std::int64_t at, int count) {
      Found<N, T> found;
      find(found, at, count);
      for (int k = 0; k < N; ++k) {
        Lanes more;
        __builtin_memcpy(&more, found.values[k], sizeof(Lanes));
        lanes[k] += more;
      }
    });
    for (int k = 0; k < N; ++k) {
      for (int lane = 0; lane < kBlock<T>; ++lane) wide[k][lane] += static_cast<double>(lanes[k][lane]);
    }
  }
  for (int k = 0; k < N; ++k) sums[k] += sum<kBlock<T>>(wide[k]);
}

}  // namespace fusedopt::cpu
