// The bandwidth limit that benchmarks compare with.
#pragma once

#include <cstdint>

namespace fusedopt::cpu {

// Touches streams of n floats as a step does, with the engine's threads: reads the first `measured` of them, and then
// updates all but the second, which is only read. Returns something of what was read first, or that need not be.
float stream(float* const* streams, int n_streams, int measured, std::int64_t n, int threads);

}  // namespace fusedopt::cpu
