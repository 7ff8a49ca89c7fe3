// The bandwidth limit that benchmarks compare with.
#pragma once

#include <cstdint>

namespace fusedopt::cpu {

// Touches `reads` + `updates` streams of n floats, writing the updated ones, with the engine's threads.
void stream(float* const* updated, int updates, const float* const* read, int reads, std::int64_t n, int threads);

}  // namespace fusedopt::cpu
