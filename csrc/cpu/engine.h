// The CPU engine: one parallel region that measures the gradient norm, decides, and steps every tensor.
#pragma once

#include "core/job.h"

namespace fusedopt::cpu {

void run(Job& job);

// The bandwidth limit that benchmarks compare with: touches `reads` + `updates` streams of n floats,
// writing the updated ones, with the engine's own tiling and threads.
void stream(float* const* updated, int updates, const float* const* read, int reads, std::int64_t n, int threads);

}  // namespace fusedopt::cpu
