// Gradients with noise.
#pragma once

#include "core/philox.h"
#include "cpu/job.h"

namespace fusedopt::cpu {

// out = factor * gradient + scale * noise, of elements [begin, begin + count) of a row, whose gradient's values are at
// g. Meanwhile the same elements of some streams, which are needed next, are prefetched.
template <class T>
void add_noise(T* out, const T* g, T factor, T scale, const Draw& draw, const Indices& indices, std::int64_t begin,
               std::int64_t count, T* const* ahead, int n_ahead);

}  // namespace fusedopt::cpu
