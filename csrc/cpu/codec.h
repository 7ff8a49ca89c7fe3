// Elements as they are stored, to values of the compute type and back.
#pragma once

#include "cpu/job.h"

namespace fusedopt::cpu {

// Elements [begin, begin + count) of an operand, in its row's order. A null layout means dense.
template <class T>
void decode(T* values, const void* address, Codec codec, const Layout* layout, std::int64_t begin, std::int64_t count,
            std::int64_t last);

template <class T>
void encode(const T* values, void* address, Codec codec, const Layout* layout, std::int64_t begin, std::int64_t count);

// Memory for values, of this thread's, until it asks again.
void* scratch(std::size_t bytes);

}  // namespace fusedopt::cpu
