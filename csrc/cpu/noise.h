// Gradients with noise.
#pragma once

#include "core/philox.h"
#include "cpu/job.h"

namespace fusedopt::cpu {

// What the noise of a row's gradient is drawn by in a step.
struct Noise {
  Noise(const StepOptions& options, const Drawing& drawing);

  Draw draw;
  std::uint64_t keys[kPhiloxRounds][2];
  double scale;
  const Indices& indices;
};

// out = factor * gradient + noise, of elements [begin, begin + count) of a row, whose gradient's values are at g.
template <class T>
void add_noise(T* out, const T* g, T factor, const Noise& noise, std::int64_t begin, std::int64_t count);

}  // namespace fusedopt::cpu
