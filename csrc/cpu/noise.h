// Gradients with noise.
#pragma once

#include "core/philox.h"
#include "cpu/job.h"

namespace fusedopt::cpu {

// out = factor * gradient + scale * noise, of elements [begin, begin + count) of a row, whose gradient's values are at
// g.
template <class T>
void add_noise(T* out, const T* g, T factor, T scale, const Draw& draw, const Indices& indices, std::int64_t begin,
               std::int64_t count);

}  // namespace fusedopt::cpu
