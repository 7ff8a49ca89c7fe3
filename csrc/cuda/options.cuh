// What the engine does in a step besides the rule: noise before it, an average after it.
#pragma once

#include "core/math.h"
#include "core/philox.h"
#include "cuda/walk.cuh"

namespace fusedopt::cuda {

// Of a cohort.
struct CohortOptions {
  double noise;  // its standard deviation
  double ema_weight, slow_weight;
  std::uint32_t seed, step;
  bool is_due;  // slow weights
};

// numbers: of the group, see OptionNumber.
// step: which of a parameter's steps it is, from 1 on.
__device__ __forceinline__ CohortOptions options_of(const double* numbers, double step, bool is_new) {
  const double period = numbers[kDecayOrPeriod] > 1 ? numbers[kDecayOrPeriod] : 1;
  return {
      .noise = std::sqrt(numbers[kEta] / std::pow(step, numbers[kGamma])),
      .ema_weight = is_new ? 1 : 1 - numbers[kDecayOrPeriod],
      .slow_weight = numbers[kAlpha],
      .seed = static_cast<std::uint32_t>(numbers[kSeed]),
      .step = static_cast<std::uint32_t>(step - 1),
      .is_due = step - std::floor(step / period) * period == 0,
  };
}

// Four numbers of neighbours, of which the first has an index.
template <class T>
__device__ __forceinline__ void draw_four(const Draw& draw, std::int64_t index, T* out) {
  const int shift = static_cast<int>(index & 3);  // the same for all lanes
  T drawn[8];
  std::uint32_t words[4];
  draw.words(index >> 2, words);
  normal(words[0], words[1], drawn[0], drawn[1]);
  normal(words[2], words[3], drawn[2], drawn[3]);
  if (shift) {
    draw.words((index >> 2) + 1, words);
    normal(words[0], words[1], drawn[4], drawn[5]);
    normal(words[2], words[3], drawn[6], drawn[7]);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    out[i] = shift == 0 ? drawn[i] : shift == 1 ? drawn[i + 1] : shift == 2 ? drawn[i + 2] : drawn[i + 3];
  }
}

// Four words of neighbours, likewise.
__device__ __forceinline__ void four_words(const Draw& draw, std::int64_t index, std::uint32_t* out) {
  const int shift = static_cast<int>(index & 3);
  std::uint32_t words[4], more[4] = {};
  draw.words(index >> 2, words);
  if (shift) draw.words((index >> 2) + 1, more);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::uint32_t word = words[i];
#pragma unroll
    for (int by = 1; by < 4; ++by) {
      if (shift == by) word = i + by < 4 ? words[(i + by) % 4] : more[(i + by) % 4];
    }
    out[i] = word;
  }
}

// g = factor * g + noise, of a lane's elements.
template <class T, class Row>
__device__ __forceinline__ void add_noise(T* g, T factor, const Row& row, const Whole& at, const CohortOptions& o) {
  const Draw draw = row.draw(o.seed, o.step);
  const T scale = static_cast<T>(o.noise);
#pragma unroll
  for (int k = 0; k < Whole::kCount; k += 4) {
    T drawn[4];
    draw_four(draw, row.words[kFirstElement] + at.of_four(k), drawn);
#pragma unroll
    for (int i = 0; i < 4; ++i) g[k + i] = factor * g[k + i] + scale * drawn[i];
  }
}

// The words that round a lane's elements.
template <class Row>
__device__ __forceinline__ void rounding_words(std::uint32_t* words, const Draw& draw, const Row& row,
                                               const Whole& at) {
#pragma unroll
  for (int k = 0; k < Whole::kCount; k += 4) four_words(draw, row.words[kFirstElement] + at.of_four(k), words + k);
}

template <class Row, int First, int N, bool Any>
__device__ __forceinline__ std::int64_t logical_index(const Row& row, const Masked<First, N, Any>& at, int i) {
  return row.words[kFirstElement] + (row.layout ? at.behind(i, row.index_column()) : at.first + 32 * i);
}

template <class Row, int First, int N, bool Any>
__device__ __forceinline__ void rounding_words(std::uint32_t* words, const Draw& draw, const Row& row,
                                               const Masked<First, N, Any>& at) {
#pragma unroll
  for (int i = 0; i < Masked<First, N, Any>::kCount; ++i) {
    const std::int64_t index = logical_index(row, at, i);
    std::uint32_t drawn[4];
    draw.words(index >> 2, drawn);
    const std::uint32_t lower = index & 1 ? drawn[1] : drawn[0], higher = index & 1 ? drawn[3] : drawn[2];
    words[i] = index & 2 ? higher : lower;
  }
}

template <class T, class Row, int First, int N, bool Any>
__device__ __forceinline__ void add_noise(T* g, T factor, const Row& row, const Masked<First, N, Any>& at,
                                          const CohortOptions& o) {
  const Draw draw = row.draw(o.seed, o.step);
  const T scale = static_cast<T>(o.noise);
#pragma unroll
  for (int i = 0; i < Masked<First, N, Any>::kCount; ++i) {
    g[i] = factor * g[i] + scale * normal<T>(draw, logical_index(row, at, i));
  }
}

// Takes the place of what a rule without options does not have.
struct Nothing {
  template <class... Any>
  __device__ __forceinline__ explicit Nothing(const Any&...) {}
};

// A lane's elements of a row's average, of which the first K operands are the rule's.
template <class Fetch, class T, int K>
struct Averaged {
  typename Fetch::Raw raw = {};
  bool is_asked, puts_back;
  T weight = 0;

  template <class Row>
  __device__ __forceinline__ Averaged(const Row& row, const Fetch& at, const CohortOptions& o) {
    puts_back = row.signature.has(kSlow);
    is_asked = row.signature.has(kEma) || (puts_back && o.is_due);
    if (!is_asked) return;
    weight = static_cast<T>(puts_back ? o.slow_weight : o.ema_weight);
    at.fetch(raw, row.average, row.signature.codec(K), K);
  }

  template <class Row>
  __device__ __forceinline__ void update(T* p, const Row& row, const Fetch& at) {
    if (!is_asked) return;
    const Codec codec = row.signature.codec(K);
    T values[Fetch::kCount];
    decode<Fetch>(values, raw, codec);
#pragma unroll
    for (int i = 0; i < Fetch::kCount; ++i) {
      values[i] = lerp(values[i], p[i], weight);
      if (puts_back) p[i] = values[i];
    }
    encode<Fetch>(raw, values, codec);
    at.put(raw, row.average, codec, K);
  }
};

}  // namespace fusedopt::cuda
