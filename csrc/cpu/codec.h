// Moves a run of elements between an operand in memory and a staging buffer of the compute type.
#pragma once

#include "core/job.h"

namespace fusedopt::cpu {

// Elements [begin, begin + count) of the row's order. A null layout means dense.
template <class T>
void load(T* buffer, const void* data, DType dtype, const Layout* layout, std::int64_t begin, std::int64_t count);

template <class T>
void store(const T* buffer, void* data, DType dtype, const Layout* layout, std::int64_t begin, std::int64_t count);

}  // namespace fusedopt::cpu
