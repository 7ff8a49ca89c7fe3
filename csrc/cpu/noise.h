// What is drawn at random: noise in gradients, and words that round.
#pragma once

#include "core/philox.h"
#include "cpu/job.h"

namespace fusedopt::cpu {

// What a step draws for a row.
struct Drawn {
  Drawn(const Draw& draw, const Indices& indices);

  Draw draw;
  std::uint64_t keys[kPhiloxRounds][2];
  const Indices& indices;
};

// The noise of a row's gradient in a step.
struct Noise : Drawn {
  Noise(const StepOptions& options, const Drawing& drawing)
      : Drawn({options.seed, drawing.stream, drawing.tensor, options.step}, drawing.indices), scale(options.noise) {}

  double scale;
};

// Streams, from a row's own on: of what rounds the parameter, and of what rounds the first of the states.
constexpr std::uint32_t kParamStream = 1, kStateStream = 2;
constexpr std::uint32_t kRoundingSeed = 0;

// out = factor * gradient + noise, of elements [begin, begin + count) of a row, whose gradient's values are at g.
template <class T>
void add_noise(T* out, const T* g, T factor, const Noise& noise, std::int64_t begin, std::int64_t count);

// The words of elements [begin, begin + count) of a row.
void draw_words(std::uint32_t* out, const Drawn& drawn, std::int64_t begin, std::int64_t count);

}  // namespace fusedopt::cpu
